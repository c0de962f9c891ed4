"""What is to be done with a pair: keep, re-pair or drop, by one stated rule on numbers of the scan alone.

p_value of a pair: how well a caption that has nothing to do with the image would have fared. Look-alikes give one
share, the encoder's own ranking another (where it has a joint space); Fisher's rule joins them, and a claim made by m
pairs is held to 1 / m (docs/method.md).

    keep      p_value <= alpha
    re-pair   else, if p_value >= unlikely (the own caption looks no better than a random one), another caption is
    nominated,
              the look-alikes second it (nominee_share <= alpha), and it wins by a margin (METHOD section 2.3)
    drop      else
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from otcclip.errors import UserError
from otcclip.evidence.neighbours import combined_p

KEEP, REPAIR, DROP = "keep", "re-pair", "drop"


@dataclass(frozen=True)
class Rule:
    """The rule's levels.

    Attributes:
        alpha: expected share of pairs with unrelated captions that are kept, at most; and of unrelated nominees
        seconded.
        unlikely: p-value from which an own caption counts as random.
        margin: by how much d of the nominee must be below d of the next candidate; 0 for encoders without d.
        repair: whether to re-pair at all; else such pairs are dropped.
    """

    alpha: float = 0.02
    unlikely: float = 0.2
    margin: float = 0.02
    repair: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= self.unlikely <= 1:
            raise UserError(f"rule: 0 < alpha ({self.alpha}) <= unlikely ({self.unlikely}) <= 1 is asked for")
        if self.margin < 0:
            raise UserError(f"rule: margin {self.margin} is below 0")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def decide(
        self, p_value: NDArray[np.floating], nominee_share: NDArray[np.floating], margin: NDArray[np.floating]
    ) -> NDArray[np.str_]:
        """`[n]` actions. `margin` is NaN where the encoder has no d: the look-alikes alone then decide."""
        clear = np.isnan(margin) | (margin >= self.margin)
        mended = (p_value >= self.unlikely) & (nominee_share <= self.alpha) & clear & self.repair
        return np.where(p_value <= self.alpha, KEEP, np.where(mended, REPAIR, DROP))


def p_values(
    look_alikes: NDArray[np.floating], own_share: NDArray[np.floating] | None, copies: NDArray[np.integer]
) -> NDArray[np.float64]:
    """`[n]` in (0, 1]: Fisher's combination of the shares that there are, times the number of pairs with the claim."""
    shares = [torch.from_numpy(np.asarray(look_alikes, np.float64))]
    if own_share is not None:
        shares.append(torch.from_numpy(np.asarray(own_share, np.float64)))
    joined: NDArray[np.float64] = combined_p(*shares).numpy()
    return np.minimum(1.0, joined * copies)
