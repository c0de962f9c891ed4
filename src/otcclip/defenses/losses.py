"""Contrastive losses that the defences share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def clip_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "u d"],
    caption: Int[Tensor, " b"],
    scale: Tensor,
    target: Float[Tensor, "u u"] | None = None,
) -> Tensor:
    """Multi-positive symmetric InfoNCE (Radford et al. 2021, figure 3) over distinct captions.

    Two pairs of a batch with the same caption are not negatives of each other. Captions are held once, so that

    * image to text is an ordinary cross-entropy over the `u` distinct captions, and
    * text to image averages, over every pair, `-log` of the share that the pair's caption gives to *all* its images
      (the sum sits inside the logarithm: a caption is explained when its images together win).

    With `b` distinct captions this equals CLIP's loss exactly.

    Args:
        image, text: unit vectors.
        caption: the row of `text` that belongs to each image.
        scale: inverse temperature.
        target: how right each caption is where another one belongs; row `c`, which sums to one, is the distribution
            that stands for caption `c`: an image is to find it, and from text to image an image counts for the
            captions in it, each of which asks for its own images. None: only a caption itself is right.

    Returns:
        A scalar.
    """
    logits = scale * image @ text.T
    to_text = F.cross_entropy(logits, caption if target is None else target[caption])
    positive = caption[:, None] == torch.arange(len(text), device=text.device)
    own = torch.logsumexp(logits.masked_fill(~positive, float("-inf")), dim=0)
    missed = torch.logsumexp(logits, dim=0) - own
    to_image = missed[caption] if target is None else (target[caption] * missed).sum(dim=1)
    return (to_text + to_image.mean()) / 2


def smoothed(target: Float[Tensor, "u u"], part: float) -> Float[Tensor, "u u"]:
    """Targets of which a `part` goes to all captions alike: label smoothing (Szegedy et al., "Rethinking the Inception
    Architecture for Computer Vision", 2016, section 7). In `clip_loss` it smooths what an image is called, and not
    whose image a caption is: that as well would cost a fifth of the accuracy (docs/experiments.md, E38).
    """
    return (1 - part) * target + part / len(target)


def view_loss(one: Float[Tensor, "b d"], two: Float[Tensor, "b d"], temperature: float) -> Tensor:
    """NT-Xent between two views of the same `b` things (Chen et al., SimCLR, 2020, equation 1).

    Args:
        one, two: unit vectors; row `i` of both comes from the same image or caption.
        temperature: softmax temperature.

    Returns:
        A scalar.
    """
    both = torch.cat([one, two])
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), float("-inf"))
    b = len(one)
    other = torch.arange(2 * b, device=both.device).roll(b)
    return F.cross_entropy(logits, other)


def partner_loss(
    one: Float[Tensor, "b d"], two: Float[Tensor, "b d"], scale: Tensor, of: Int[Tensor, " b"] | None = None
) -> Tensor:
    """CE(one, two): cross-entropy of each row's partner among all rows of `two` (Bansal et al., CleanCLIP, 2023).

    Args:
        one, two: unit vectors; row `i` of both comes from the same image or caption.
        scale: inverse temperature.
        of: which image or caption each row comes from; rows of the same one are not each other's negatives. Without
            it each comes from another one.

    Returns:
        A scalar.
    """
    own = torch.arange(len(one), device=one.device)
    logits = scale * one @ two.T
    if of is not None:
        again = (of[:, None] == of) & (own[:, None] != own)
        logits = logits.masked_fill(again, float("-inf"))
    return F.cross_entropy(logits, own)


def neighbour_loss(
    one: Float[Tensor, "b d"],
    two: Float[Tensor, "b d"],
    nearest_one: Float[Tensor, "b d"],
    nearest_two: Float[Tensor, "b d"],
    temperature: float,
) -> Tensor:
    """Each view's nearest neighbour in a pool is to find the other view among all (Dwibedi et al., NNCLR, 2021, eq. 2).

    `-log softmax_k(NN(one_i) . two_k / temperature)_i`, averaged over rows and over both directions.

    Args:
        one, two: unit vectors; row `i` of both comes from the same image or caption.
        nearest_one, nearest_two: their neighbours in the pool; constants.
        temperature: softmax temperature.

    Returns:
        A scalar.
    """
    own = torch.arange(len(one), device=one.device)
    there = F.cross_entropy(nearest_one @ two.T / temperature, own)
    back = F.cross_entropy(nearest_two @ one.T / temperature, own)
    return (there + back) / 2


def bounded_distance(now: Float[Tensor, "b d"], then: Float[Tensor, "b d"], bound: float) -> Tensor:
    """`l 1[l <= bound]` with `l = mean ||now - then||^2` (Singh, Croce and Hein, PAR, 2024).

    A reward: beyond the bound it is 0 and so is its gradient, so that features are driven away that far and no further.

    Args:
        now, then: unit vectors of the same things under two models.
        bound: tau, in squared distance: 0 (the same) to 4 (opposite).

    Returns:
        A scalar.
    """
    distance = (now - then).square().sum(dim=1).mean()
    return distance * (distance.detach() <= bound)
