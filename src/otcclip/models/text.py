"""The text tower without its padding.

A caption of 12 tokens in a context of 77 costs 77. Attention is causal and the pooled state is the end token's, so
positions after the end token never matter: captions are sorted by length, cut into a few groups, and each group runs
only as long as its longest caption. `tests/models` holds this equal to open_clip's own `encode_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from open_clip.model import CLIP
from torch import Tensor

GROUPS = 3
MIN_GROUP = 32


@dataclass(frozen=True)
class TextStates:
    """`pooled [n, d]`; `tokens [total, d]` packed with `offsets [n + 1]`, both before normalisation."""

    pooled: Tensor
    tokens: Tensor
    offsets: Tensor


def text_states(clip: CLIP, tokens: Tensor) -> TextStates:
    """Joint-space states of `tokens [n, context]` (int64, zero-padded, end token the largest id)."""
    end = tokens.argmax(dim=-1)
    groups = max(1, min(GROUPS, len(tokens) // MIN_GROUP))
    order = torch.argsort(end, stable=True)
    pooled, packed, sizes, owner = [], [], [], []
    chunks = order.chunk(groups)
    for rows, words in zip(chunks, _embed(clip, tokens, end, chunks), strict=True):
        last = end[rows]
        states = _states(clip, words)
        own = states[torch.arange(len(rows), device=states.device), last]
        position = torch.arange(states.shape[1], device=states.device)
        real = (position > 0) & (position < last[:, None])
        # An empty caption has no real token: its end state stands in, so that no set is empty.
        real[last <= 1] = position == last[last <= 1][:, None]
        pooled.append(own)
        packed.append(states[real])
        sizes.append(real.sum(1))
        owner.append(rows)
    return _restore(torch.cat(pooled), torch.cat(packed), torch.cat(sizes), torch.cat(owner))


def _embed(clip: CLIP, tokens: Tensor, end: Tensor, chunks: Sequence[Tensor]) -> list[Tensor]:
    """Word vectors `[rows, length, width]` of each group up to its longest caption.

    One lookup for all groups: each lookup's backward pass fills and adds a gradient as large as the vocabulary, which
    with three of them was a fifteenth of a step of the tiny model.
    """
    cut = [tokens[rows, : int(end[rows].max()) + 1] for rows in chunks]
    words = clip.token_embedding(torch.cat([group.flatten() for group in cut]))
    parts = words.split([group.numel() for group in cut])
    return [part.view(*group.shape, -1) for part, group in zip(parts, cut, strict=True)]


def _states(clip: CLIP, words: Tensor) -> Tensor:
    length = words.shape[1]
    x = words + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)
    projection = clip.text_projection
    return projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection  # type: ignore[no-any-return]


def _restore(pooled: Tensor, packed: Tensor, sizes: Tensor, owner: Tensor) -> TextStates:
    """From length order back to the caller's order."""
    inverse = torch.argsort(owner)
    starts = torch.cumsum(sizes, 0) - sizes
    size, start = sizes[inverse], starts[inverse]
    offsets = torch.cat([size.new_zeros(1), torch.cumsum(size, 0)])
    within = torch.arange(len(packed), device=packed.device) - torch.repeat_interleave(offsets[:-1], size)
    return TextStates(pooled[inverse], packed[torch.repeat_interleave(start, size) + within], offsets)
