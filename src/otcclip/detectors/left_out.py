"""A map from images to captions that has never heard the claim it judges.

Kernel ridge regression from the reference's images to its captions' vectors, and for each pair fitted again without
everybody who makes a like claim (`evidence.captions.LIKE`), without near-duplicates of its image and its crowd: what
all others say about images must say something about this one. Who owns an image's look-alikes, by a trigger that fills
the picture, owns two witnesses; here his pairs are left out with the claim that they argue for. A true caption is
borne out by its like: without any cat the map still finds a cat among animals, if captions' vectors know that cats
are some. So it also tells of encoders that share no space whether an image and a caption belong together, and it may
be asked about a crowd.

Nothing is fitted anew in truth. With features F of the reference's images (Nystroem: the kernel at landmarks), in a
basis in which ridge regression's fitted values are F F'Y, targets Y and residuals E = Y - F F'Y, the fit without the
pairs S predicts for an image with features x

    x F'Y - x F_S' (I - F_S F_S')^-1 E_S,

the leave-one-out identity of least squares (Cook and Weisberg, "Residuals and Influence in Regression", 1982) for
groups. The caption's share is then that of the captions asked about which are at least as near, by cosine, to what is
predicted: uniform for a caption unrelated to its image, but one draw a *claim*: where a trigger moves all images of a
claim one way, they fare alike.

Constants: the kernel exp((cosine - 1) / WIDTH), RIDGE and LANDMARKS were taken for the smallest mean share over all
pairs of one poisoned corpus, no label asked (docs/experiments.md, E33).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from otcclip.data.keys import hash_keys
from otcclip.detectors.base import ROWS, PairFeatures, take_rows
from otcclip.detectors.claims import claims
from otcclip.detectors.matching import pool
from otcclip.detectors.poll import electorate, share_above
from otcclip.evidence.captions import LIKE, agreement_table

LANDMARKS = 2048
WIDTH = 0.3
RIDGE = 1.0
JITTER = 1e-3  # two landmarks may be one picture
TWINS = 256  # near-duplicates under other claims that are left out at most: a placeholder may have thousands


@dataclass(frozen=True)
class LeftOut:
    """What the others say of `n` pairs.

    Attributes:
        own: `[n]` in (0, 1], share of the captions asked about that are at least as near as the own one.
    """

    own: Tensor


def left_out(features: PairFeatures) -> LeftOut:
    """Ask the reference (computed once)."""
    return features.once("left out", lambda: features.known(left_out, take_rows) or _ask(features))


@dataclass(frozen=True)
class _Fit:
    """The map of a reference of `m` pairs, `l` landmarks, `t` numbers a caption and `a` captions asked about.

    Attributes:
        landmarks: `[l, d]` unit; image, text: the means that were taken out. basis: `[l, l]`, from kernel to features.
        seen: `[m, l]` features F; weights: `[l, t]`, F'Y; residual: `[m, t]`; asked: `[a, t]` unit.
        under: pairs by distinct caption, those under caption c at `under[start[c] : start[c + 1]]`.
    """

    landmarks: Tensor
    image: Tensor
    text: Tensor
    basis: Tensor
    seen: Tensor
    weights: Tensor
    residual: Tensor
    asked: Tensor
    under: Tensor
    start: Tensor

    def features(self, pooled: Tensor) -> Tensor:
        """`pooled [n, d]` -> `[n, l]`."""
        return _kernel(F.normalize(pooled.float() - self.image, dim=1), self.landmarks) @ self.basis

    def without(self, group: Tensor, x: Tensor) -> Tensor:
        """`[n, t]` what the map fitted without the pairs `group [s]` says of images with features `x [n, l]`."""
        seen = self.seen[group]
        if len(group) <= seen.shape[1]:
            unlearned: Tensor = torch.linalg.solve(torch.eye(len(group)) - seen @ seen.T, self.residual[group])
            return x @ self.weights - (x @ seen.T) @ unlearned
        # The same by weights, not by pairs: (I - F_S' F_S)^-1 (F'Y - F_S' Y_S), with Y_S = E_S + F_S F'Y.
        rest = torch.eye(seen.shape[1]) - seen.T @ seen
        told = seen.T @ (self.residual[group] + seen @ self.weights)
        weights: Tensor = torch.linalg.solve(rest, self.weights - told)
        return x @ weights


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return ((a @ b.T - 1) / WIDTH).exp()


def _fit(reference: PairFeatures) -> _Fit:
    def make() -> _Fit:
        kinds, said = torch.from_numpy(reference.kinds[1]), reference.text.pooled.float()
        captions = pool(reference).features.pooled.float()
        image, text = reference.image.pooled.float().mean(dim=0), captions.mean(dim=0)
        unit = F.normalize(reference.image.pooled.float() - image, dim=1)
        # By their keys' hashes: the same ones in whatever order the shards stand.
        landmarks = unit[torch.from_numpy(np.argsort(hash_keys(reference.keys), kind="stable")[:LANDMARKS])]
        kernel = _kernel(unit, landmarks)
        basis = _basis(kernel, _kernel(landmarks, landmarks))
        seen, target = kernel @ basis, said - text
        weights = seen.T @ target
        asked = F.normalize(captions[electorate(reference).asked] - text, dim=1)
        start = F.pad(torch.bincount(kinds, minlength=len(captions)).cumsum(0), (1, 0))
        under, residual = kinds.argsort(stable=True), target - seen @ weights
        return _Fit(landmarks, image, text, basis, seen, weights, residual, asked, under, start)

    return reference.once("map of images to captions", make)


def _basis(kernel: Tensor, among: Tensor) -> Tensor:
    """`[l, l]` B such that ridge regression on `kernel [m, l] B` is a product: the hat matrix is `(K B) (K B)'`.

    `among [l, l]` is the landmarks' kernel L L'. Features K L^-T have products that are the kernel's; R R' = their Gram
    matrix + r I, and B = L^-T R^-T.
    """
    unit = torch.eye(len(among), dtype=torch.float64)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(among.double() + JITTER * unit).T, unit, upper=True)
    features = kernel @ white.float()
    root = torch.linalg.cholesky((features.T @ features).double() + RIDGE * unit)
    basis: Tensor = torch.linalg.solve_triangular(root.T, white, upper=True, left=False)
    return basis.float()


def _ask(features: PairFeatures) -> LeftOut:
    fit, out = _fit(features.against), torch.empty(len(features))
    # Equal captions side by side: what makes a claim is left out once, not once in every block.
    for rows in torch.from_numpy(features.kinds[1]).argsort(stable=True).split(ROWS):
        predicted = F.normalize(_predicted(features, rows, fit), dim=1)
        own = F.normalize(features.text.pooled[rows].float() - fit.text, dim=1)
        # From 0 up, as votes are: what is compared there is compared to so many digits.
        out[rows] = share_above(1 + predicted @ fit.asked.T, 1 + (predicted * own).sum(dim=1))
    return LeftOut(out)


def _predicted(features: PairFeatures, rows: Tensor, fit: _Fit) -> Tensor:
    """`[r, t]` what is predicted for each of some pairs without those who make its claim."""
    x = fit.features(features.image.pooled[rows])
    out = torch.empty(len(rows), fit.weights.shape[1])
    kind = features.kinds[1][rows.numpy()]
    silent = claims(features).silent_to_encoder[rows.numpy()]
    kinds, of = np.unique(kind, return_inverse=True)
    first = np.unique(of, return_index=True)[1]
    agreed = agreement_table(features.words[rows.numpy()[first]], electorate(features.against).words)
    known = features.kind_there[rows[torch.from_numpy(first)]].numpy()
    agreed[known >= 0, known[known >= 0]] = 1.0  # a caption without a word agrees with nobody, itself too
    for c in range(len(kinds)):
        like = _group(agreed[c], fit)
        together = []
        for i in np.flatnonzero(of == c).tolist():
            more = np.setdiff1d(silent.indices[silent.indptr[i] : silent.indptr[i + 1]], like.numpy())
            if len(more):
                out[i] = fit.without(torch.cat([like, torch.from_numpy(more[:TWINS]).long()]), x[i : i + 1])[0]
            else:
                together.append(i)
        if together:
            out[together] = fit.without(like, x[together])
    return out


def _group(agreed: NDArray[np.float32], fit: _Fit) -> Tensor:
    """`[s]` the pairs of the reference whose captions say nearly what one does, which agrees `agreed [u]` with each."""
    spans = [fit.under[fit.start[c] : fit.start[c + 1]] for c in np.flatnonzero(agreed >= LIKE).tolist()]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
