"""Rates with their 95 % Wilson score interval.

Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927: the p with
|k/n - p| <= z sqrt(p (1 - p) / n). Unlike k/n +- z sqrt(...), it says something at 0 of 16 (0 to 19.4 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The 97.5 % quantile of the standard normal.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share `value` of `n` trials, 0..1, with its 95 % interval `low`..`high`."""

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int) -> Rate:
        """The rate of `successes` in `n` trials.

        Raises:
            ValueError: no trials, or successes outside 0..n.
        """
        low, high = wilson(successes, n)
        return cls(successes / n, int(n), low, high)

    @classmethod
    def over(cls, hits: NDArray[np.bool_]) -> Rate:
        """The share of True in `hits` `[n]`."""
        return cls.of(int(np.count_nonzero(hits)), len(hits))

    @property
    def successes(self) -> int:
        return round(self.value * self.n)

    def as_dict(self) -> dict[str, float | int]:
        """As `results.json` and `history.jsonl` hold an attack's success (docs/formats.md)."""
        return {"asr": self.value, "n": self.n, "low": self.low, "high": self.high}


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Lower and upper end of the Wilson score interval for `successes` of `n` trials, within 0..1.

    Raises:
        ValueError: no trials, or successes outside 0..n.
    """
    if n < 1:
        raise ValueError("a rate over no trials: nothing was measured")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    share, weight = successes / n, z * z / n
    center = share + weight / 2
    spread = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # Rounding must not push an end past the share, which lies inside (and is the end itself at 0 and n).
    low = min(share, max(0.0, (center - spread) / (1 + weight)))
    high = max(share, min(1.0, (center + spread) / (1 + weight)))
    return low, high
