"""One defence a file: what a batch is paired with, and its loss. Adding one is one file and one entry below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from otcclip import registry
from otcclip.defenses.base import Defense
from otcclip.defenses.cleanclip import CleanCLIP
from otcclip.defenses.clip import Clip
from otcclip.defenses.otcclip import OTCClip
from otcclip.defenses.otcclip_paper import OTCClipPaper
from otcclip.defenses.par import PAR
from otcclip.defenses.roclip import RoCLIP
from otcclip.defenses.safeclip import SafeCLIP

DEFENSES: Mapping[str, type[Defense]] = registry.registry(
    "defence", (Clip, OTCClipPaper, OTCClip, RoCLIP, SafeCLIP, CleanCLIP, PAR)
)


def make(name: str, /, **options: Any) -> Defense:
    """A new defence by name.

    Raises:
        UserError: no such defence (the message lists them), or an option it does not take.
    """
    made: Defense = registry.make("defence", DEFENSES, name, **options)
    return made


__all__ = [
    "DEFENSES",
    "PAR",
    "CleanCLIP",
    "Clip",
    "Defense",
    "OTCClip",
    "OTCClipPaper",
    "RoCLIP",
    "SafeCLIP",
    "make",
]
