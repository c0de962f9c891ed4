"""`otcclip corpus emoji`."""

from __future__ import annotations

from pathlib import Path


def corpus_emoji(out: Path = Path("corpora/emoji"), hold_out: str = "twemoji") -> None:
    """Build the emoji corpus: ten styles from their npm packages, as WebDataset shards.

    Args:
        out: folder to build it in; a complete corpus there is reused.
        hold_out: style of the default test split.
    """
    from otcclip.data.emoji import build_emoji

    corpus = build_emoji(out, hold_out=hold_out)
    print(corpus)
