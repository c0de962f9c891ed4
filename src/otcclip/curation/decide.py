"""What is to be done with a pair: keep, re-pair or drop, by one stated rule on numbers of the scan alone.

keep      lie <= alpha: the probability that the caption has nothing to do with the image (`detectors.evidence`)
re-pair   else, if a lie is likelier than not (lie >= likely), and another caption is a confident match (METHOD section
          2.3): the look-alikes like it best of all (its place is at most `seconded`), those alike to the encoder on the
          mean of the views and those that are alike to nobody who was trained in each of them; the encoder prefers it
          by a margin, and the pairs that carry it are not lies themselves (else whoever plants many lies under one
          caption is handed more)
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
        seconded: place that either kind of look-alikes may give the nominee at most; 1 is first in every view.
        margin: by how much d of the nominee must be below d of the next candidate; not asked of encoders without d.
        repair: whether to re-pair at all; else such pairs are dropped.
    """

    alpha: float = 0.02
    likely: float = 0.5
    seconded: float = 1.5
    margin: float = 0.02
    repair: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= self.likely <= 1:
            raise UserError(f"rule: 0 < alpha ({self.alpha}) <= likely ({self.likely}) <= 1 is asked for")
        if self.seconded < 1 or self.margin < 0:
            raise UserError(f"rule: seconded ({self.seconded}) is a place from 1, margin ({self.margin}) not below 0")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def decide(
        self,
        lie: NDArray[np.floating],
        nominee_lie: NDArray[np.floating],
        nominee_place: NDArray[np.floating],
        looks_place: NDArray[np.floating],
        margin: NDArray[np.floating],
    ) -> NDArray[np.str_]:
        """`[n]` actions. `margin` is NaN where the encoder has no d: the look-alikes alone then decide. `nominee_place`
        is NaN for crowds, which are not re-paired; `looks_place` is that of what looks alike, in the worst view."""
        clear = np.isnan(margin) | (margin >= self.margin)
        sound = (nominee_lie < self.likely) & (nominee_place <= self.seconded) & (looks_place <= self.seconded)
        mended = (lie >= self.likely) & sound & clear & self.repair
        return np.where(lie <= self.alpha, KEEP, np.where(mended, REPAIR, DROP))
