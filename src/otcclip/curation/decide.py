"""What is to be done with a pair: keep, re-pair or drop, by one stated rule on numbers of the scan alone.

keep      lie <= alpha: the probability that the caption has nothing to do with the image (`detectors.evidence`)
re-pair   else, if a lie is likelier than not (lie >= likely), and another caption is a confident match (METHOD section
          2.3): the look-alikes like it best of all (its place, averaged over the views, is at most `seconded`), those
          that are alike to nobody who was trained bear it out, the encoder prefers it by a margin, and the pairs that
          carry it are not lies themselves (else whoever plants many lies under one caption is handed more)
drop      else
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otcclip.errors import UserError

KEEP, REPAIR, DROP = "keep", "re-pair", "drop"


@dataclass(frozen=True)
class Rule:
    """The rule's levels, each a probability but the margin.

    Attributes:
        alpha: most that the probability of a lie may be for a pair to be kept.
        likely: least that it must be for a pair to be given another caption, and more than it is, on the mean, for the
            pairs that carry that one.
        seconded: place that the look-alikes may give the nominee at most; 1 is first in every view.
        looks: share of captions that what looks alike may like at least as well as the nominee, in the worst view.
        margin: by how much d of the nominee must be below d of the next candidate; not asked of encoders without d.
        repair: whether to re-pair at all; else such pairs are dropped.
    """

    alpha: float = 0.02
    likely: float = 0.5
    seconded: float = 1.5
    looks: float = 0.05
    margin: float = 0.02
    repair: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= self.likely <= 1:
            raise UserError(f"rule: 0 < alpha ({self.alpha}) <= likely ({self.likely}) <= 1 is asked for")
        if self.seconded < 1 or not 0 < self.looks <= 1 or self.margin < 0:
            raise UserError(
                f"rule: seconded ({self.seconded}) is a place from 1, looks ({self.looks}) a share, margin "
                f"({self.margin}) not below 0"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def decide(
        self,
        lie: NDArray[np.floating],
        nominee_lie: NDArray[np.floating],
        nominee_place: NDArray[np.floating],
        nominee_looks: NDArray[np.floating],
        margin: NDArray[np.floating],
    ) -> NDArray[np.str_]:
        """`[n]` actions. `margin` is NaN where the encoder has no d: the look-alikes alone then decide. `nominee_place`
        is NaN for crowds, which are not re-paired."""
        clear = np.isnan(margin) | (margin >= self.margin)
        sound = (nominee_lie < self.likely) & (nominee_place <= self.seconded) & (nominee_looks <= self.looks)
        mended = (lie >= self.likely) & sound & clear & self.repair
        return np.where(lie <= self.alpha, KEEP, np.where(mended, REPAIR, DROP))
