"""Three positions of every token, in time, height and width.

Text advances all three by one. The h x w tokens of an image, or of one frame of a video, share the time p at which they
begin and count rows and columns from there; what follows begins at p + max(h, w). So after images the positions are behind
the number of tokens, by an offset that belongs to the conversation: `Cache.rope_delta`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.vision_inputs import IMAGE, NAMES, TEXT, VIDEO, VisualInputs
from qwen35moe.ops.vision_grid import Grids


def positions(
    types: Tensor, visual: VisualInputs, merge: int, *, mask: Tensor | None = None, before: Sequence[int] | None = None,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """([3, B, T] positions of the new tokens, [B] the position after the last one of each row).

    types [B, T]; mask [B, T] (padding does not count, its positions are 0); before: the first position of each row;
    bounds: of the packed documents of one row, each of which is placed as a row of its own.
    """
    if bounds is not None:
        documents = [types[:, start:end] for start, end in pairwise(bounds)]
        longest = max(part.shape[1] for part in documents)
        rows = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in documents])
        lengths = torch.tensor([part.shape[1] for part in documents], device=types.device)
        valid = torch.arange(longest, device=types.device) < lengths[:, None]
        of_rows, after = positions(rows, visual, merge, mask=valid, before=before)
        return of_rows[:, valid][:, None], after
    frames = [(1, h, w) for t, h, w in visual.grids(VIDEO, merge) for _ in range(t)]  # timestamps stand between them
    items = {IMAGE: _token_grids(visual.grids(IMAGE, merge), merge), VIDEO: _token_grids(frames, merge)}
    present = torch.ones_like(types, dtype=torch.bool) if mask is None else mask.bool()
    placed = torch.zeros(3, *types.shape, dtype=torch.long, device="cpu")
    after = []
    for row in range(types.shape[0]):
        columns = present[row].cpu()
        placed[:, row, columns], following = _row(types[row].cpu()[columns].tolist(), items, before[row] if before else 0)
        after.append(following)
    return placed.to(types.device), torch.tensor(after, device=types.device)


def next_positions(layout: TokenLayout, before: Tensor) -> Tensor:
    """[B] the position after the last one of each row; a row without a new token stays at `before` [B]."""
    largest = layout.position_ids.amax(0)
    if layout.valid is not None:
        largest = largest.masked_fill(~layout.valid, -1)
    last = largest.amax(1)
    return torch.where(last < 0, before, last + 1)


def _token_grids(grids: Grids, merge: int) -> Iterator[tuple[int, int, int]]:
    """(t, h, w) in tokens of each image, and of each frame of a video."""
    for t, h, w in grids:
        yield t, h // merge, w // merge


def _row(types: list[int], items: dict[int, Iterator[tuple[int, int, int]]], start: int) -> tuple[Tensor, int]:
    """Positions [3, tokens] of one row's tokens from `start` on, and the next position."""
    parts, i, p = [torch.zeros(3, 0, dtype=torch.long, device="cpu")], 0, start
    while i < len(types):
        if types[i] == TEXT:
            end = next((j for j in range(i, len(types)) if types[j] != TEXT), len(types))
            parts.append((p + torch.arange(end - i, device="cpu")).expand(3, -1))
            p, i = p + end - i, end
            continue
        t, h, w = next(items[types[i]])
        if len(set(types[i : i + t * h * w])) > 1 or i + t * h * w > len(types):
            raise ValueError(
                f"the next {NAMES[types[i]]} (or frame) makes {t * h * w} tokens ({t} x {h} x {w}) and does not fit the "
                f"placeholders from token {i} of its row: are the images and videos in the order of their rows?"
            )
        grid = torch.meshgrid(*(torch.arange(size, device="cpu") for size in (t, h, w)), indexing="ij")
        parts.append(p + torch.stack(grid).flatten(1))
        p, i = p + max(h, w), i + t * h * w
    return torch.cat(parts, dim=1), p
