"""Attack success rates (METHOD section 6).

An attack's plan names the test images it is judged on and what each is to be called (`attacks.Trial`: a backdoor's
leaves out images of the target class); the rate is the share of a trial that came true. Print that of a model never
poisoned beside it: a class may be over-predicted without any attack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from otcclip.evaluation.intervals import Rate

Classes = NDArray[np.int64] | Sequence[int]


def targeted_success(predictions: Classes, adversarial: Classes) -> Rate:
    """Share of distinct target images whose top-1 is the class their poison argued for.

    `predictions[i]` is what image i is called, `adversarial[i]` what it was to be called: `[m]` each, an
    image once however many poisoned copies it had in training. Serves any `attacks.Trial`.

    Raises:
        ValueError: lengths differ, or there are none.
    """
    said, wanted = _columns(predictions, adversarial)
    return Rate.over(said == wanted)


def _columns(one: Classes, other: Classes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    a, b = np.asarray(one), np.asarray(other)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two columns of one length, got {a.shape} and {b.shape}")
    return a, b
