"""Fine-grained alignment: contrastive on -OT_eps between patches and tokens (METHOD section 2.4).

A full b x b matrix of transport problems would cost more than the towers do. The loss keeps, for every image, its own
caption and the captions that the pooled vectors find hardest to tell from it; the rest contributes next to nothing to a
softmax. The gradient is the transport plan itself (envelope theorem).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.evidence.matching import candidate_costs
from otcclip.models.two_tower import Features


def ot_alignment_loss(
    image: Features, text: Features, caption: Tensor, *, negatives: int, temperature: float
) -> Tensor:
    """Cross-entropy of each image's own caption against its `negatives` hardest others, logits `-OT / temperature`.

    Args:
        image: `b` images. text: `u` distinct captions. caption: `[b]` int64, each image's caption in `text`.
        negatives: hard negatives an image (fewer where the batch has fewer captions).
        temperature: softmax temperature on OT costs, which lie in 0..2.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        cosine = image.pooled @ text.pooled.T
        cosine.scatter_(1, caption[:, None], float("-inf"))
        hard = cosine.topk(min(negatives, len(text.pooled) - 1), dim=1).indices
    columns = torch.cat([caption[:, None], hard], dim=1)
    logits = -candidate_costs(image, text, columns) / temperature
    return F.cross_entropy(logits, torch.zeros_like(caption))
