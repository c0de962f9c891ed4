"""The corpus's card, for people (card.md) and for code (card.json): packages, versions, licences, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from otcclip.data.emoji_icons import Drawing, read_json
from otcclip.data.emoji_spec import PLAIN_EXCLUDES, RENDER_SIZE, EmojiSpec, Package

CORPUS = "otcclip-emoji"


def count(drawings: Sequence[Drawing]) -> dict[str, int]:
    """Pairs and names, with and without flags and symbols, under the field names of `EmojiSpec`."""
    plain = [drawing for drawing in drawings if drawing.emoji.group not in PLAIN_EXCLUDES]
    return {
        "pairs": len(drawings),
        "names": len({drawing.emoji.name for drawing in drawings}),
        "plain_pairs": len(plain),
        "plain_names": len({drawing.emoji.name for drawing in plain}),
    }


def make_card(
    spec: EmojiSpec,
    node_modules: Path,
    manifests: Mapping[str, Mapping[str, Any]],
    drawings: Sequence[Drawing],
    shards: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The card as JSON: what the corpus is, from which packages, with which counts and shards."""
    styles = Counter(drawing.style for drawing in drawings)
    return {
        "corpus": CORPUS,
        "version": spec.version,
        "image_size": RENDER_SIZE,
        "counts": count(drawings),
        "styles": dict(sorted(styles.items())),
        "groups": dict(sorted(Counter(drawing.emoji.group for drawing in drawings).items())),
        "packages": [_package(package, node_modules, manifests[package.name], styles) for package in spec.packages],
        "shards": list(shards),
    }


def _package(package: Package, node_modules: Path, manifest: Mapping[str, Any], styles: Counter[str]) -> dict[str, Any]:
    """One row of the card; an icon set's own `info.json` knows licence and author better than npm."""
    info_file = node_modules / package.name / "info.json"
    info = read_json(info_file) if info_file.exists() else {}
    licence, author = info.get("license", {}), info.get("author", {})
    credit = ", ".join(filter(None, (author.get("name"), author.get("url")))) or package.credit
    return {
        "name": package.name,
        "version": package.version,
        "style": package.style,
        "pairs": styles[package.style] if package.style else 0,
        "licence": licence.get("spdx") or manifest.get("license", "unknown"),
        "licence_url": licence.get("url", ""),
        "credit": credit,
    }


def _row(package: Mapping[str, Any]) -> str:
    licence = package["licence"]
    cells = [
        package["name"],
        package["version"],
        package["style"] or "(names and tags)",
        str(package["pairs"] or ""),
        f"[{licence}]({package['licence_url']})" if package["licence_url"] else licence,
        package["credit"],
    ]
    return f"| {' | '.join(cells)} |"


def render_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    counts = card["counts"]
    rows = [_row(package) for package in card["packages"]]
    return "\n".join(
        [
            "# Emoji corpus",
            "",
            f"{counts['pairs']:,} image-caption pairs, {counts['names']:,} names, {len(card['styles'])} "
            f"styles; without {' and '.join(PLAIN_EXCLUDES)} {counts['plain_pairs']:,} pairs and "
            f"{counts['plain_names']:,} names.",
            f"Images are {card['image_size']} px PNG on white. A caption is the emoji's name and its tags: "
            "`polar bear | animal, arctic, ...`. The same caption recurs across styles.",
            "",
            "Built on this machine by `otcclip corpus emoji` from the npm packages below. The pictures "
            "are changed only by drawing them at this size on white. Each stays under its own licence: "
            "credit its authors, and pass pictures under a CC-BY-SA licence on under the same licence.",
            "",
            "| package | version | style | pairs | licence | credit |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Near-siblings, to be held out together: fluent3d and fluent-emoji-flat, noto and noto-v1.",
            "",
        ]
    )
