"""Do an image's look-alikes carry captions like its own? Evidence that no caption can touch, as a p-value.

For a pair (i, c) under one view, the `k` nearest images of i vote: A(i, c') = sum_j w_ij agreement(c', c_j) for every
caption c' of the pool, and the pair's own caption gets the *share of the pool that agrees at least as well*,
r(i) in (0, 1]. The worst view counts. For a caption that has nothing to do with its image r is uniform in one view, and
larger in the worst of thirteen: how large is seen from captions drawn by lot, and that makes a p-value of it
(`votes.p_value`), which needs no labels (`evidence.trust` decides by it).

Five rules keep an enemy from voting for himself:

* near-duplicates of the image do not vote on it (copies of one photo would agree with each other), nor do altered
  copies with like claims where they are more than usual, and such a crowd is judged as one (`evidence.crowds`);
* a caption's voters share one vote, w_ij / count(c_j): a caption gains nothing by being repeated (on the whole
  image alone it takes the patch pairs trusted at .02 from 60 to 34 of 90, `recipes/evidence_probe.py`); and so do
  the copies of one picture where they are a crowd;
* a claim made m times (near-duplicate images under one caption) is held to alpha / m: m copies are m tries;
* where nearly all look-alikes make the pair's claim in every view, those are asked who do not (`evidence.circles`);
* the *worst* view counts: the vote must hold without any one window, in the low, the high and the finest band.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.evidence.captions import LIKE, caption_agreement
from otcclip.evidence.circles import Circles
from otcclip.evidence.copies import CANDIDATES, copies
from otcclip.evidence.crowds import crowds, heard_outside, kin, members
from otcclip.evidence.descriptors import descriptors, views
from otcclip.evidence.trust import unusually_often
from otcclip.evidence.votes import ROWS, SHARPNESS, drawn, nearest, ranks
from otcclip.evidence.words import doubtful, same_claim, unheard, words_of

NEIGHBOURS = 16
NEAR_DUPLICATE = 0.95

# Pairs (row within the tile, image), a tile of ROWS images at a time.
Twins = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evidence:
    """What look-alikes say of `n` pairs.

    Attributes:
        own: `[n]` share of the pool's captions that the look-alikes like at least as well as the pair's own,
            in the worst view; small = believed.
        by_chance: `[m]`, the same of captions drawn by lot, ascending: what is seen where caption and image have
            nothing to do with each other.
        encircled: `[n]` bool, pairs whose claim nearly all look-alikes make in every view (`evidence.circles`).
        outside: `[n]` as `own`, of those who do not make the claim; 0 for who is neither encircled nor under a caption
            that stands under unusually many pairs.
        copies: `[n]` int64, pairs that make the same claim, itself included: near-duplicate images under one caption.
        crowded: `[n]` bool, pairs with more copies than is usual (`evidence.crowds`).
        verdict: `[n]` how the crowd of each pair fares outside of it (`crowds.heard_outside`); 0 for who is in none.
        voters: `[v, n, k]` int32, look-alikes in each view, nearest first, near-duplicates left out.
        weight: `[v, n, k]`, what the vote of each weighs.
        by_view: `[v, n]`, `own` in each view.
        vectors: `[n, d]` bfloat16, the whole images' descriptors.
        agreement: `[u, u]` of the captions (`evidence.captions`).
        words: `[u, l]` of the captions, and unheard: `[n, l]` bool, those that say much and that in some view no
            look-alike uses (`evidence.words`).
        doubtful: `[n]` bool, pairs that use a word so that hardly anybody who sees the like would (`words.doubtful`).
    """

    own: Tensor
    by_chance: Tensor
    encircled: Tensor
    outside: Tensor
    copies: Tensor
    crowded: Tensor
    verdict: Tensor
    voters: Tensor
    weight: Tensor
    by_view: Tensor
    vectors: Tensor
    agreement: Tensor
    words: Tensor
    unheard: Tensor
    doubtful: Tensor

    @property
    def votes(self) -> Tensor:
        """`[n, k]` int64, look-alikes of the whole image."""
        return self.voters[0].long()


def neighbour_evidence(
    images: Tensor | ImageSource, tokens: Tensor, caption_of: Tensor, *, share_voice: bool = True
) -> Evidence:
    """Evidence for pairs `(images[i], caption_of[i])`.

    Args:
        images: `[n, 3, H, W]` uint8.
        tokens: `[u, context]` int64, distinct captions.
        caption_of: `[n]` int64 into `tokens`.
        share_voice: whether voters under one caption share one vote; off only to measure what the rule is worth.
    """
    agreement = torch.from_numpy(caption_agreement(tokens))
    voice = torch.ones(len(caption_of))
    claims: _Claims | None = None
    asked = torch.cat([caption_of[:, None], drawn(len(caption_of), len(tokens))], dim=1)
    words, much = words_of(tokens)
    claim = same_claim(agreement, words, much)
    lacking = torch.zeros(len(caption_of), words.shape[1], dtype=torch.bool)
    shares, voters, weights, whole = [], [], [], None
    worst = torch.zeros(asked.shape)
    for _, vectors in descriptors(images, views()):
        if claims is None:
            claims = _claims(images, vectors, caption_of, agreement, claim)
            if share_voice:
                voice /= torch.bincount(caption_of)[caption_of] * torch.where(claims.crowded, claims.shown, 1)
        similarity, index = look_alikes(vectors, claims.twins)
        weight = torch.softmax(similarity / SHARPNESS, dim=1) * voice[index]
        lacking |= unheard(words, much, caption_of, index)
        share = ranks(weight, caption_of[index], asked, agreement)
        shares.append(share[:, 0])
        worst = torch.maximum(worst, share)
        claims.circles.look(vectors, index, voice)
        voters.append(index.int())
        weights.append(weight)
        whole = vectors if whole is None else whole
    assert claims is not None and whole is not None
    votes, weight = torch.stack(voters), torch.stack(weights)
    verdict = heard_outside(claims.crowd, votes, weight, caption_of, agreement)
    dubious = doubtful(words, much, caption_of, lacking, votes)
    circles = (claims.circles.inside(), claims.circles.outside())
    made = (worst[:, 0], worst[:, 1:].flatten().sort().values, *circles, claims.copies, claims.crowded, verdict)
    return Evidence(*made, votes, weight, torch.stack(shares), whole, agreement, words, lacking, dubious)


@dataclass(frozen=True)
class _Claims:
    """Who makes whose claim: `twins`, who has no vote on whom, near-duplicates and crowded copies; `copies [n]` and
    `crowded [n]` of `Evidence`; `shown [n]`, how often each picture is there; `crowd [n, n]` of `crowds.members`; and
    who of those that may vote all make one claim."""

    twins: Twins
    copies: Tensor
    crowded: Tensor
    shown: Tensor
    crowd: sparse.csr_array
    circles: Circles


def _claims(
    images: Tensor | ImageSource, vectors: Tensor, caption_of: Tensor, agreement: Tensor, claim: Tensor
) -> _Claims:
    """Near-duplicates and altered copies of images with the whole images' descriptors `vectors [n, d]`."""
    size = len(vectors)
    twins, alike = near_duplicates(vectors, CANDIDATES)
    row, image = (torch.cat(part) for part in zip(*((r + t * ROWS, i) for t, (r, i) in enumerate(twins)), strict=True))
    asked = one, other, lie = copies(images, *alike, caption_of, agreement)
    once = row < image
    like = once & (agreement[caption_of[row], caption_of[image]] >= LIKE)
    a, b = torch.cat([one[lie], row[like]]), torch.cat([other[lie], image[like]])
    shown, crowded = crowds(size, a, b)
    near = once & (crowded[row] | crowded[image])
    near[near.clone()] = claim[caption_of[row[near]], caption_of[image[near]]]
    others = kin(images, crowded, alike, asked, caption_of, claim)
    crowd = members(crowded, *(torch.cat(part) for part in zip((a, b), (row[near], image[near]), others, strict=True)))
    among = crowded[a] & crowded[b]
    row_all, image_all = torch.cat([row, a[among], b[among]]), torch.cat([image, b[among], a[among]])
    entries = np.ones(len(row_all), bool), (row_all.numpy(), image_all.numpy())
    silent = sparse.coo_array(entries, shape=(size, size)).tocsr()
    often = unusually_often(torch.ones(size, dtype=torch.bool), caption_of)
    circles = Circles(silent, caption_of, claim, agreement, asked=often)
    return _Claims(
        _tiled(row_all, image_all, size), _same_claim(row, image, caption_of), crowded, shown, crowd, circles
    )


def _tiled(row: Tensor, image: Tensor, size: int) -> Twins:
    """Pairs `(row, image)` as `near_duplicates` gives them, each once."""
    code = (row * size + image).unique()
    row, image = code // size, code % size
    tile = row // ROWS
    return [(row[tile == t] - t * ROWS, image[tile == t]) for t in range(-(-size // ROWS))]


def near_duplicates(vectors: Tensor, k: int) -> tuple[Twins, tuple[Tensor, Tensor]]:
    """Pairs `(row within the tile, image)` of near-duplicates, itself included, a tile of ROWS images at a time; and
    `look_alikes` without these, for which the images are compared already."""
    twins, found = [], []
    for start in range(0, len(vectors), ROWS):
        similarity = vectors[start : start + ROWS] @ vectors.T
        close = similarity > NEAR_DUPLICATE
        own = torch.arange(len(similarity))
        close[own, own + start] = True
        row, image = close.nonzero(as_tuple=True)
        twins.append((row, image))
        found.append(nearest(similarity, row, image, k))
    similarities, indices = zip(*found, strict=True)
    return twins, (torch.cat(similarities), torch.cat(indices))


def _same_claim(row: Tensor, image: Tensor, caption_of: Tensor) -> Tensor:
    """For each pair, how many of its near-duplicates `(row, image)` carry its very caption, itself included."""
    same = caption_of[row] == caption_of[image]
    return torch.bincount(row[same], minlength=len(caption_of))


def look_alikes(vectors: Tensor, twins: Twins, k: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Similarities and indices `[n, k]` of the nearest images, nearest first; `twins` (`near_duplicates`) left out.

    Fewer columns where there are fewer images.
    """
    tiles = zip(vectors.split(ROWS), twins, strict=True)
    similarities, indices = zip(*(nearest(tile @ vectors.T, *left_out, k) for tile, left_out in tiles), strict=True)
    return torch.cat(similarities), torch.cat(indices)
