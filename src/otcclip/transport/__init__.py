"""Optimal transport between feature sets: pure tensors, nothing of CLIP, images or files.

>>> x = FeatureSets.from_dense(patches)          # [n, m, d] unit vectors
>>> y = FeatureSets.from_padded(tokens, mask)    # [n, t, d], [n, t]
>>> pair_costs(x, y, epsilon=0.1).value          # [n], x[i] with y[i]
>>> all_costs(x, y, epsilon=0.1).value           # [n, n], differentiable in both
>>> nearest(x, y, k=5).index                     # [n, 5], exact
"""

from otcclip.transport.bounds import Summary
from otcclip.transport.problem import FeatureSets
from otcclip.transport.search import Nearest, nearest
from otcclip.transport.solve import AllCosts, PairCosts, all_costs, pair_costs, plan
from otcclip.transport.storage import load, save

__all__ = [
    "AllCosts",
    "FeatureSets",
    "Nearest",
    "PairCosts",
    "Summary",
    "all_costs",
    "load",
    "nearest",
    "pair_costs",
    "plan",
    "save",
]
