"""Whose pictures the page shows. The emoji sets ask to be named wherever their drawings are."""

from __future__ import annotations

from collections.abc import Mapping

from otcclip.report.words import clean

# As the packages' own info.json says (shared by every report of the default corpus).
EMOJI = (
    "Noto Emoji and Noto Emoji v1 (Google, Apache-2.0)",
    "Twemoji (Twitter, CC-BY-4.0)",
    "OpenMoji (CC-BY-SA-4.0)",
    "Fluent Emoji, flat and 3D (Microsoft, MIT)",
    "EmojiTwo, formerly Emoji One 2 (CC-BY-4.0)",
    "Emoji One v1 (JoyPixels, CC-BY-SA-4.0)",
    "FxEmojis (Mozilla, Apache-2.0)",
    "Streamline Emojis (CC-BY-4.0)",
    "names and tags: Emojibase (MIT)",
)


def licences(settings: Mapping[str, object]) -> list[str]:
    """What run.json says under `licences`, else what is known of the emoji corpus, else nothing."""
    given = settings.get("licences", settings.get("licenses"))
    if isinstance(given, Mapping):
        return [f"{clean(k, 80)}: {clean(v, 80)}" for k, v in given.items()]
    if isinstance(given, list) and given:
        return [clean(item, 160) for item in given]
    return list(EMOJI) if "emoji" in str(settings.get("corpus", "")).lower() else []
