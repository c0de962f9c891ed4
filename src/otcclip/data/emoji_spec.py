"""What the emoji corpus is made of: packages at exact versions, and the counts that must come out."""

from __future__ import annotations

from dataclasses import dataclass

RENDER_SIZE = 64
"""Side of the stored images in pixels."""

PLAIN_EXCLUDES = ("symbols", "flags")
"""Groups left out of the reference task: letters in boxes and flags say little by their looks."""

DEFAULT_STYLE = "twemoji"
"""The style held out where nobody names one."""

NEAR_SIBLINGS = {
    "fluent3d": "fluent-emoji-flat",
    "fluent-emoji-flat": "fluent3d",
    "noto": "noto-v1",
    "noto-v1": "noto",
}
"""Styles from one hand: holding one out takes its sibling out of the training part as well."""


@dataclass(frozen=True)
class Package:
    """An npm package at an exact version; `style` if it has images, `credit` where its metadata has none."""

    name: str
    version: str
    style: str | None = None
    credit: str = ""


@dataclass(frozen=True)
class EmojiSpec:
    """A version of the corpus; `plain_*` count without `PLAIN_EXCLUDES`. A build that misses a count fails.

    Raise `version` whenever the same packages would give other pairs or other bytes: a folder of another
    version is rebuilt.
    """

    version: int
    packages: tuple[Package, ...]
    pairs: int
    names: int
    plain_pairs: int
    plain_names: int
    shard_pairs: int = 1000

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(sorted(package.style for package in self.packages if package.style))


NAMES_PACKAGE = "emojibase-data"
FLUENT_3D = "@lobehub/fluent-emoji-3d"


def _iconify(style: str, version: str) -> Package:
    return Package(f"@iconify-json/{style}", version, style)


EMOJI = EmojiSpec(
    version=1,
    packages=(
        Package(NAMES_PACKAGE, "17.0.0", credit="Miles Johnson, https://github.com/milesj/emojibase"),
        _iconify("noto", "1.2.9"),
        _iconify("noto-v1", "1.2.5"),
        _iconify("twemoji", "1.2.5"),
        _iconify("openmoji", "1.2.29"),
        _iconify("fluent-emoji-flat", "1.2.6"),
        _iconify("emojione", "1.2.3"),
        _iconify("emojione-v1", "1.2.3"),
        _iconify("fxemoji", "1.2.2"),
        _iconify("streamline-emojis", "1.2.4"),
        Package(
            FLUENT_3D,
            "1.1.0",
            "fluent3d",
            "Microsoft Corporation, https://github.com/microsoft/fluentui-emoji, packaged by LobeHub",
        ),
    ),
    pairs=12_971,
    names=1_914,
    plain_pairs=10_394,
    plain_names=1_420,
)
