"""Where the patches of images and video frames lie: their order, their coordinates, and a learned table brought to their grid.

A grid (t, h, w) counts patches: t frames of h rows and w columns (a frame of a video is a pair of pictures; an image has
t = 1). Patches come frame by frame, and within a frame in squares of m x m that will be merged into one token: the
squares row by row, and the patches of a square row by row. `Grids` is a list of such triples.

The tower is that of Bai et al. 2025, "Qwen3-VL Technical Report".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Grids = Sequence[tuple[int, int, int]]

THETA = 10_000.0  # base of the tower's rotation, in every published model


def as_grids(grid_thw: Tensor, merge: int, what: str = "grid_thw") -> list[tuple[int, int, int]]:
    """A processor's tensor [items, 3] as triples. ValueError unless every side is positive and divides by `merge`."""
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] < 1 or grid_thw.is_floating_point():
        given = f"{list(grid_thw.shape)} {grid_thw.dtype}"
        raise ValueError(f"{what} is integers [items, 3] (frames, rows, columns of patches), one item at least; got {given}")
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(f"{what} holds ({t}, {h}, {w}): rows and columns are positive multiples of {merge}, frames >= 1")
    return grids


def tokens_of(grids: Grids, merge: int) -> list[int]:
    """How many tokens each item becomes: t h w / m^2."""
    return [t * h * w // merge**2 for t, h, w in grids]


def frame_bounds(grids: Grids, device: torch.device | str = "cpu") -> Tensor:
    """[frames + 1] int32: where each frame begins among the patches; no patch sees another frame."""
    return torch.tensor([0, *accumulate(h * w for t, h, w in grids for _ in range(t))], dtype=torch.int32, device=device)


def coordinates(grids: Grids, merge: int, device: torch.device | str = "cpu") -> Tensor:
    """[2, patches]: row and column of every patch in its frame, in the order of the patches."""
    parts = []
    for t, h, w in grids:
        rows = torch.arange(h, device=device).view(h // merge, 1, merge, 1).expand(-1, w // merge, -1, merge)
        columns = torch.arange(w, device=device).view(1, w // merge, 1, merge).expand(h // merge, -1, merge, -1)
        parts.append(torch.stack([rows.flatten(), columns.flatten()]).repeat(1, t))
    return torch.cat(parts, dim=1)


def rotation(coordinates: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [1, patches, head_dim / 2]: the first half of the pairs turns with the row, the second with the column.

    angle = position * theta^(-2 j / (head_dim / 2)) for j = 0 ... head_dim / 4 - 1.
    """
    steps = torch.arange(0, head_dim // 2, 2, dtype=dtype, device=coordinates.device)
    frequencies = THETA ** (-steps / (head_dim // 2))
    angle = (coordinates.to(dtype)[..., None] * frequencies).transpose(0, 1).flatten(1)[None]
    return angle.cos(), angle.sin()


def resampled(table: Tensor, grids: Grids, merge: int) -> Tensor:
    """A learned square table [side^2, D] brought to each grid, [patches, D] in the order of the patches.

    Bilinear with aligned corners: row r of h reads the table at r (side - 1) / (h - 1), so that the corners of every
    picture are the corners of the table; one row alone reads the first. In float32 at least.
    """
    side = round(table.shape[0] ** 0.5)
    square = table.to(torch.promote_types(torch.float32, table.dtype)).unflatten(0, (side, side))
    known: dict[tuple[int, int], Tensor] = {}
    for _, h, w in grids:
        if (h, w) not in known:
            picture = _stretched(_stretched(square, h).transpose(0, 1), w).transpose(0, 1)  # [h, w, D]
            squares = picture.unflatten(1, (w // merge, merge)).unflatten(0, (h // merge, merge))
            known[h, w] = squares.transpose(1, 2).flatten(0, 3)
    return torch.cat([known[h, w] for t, h, w in grids for _ in range(t)])


def _stretched(table: Tensor, size: int) -> Tensor:
    """[side, ...] to [size, ...] along the first axis."""
    side = table.shape[0]
    place = torch.arange(size, dtype=table.dtype, device=table.device) * (side - 1) / max(size - 1, 1)
    below = place.floor().long().clamp(max=side - 1)
    above, share = (below + 1).clamp(max=side - 1), (place - below).view(-1, *[1] * (table.dim() - 1))
    return torch.lerp(table[below], table[above], share)
