"""Two groups of p-values: lies, uniform, and honest pairs, piled up at 0.

f0 = 1 and f1 = a p^(a - 1): Efron's local false discovery rate ("Microarrays, Empirical Bayes and the Two-Groups
Model", Statistical Science 2008), f1 as in Pounds and Morris (Bioinformatics 2003), the share of lies as estimated by
Storey (JRSS B 2002): p-values above one half, doubled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

LAMBDA = 0.5
LEAST = 1e-5
ROUNDS = 20  # of each expectation-maximisation, here and in `evidence`; both have settled by then


@dataclass(frozen=True)
class Mixture:
    """The two groups: `share` of lies among all pairs, `a` of the honest pairs' density a p^(a - 1)."""

    share: float
    a: float

    def log_ratio(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """log f0 / f1."""
        out: NDArray[np.float64] = -np.log(self.a) - (self.a - 1) * np.log(p.clip(LEAST, 1))
        return out

    def posterior(self, p: NDArray[np.float64], prior: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """P(lie | p) under a prior share of lies."""
        odds: NDArray[np.float64] = logit(prior) + self.log_ratio(p)
        posterior: NDArray[np.float64] = expit(odds)
        return posterior


def fit_mixture(p: NDArray[np.float64]) -> Mixture:
    """Storey's share, then `a` by expectation-maximisation with that share held fixed."""
    p = p.clip(LEAST, 1)
    share = float(np.clip((p > LAMBDA).mean() / (1 - LAMBDA), 1e-4, 0.99))
    a = 0.3
    for _ in range(ROUNDS):
        honest = 1 - Mixture(share, a).posterior(p, share)
        a = float(np.clip(honest.sum() / max(1e-9, -(honest * np.log(p)).sum()), 0.01, 0.99))
    return Mixture(share, a)
