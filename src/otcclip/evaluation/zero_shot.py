"""Zero-shot classification: an image is called by the class whose prompt embedding is nearest.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv
2103.00020, section 3.1. A class embedding is the mean over templates of unit prompt embeddings, made unit
again (3.1.4), as in `open_clip.build_zero_shot_classifier`. That function is not used: it wants a model with
`encode_text(tokens, normalize=True)` and a tokenizer, where this room sees features only and the caller's
encoder may cache its tokens; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from otcclip.evaluation.intervals import Rate

NAME_ONLY = ("{}",)


@dataclass(frozen=True)
class ZeroShot:
    """What zero-shot classification said of `n` images.

    Attributes:
        top1, top5: shares in 0..1 of images whose class is the nearest, or among the five nearest.
        n: number of images.
        predictions: `[n]` int64, the nearest class.
        confidence: `[n]` float32 in 0..1, the softmax share of the prediction.
        ranks: `[n]` int64, number of classes placed before the true one (0: right).
    """

    top1: float
    top5: float
    n: int
    predictions: NDArray[np.int64]
    confidence: NDArray[np.float32]
    ranks: NDArray[np.int64]

    def rate(self, k: int = 1) -> Rate:
        """Top-`k` accuracy with its interval."""
        return Rate.over(self.ranks < k)


@torch.no_grad()
def zero_shot(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | NDArray[np.int64] | Sequence[int],
    logit_scale: float = 100.0,
    batch: int = 1024,
) -> ZeroShot:
    """Classify `image_features` `[n, d]` by the class embeddings `text_features` `[C, d]`.

    Neither need be unit. `labels` `[n]` holds the true class of each image. Of classes at the same similarity
    the first comes first, in predictions and ranks alike. `logit_scale` (CLIP's, at most 100) shapes
    `confidence` alone.

    Raises:
        ValueError: shapes that don't fit, a label outside 0..C-1, or features that are not finite (a model
            that diverged would else count as right everywhere).
    """
    truth = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    images, classes = image_features.detach().float().cpu(), text_features.detach().float().cpu()
    n, count = len(images), len(classes)
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1] or truth.shape != (n,):
        raise ValueError(
            f"zero-shot: images {tuple(images.shape)}, classes {tuple(classes.shape)}, labels {tuple(truth.shape)}"
        )
    if n == 0 or int(truth.min()) < 0 or int(truth.max()) >= count:
        raise ValueError(f"zero-shot: needs images with labels in 0..{count - 1}")
    if not (torch.isfinite(images).all() and torch.isfinite(classes).all()):
        raise ValueError("zero-shot: features are not finite")
    images, classes = F.normalize(images, dim=-1), F.normalize(classes, dim=-1)

    predictions, confidence, ranks = [], [], []
    place = torch.arange(count)
    for start in range(0, n, batch):
        true = truth[start : start + batch, None]
        scores = images[start : start + batch] @ classes.T
        own = scores.gather(1, true)
        before = (scores > own) | ((scores == own) & (place < true))
        # argmax takes the first of equal scores.
        best = scores.argmax(1)
        predictions.append(best)
        ranks.append(before.sum(1))
        confidence.append((logit_scale * scores).softmax(1).gather(1, best[:, None])[:, 0])
    rank = torch.cat(ranks).numpy()
    return ZeroShot(
        top1=float((rank < 1).mean()),
        top5=float((rank < 5).mean()),
        n=n,
        predictions=torch.cat(predictions).numpy(),
        confidence=torch.cat(confidence).numpy(),
        ranks=rank,
    )


@torch.no_grad()
def class_embeddings(
    encode_text: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str] = NAME_ONLY,
    batch: int = 256,
) -> Tensor:
    """Unit class embeddings `[C, d]` float32: the mean of each name's unit prompt embeddings, made unit.

    `encode_text` maps `m` texts to `[m, d]` features. In a template `{}` stands for the name; the default is
    the name itself, as for emoji. `open_clip.OPENAI_IMAGENET_TEMPLATES` are functions: pass `[t("{}") for t
    in ...]`.

    Raises:
        ValueError: no names, no templates, or a template without `{}`.
    """
    if not names or not templates or any("{}" not in template for template in templates):
        raise ValueError("class embeddings need names, and templates that hold {}")
    # replace, not format: other braces in a template stand for themselves.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = torch.cat([encode_text(prompts[i : i + batch]).detach().float() for i in range(0, len(prompts), batch)])
    per_class = F.normalize(features, dim=-1).reshape(len(names), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)
