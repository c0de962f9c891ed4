"""`otcclip corpus emoji | openclipart | fashion-mnist`."""

from __future__ import annotations

from pathlib import Path


def corpus_emoji(out: Path = Path("corpora/emoji"), hold_out: str = "twemoji") -> None:
    """Build the emoji corpus: ten styles from their npm packages, as WebDataset shards.

    Args:
        out: folder to build it in; a complete corpus there is reused.
        hold_out: style of the default test split.
    """
    from otcclip.data.emoji import build_emoji
    from otcclip.training.fleet import cores

    corpus = build_emoji(out, hold_out=hold_out, workers=cores())
    print(corpus)


def corpus_openclipart(out: Path = Path("corpora/openclipart"), root: Path | None = None) -> None:
    """Build the openclipart corpus: drawings and their titles, to measure models on (two Debian packages, 156 MB).

    Args:
        out: folder to build it in; a corpus there is reused. Best beside the emoji corpus, where bench looks for it.
        root: folder the packages are unpacked in, / where they are installed; downloaded with apt by default.
    """
    from otcclip.data.openclipart import build_openclipart

    print(f"{out}: {build_openclipart(out, root):,} pairs")


def corpus_fashion_mnist(out: Path = Path("corpora/fashion-mnist"), root: Path | None = None) -> None:
    """Get Fashion-MNIST, to measure models on (a Debian package, 31 MB).

    Args:
        out: folder to put it in; what is there is reused. Best beside the emoji corpus, where bench looks for it.
        root: folder the package is unpacked in, / where it is installed; downloaded with apt by default.
    """
    from otcclip.data.fashion_mnist import build_fashion_mnist

    print(build_fashion_mnist(out, root))
