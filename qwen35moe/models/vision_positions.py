"""Three positions of every token, in time, height and width.

Text advances all three by one. The h x w tokens of an image, or of one frame of a video, share the time p at which they
begin and count rows and columns from there; what follows begins at p + max(h, w). So after images the positions are behind
the number of tokens, by an offset that belongs to the conversation: `Cache.rope_delta`.

All of it is arithmetic on the device of the tokens: with the grids on the host, the host does not wait for a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import send, values_known
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.packing import require
from qwen35moe.models.vision_inputs import IMAGE, NAMES, TEXT, VIDEO, VisualInputs, placeholders
from qwen35moe.ops.vision_grid import Grids


def positions(
    types: Tensor, visual: VisualInputs, merge: int, *, mask: Tensor | None = None, before: Tensor | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """([3, B, T] positions of the new tokens, [B] the position after the last one of each row).

        position = before + sum of the advances of earlier tokens of the row + (time, row, column) within the image

    where a text token advances by 1, the last token of an image (or frame) by max(h, w), and its other tokens by 0.

    types [B, T]; mask [B, T] (padding does not count, its positions are 0); before [B]: the first position of each row;
    bounds: of the packed documents of one row, each of which is placed as a row of its own. ValueError where an image's tokens
    do not stand together in one row (on a GPU and in a compiled graph an assertion).
    """
    rows, tokens = types.shape
    total, device = rows * tokens, types.device
    if bounds is None:
        bounds = torch.arange(0, total + 1, tokens, device=device)
    bounds = send(bounds.long(), device)
    columns = torch.arange(total, device=device)
    document = torch.bucketize(columns, bounds[1:], right=True)
    present = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.bool().flatten()
    kinds = torch.where(present, types.flatten(), TEXT)
    advance, within = (present & (kinds == TEXT)).long(), torch.zeros(3, total, dtype=torch.long, device=device)
    index, apart = present.long().cumsum(0), []  # index: of a token among those that are no padding
    for kind, grids in _token_grids(visual, merge).items():
        if not grids:
            continue
        item, first, places, steps = _tokens(grids, device)
        where = placeholders(kinds, kind, item.shape[0])
        within = within.index_copy(1, where, places)
        advance = advance.index_copy(0, where, steps)
        start = where[first]
        number = torch.arange(item.shape[0], device=device) - first
        together = (document[where] == document[start]) & (index[where] - index[start] == number)
        apart.append((kind, grids, item, start, together))
    _check_together(apart, index, bounds, document)
    passed = F.pad(advance.cumsum(0), (1, 0))  # [total + 1]: the sum of the advances of earlier tokens
    first = torch.zeros_like(bounds[1:]) if before is None else before.to(device)
    placed = passed[:-1] - (passed[bounds[:-1]] - first)[document] + within
    placed = torch.where(present, placed, 0).view(3, rows, tokens)
    return placed, first + passed[bounds[1:]] - passed[bounds[:-1]]


def next_positions(layout: TokenLayout, before: Tensor) -> Tensor:
    """[B] the position after the last one of each row; a row without a new token stays at `before` [B]."""
    largest = layout.position_ids.amax(0)
    if layout.valid is not None:
        largest = largest.masked_fill(~layout.valid, -1)
    last = largest.amax(1)
    return torch.where(last < 0, before, last + 1)


def _token_grids(visual: VisualInputs, merge: int) -> dict[int, Grids]:
    """(t, h, w) in tokens of each image, and of each frame of a video: timestamps stand between frames."""
    frames = [(1, h, w) for t, h, w in visual.grids(VIDEO, merge) for _ in range(t)]
    return {
        kind: [(t, h // merge, w // merge) for t, h, w in grids]
        for kind, grids in ((IMAGE, visual.grids(IMAGE, merge)), (VIDEO, frames))
    }


def _tokens(grids: Grids, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all tokens of the grids, in order: the number of the grid [n]; the number of its first token [n]; time, row and column
    in it [3, n]; by how much the token advances the position [n]."""
    sizes = [t * h * w for t, h, w in grids]
    table = torch.tensor([[h, w, size, max(h, w)] for (_, h, w), size in zip(grids, sizes, strict=True)], device="cpu")
    height, width, count, advance = send(table, device).unbind(1)
    item = torch.repeat_interleave(count, output_size=sum(sizes))
    first = (count.cumsum(0) - count)[item]
    number = torch.arange(sum(sizes), device=device) - first
    line = number // width[item]
    places = torch.stack([line // height[item], line % height[item], number % width[item]])
    return item, first, places, torch.where(number == count[item] - 1, advance[item], 0)


def _check_together(
    apart: list[tuple[int, Grids, Tensor, Tensor, Tensor]], index: Tensor, bounds: Tensor, document: Tensor
) -> None:
    """ValueError unless each image's (or frame's) tokens stand together in one row; the message names the first one."""
    wrong = []
    for kind, grids, item, start, together in apart:
        if not (together.is_cpu and values_known(together)):
            require(together.all(), f"the placeholders of an {NAMES[kind]} (or frame) do not stand together: {_ORDER}")
        elif not bool(together.all()):
            token = int((~together).nonzero()[0, 0])
            wrong.append((int(start[token]), kind, grids[int(item[token])]))
    if wrong:
        place, kind, (t, h, w) = min(wrong)
        seen = F.pad(index, (1, 0))  # tokens before each place
        at = int(seen[place] - seen[bounds[document[place]]])
        raise ValueError(
            f"the next {NAMES[kind]} (or frame) makes {t * h * w} tokens ({t} x {h} x {w}) and does not fit the "
            f"placeholders from token {at} of its row: {_ORDER}"
        )


_ORDER = "are the images and videos in the order of their rows?"
