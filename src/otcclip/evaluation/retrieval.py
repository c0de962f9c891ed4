"""Image-text retrieval: recall at k, both directions.

R@k is the share of queries with at least one right answer among their k best (as Karpathy and Fei-Fei, "Deep
Visual-Semantic Alignments", CVPR 2015, section 4.1, and clip_benchmark). Two things differ from common code:
a text that reads exactly as one of the image's own is a right answer too (captions recur in the emoji
corpus), and a wrong answer at the same similarity as the right one is placed before it, so that a collapsed
model does not score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from otcclip.evaluation.intervals import Rate


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1 and 5: `text` given an image, `image` given a text."""

    text_at_1: Rate
    text_at_5: Rate
    image_at_1: Rate
    image_at_5: Rate


@torch.no_grad()
def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    captions: Sequence[str] | None = None,
    image_of_text: Sequence[int] | NDArray[np.int64] | None = None,
    batch: int = 512,
) -> Retrieval:
    """Recall of `text_features` `[m, d]` by `image_features` `[n, d]` and back; neither need be unit.

    `captions` (`m` texts): equal ones are interchangeable; None treats all as different. `image_of_text`
    (`[m]`): which image each text belongs to (COCO has five texts an image); None: text i belongs to image i,
    m = n.

    Raises:
        ValueError: lengths that don't fit, an image without a text, or features that are not finite.
    """
    images, texts = (f.detach().float().cpu() for f in (image_features, text_features))
    n, m = len(images), len(texts)
    owner = np.arange(m) if image_of_text is None else np.asarray(image_of_text, dtype=np.int64)
    if (captions is not None and len(captions) != m) or owner.shape != (m,) or m == 0:
        raise ValueError(f"retrieval: {n} images, {m} texts, {len(owner)} owners, or captions that don't fit")
    if set(owner.tolist()) != set(range(n)):
        raise ValueError(f"retrieval: each of the {n} images needs a text of its own, and each text an image")
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise ValueError("retrieval: features are not finite")
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    wording = (
        np.arange(m) if captions is None else np.unique(np.asarray(captions, dtype=object), return_inverse=True)[1]
    )
    one = np.ones(m, dtype=np.int64)
    reads = csr_matrix((one, (np.arange(m), wording)), shape=(m, m))
    owns = csr_matrix((one, (owner, wording)), shape=(n, m))
    to_text = _ranks(images, texts, owns, reads, batch)
    to_image = _ranks(texts, images, reads, owns, batch)
    return Retrieval(
        text_at_1=Rate.over(to_text < 1),
        text_at_5=Rate.over(to_text < 5),
        image_at_1=Rate.over(to_image < 1),
        image_at_5=Rate.over(to_image < 5),
    )


def _ranks(queries: Tensor, answers: Tensor, asked: csr_matrix, held: csr_matrix, batch: int) -> NDArray[np.int64]:
    """For each query, how many wrong answers come before or level with its best right one.

    An answer is right where it holds a wording that the query asks for.
    """
    ranks = []
    for start in range(0, len(queries), batch):
        scores = queries[start : start + batch] @ answers.T
        right = torch.from_numpy((asked[start : start + batch] @ held.T).toarray() > 0)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(1))
    return torch.cat(ranks).numpy()
