"""The grid of an image or video: order, coordinates and rotation of its patches, and learned positions interpolated to it.

A grid (t, h, w) counts patches: t frames of h rows and w columns (two images of a video make one frame; an image has t = 1).
Patches are in the order of the frames, and within a frame in squares of m x m patches that will be merged into one token: the
squares row by row, and the patches of a square row by row.

The tower is that of Bai et al. 2025, "Qwen3-VL Technical Report".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen35moe.backends.values import with_host_values
from qwen35moe.ops.precision import float64_device

Grids = Sequence[tuple[int, int, int]]  # (t, h, w) of each image or video

_FORM = "integers [items, 3] (frames, rows, columns of patches) with at least one item"
THETA = 10_000.0  # base of the tower's rotation, in every published model


def as_grids(grid_thw: Tensor | Grids, merge: int, what: str = "grid_thw") -> list[tuple[int, int, int]]:
    """A processor's tensor [items, 3], or triples, as triples. ValueError unless t, h, w are positive, and h and w multiples of
    `merge`. The host waits for a tensor on a GPU."""
    if isinstance(grid_thw, Tensor):
        check_form(grid_thw, what)
        if torch.compiler.is_compiling():  # a reason, in place of dynamo's report on data-dependent sizes
            torch._dynamo.graph_break(msg=f"{what} is a tensor, and sizes depend on its values: give triples [(t, h, w), ...]")
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    else:
        grids = _triples(grid_thw, what)
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(
                f"{what} contains ({t}, {h}, {w}): rows and columns must be positive multiples of {merge}, frames at least 1"
            )
    return grids


def check_form(grid_thw: Tensor, what: str) -> None:
    """ValueError unless the tensor is integers [items, 3]."""
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] < 1 or grid_thw.is_floating_point():
        raise ValueError(f"{what} must be {_FORM}, got {list(grid_thw.shape)} {grid_thw.dtype}")


def _triples(rows: Any, what: str) -> list[tuple[int, int, int]]:
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"{what} must be {_FORM}, got a {type(rows).__name__}")
    for row in rows:
        if not isinstance(row, (list, tuple)) or len(row) != 3 or not all(isinstance(size, int) for size in row):
            raise ValueError(f"{what} must be {_FORM}, got a row {str(row)[:40]}")
    return [(t, h, w) for t, h, w in rows]


def tokens_of(grids: Grids, merge: int) -> list[int]:
    """Tokens of each image or video: t h w / m^2."""
    return [t * h * w // merge**2 for t, h, w in grids]


def frame_bounds(grids: Grids, device: torch.device | str = "cpu") -> Tensor:
    """[frames + 1] int32: the first patch of each frame, and the end of the last. Attention stays within a frame."""
    bounds = [0, *accumulate(h * w for t, h, w in grids for _ in range(t))]
    return with_host_values(torch.tensor(bounds, dtype=torch.int32, device=device), bounds)


def coordinates(grids: Grids, merge: int, device: torch.device | str = "cpu") -> Tensor:
    """[2, N]: row and column of every patch in its frame, in the order of the patches."""
    frames: dict[tuple[int, int], Tensor] = {}  # of each size once
    for _, h, w in grids:
        if (h, w) not in frames:
            rows = torch.arange(h, device=device).view(h // merge, 1, merge, 1).expand(-1, w // merge, -1, merge)
            columns = torch.arange(w, device=device).view(1, w // merge, 1, merge).expand(h // merge, -1, merge, -1)
            frames[h, w] = torch.stack([rows.flatten(), columns.flatten()])
    return torch.cat([frames[h, w] for t, h, w in grids for _ in range(t)], dim=1)


def rotation(coordinates: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [1, N, K/2]: the first half of the pairs is rotated by the row, the second by the column.

    angle = position * theta^(-2 j / (K/2)) for j = 0 ... K/4 - 1, in float64; cos and sin are rounded once to `dtype`.
    coordinates [2, N]; head_dim: K.
    """
    device, exact = coordinates.device, float64_device(coordinates.device)
    steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float64, device=exact)
    frequencies = THETA ** (-steps / (head_dim // 2))
    angle = (coordinates.to(exact, torch.float64)[..., None] * frequencies).transpose(0, 1).flatten(1)[None]
    return angle.cos().to(dtype=dtype).to(device), angle.sin().to(dtype=dtype).to(device)


def interpolated(table: Tensor, grids: Grids, merge: int) -> Tensor:
    """A learned square table [side^2, width] interpolated to each grid: [N, width], in the order of the patches.

    Bilinear with aligned corners: row i of h is the table's row i (side - 1) / (h - 1), so that the corners of every image are
    the corners of the table; a single row is the table's first. Float32 at least.
    """
    side = round(table.shape[0] ** 0.5)
    square = table.to(torch.promote_types(torch.float32, table.dtype)).unflatten(0, (side, side))
    frames: dict[tuple[int, int], Tensor] = {}  # of each size once
    for _, h, w in grids:
        if (h, w) not in frames:
            frame = _interpolated_axis(_interpolated_axis(square, h).transpose(0, 1), w).transpose(0, 1)  # [h, w, width]
            squares = frame.unflatten(1, (w // merge, merge)).unflatten(0, (h // merge, merge))
            frames[h, w] = squares.transpose(1, 2).flatten(0, 3)
    return torch.cat([frames[h, w] for t, h, w in grids for _ in range(t)])


def _interpolated_axis(table: Tensor, size: int) -> Tensor:
    """[side, ...] to [size, ...], linear along the first axis."""
    side = table.shape[0]
    position = torch.arange(size, dtype=table.dtype, device=table.device) * (side - 1) / max(size - 1, 1)
    below = position.floor().long().clamp(max=side - 1)
    above, fraction = (below + 1).clamp(max=side - 1), (position - below).view(-1, *[1] * (table.dim() - 1))
    return torch.lerp(table[below], table[above], fraction)
