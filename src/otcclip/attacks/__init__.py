"""Poison plans, one attack a file; every plan writes its ground truth.

attacks = [make("badnets", target="banana"), make("targeted")]
poisoned = poison(train, test, attacks, seed=0)
write_records("runs/demo/poison.parquet", poisoned.records)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from otcclip import registry
from otcclip.attacks.badclip import BadCLIP
from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import (
    Addition,
    Attack,
    PairIndex,
    PoisonContext,
    PoisonPlan,
    PoisonRecord,
    Replacement,
    Trial,
)
from otcclip.attacks.blended import Blended
from otcclip.attacks.clean_label import CleanLabel
from otcclip.attacks.colour_filter import ColourFilter
from otcclip.attacks.jittered import Jittered
from otcclip.attacks.label_swap import LabelSwap
from otcclip.attacks.low_ot import LowOT
from otcclip.attacks.mimicry import Mimicry
from otcclip.attacks.mixed_captions import MixedCaptions
from otcclip.attacks.multi import Multi
from otcclip.attacks.planting import Poisoned, apply_trigger, make_plans, poison
from otcclip.attacks.records import read_records, write_records
from otcclip.attacks.sig import Sig
from otcclip.attacks.surrogate import ModelSurrogate, Surrogate, distances, load_surrogate
from otcclip.attacks.targeted import Targeted
from otcclip.attacks.tiled import Tiled
from otcclip.attacks.wanet import WaNet

ATTACKS: Mapping[str, type[Any]] = registry.registry(
    "attack",
    (
        BadNets,
        Blended,
        Sig,
        WaNet,
        ColourFilter,
        CleanLabel,
        Multi,
        Targeted,
        LabelSwap,
        BadCLIP,
        # Adaptive: white-box on OTCCLIP.
        LowOT,
        Tiled,
        MixedCaptions,
        Mimicry,
        Jittered,
    ),
)


def make(name: str, /, **options: Any) -> Attack:
    """The attack registered as `name`, with its dataclass fields as options.

    Raises:
        UserError: an unknown name or option, or a value the attack refuses.
    """
    attack: Attack = registry.make("attack", ATTACKS, name, **options)
    return attack


__all__ = [
    "ATTACKS",
    "Addition",
    "Attack",
    "BadCLIP",
    "BadNets",
    "Blended",
    "CleanLabel",
    "ColourFilter",
    "Jittered",
    "LabelSwap",
    "LowOT",
    "Mimicry",
    "MixedCaptions",
    "ModelSurrogate",
    "Multi",
    "PairIndex",
    "PoisonContext",
    "PoisonPlan",
    "PoisonRecord",
    "Poisoned",
    "Replacement",
    "Sig",
    "Surrogate",
    "Targeted",
    "Tiled",
    "Trial",
    "WaNet",
    "apply_trigger",
    "distances",
    "load_surrogate",
    "make",
    "make_plans",
    "poison",
    "read_records",
    "write_records",
]
