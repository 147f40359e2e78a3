"""What a model is shown of a prompt: pictures with their patches and tokens, and three positions of every token.

Needs matplotlib (extra `plot`).

    draw_vision(processor(...), "page.png")       all pictures and rows on one page
    plot_tokens(picture, settings, axes)          one picture, on axes of the caller's own figure
    plot_positions(places, types, axes)           one row

What is drawn is what the model gets: pictures are put together again from pixel_values (pixels.py), and positions are
those of multimodal.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen35moe.models.vision_inputs import IMAGE, TEXT, VIDEO, VisualInputs, check_counts
from qwen35moe.models.vision_positions import positions
from qwen35moe.ops.vision_grid import coordinates, tokens_of
from qwen35moe.routing.plots import new_figure

from .pixels import IMAGE_DEFAULTS, VIDEO_DEFAULTS, PixelSettings, check_divides, pictures_of

# Drawn one over the other, so that all three are seen where they are equal.
_AXES = (("time", "#9ecae1", 6.0), ("height", "#e6550d", 2.8), ("width", "black", 1.0))
_KINDS = {TEXT: ("text", "none"), IMAGE: ("image", "#fdf0dc"), VIDEO: ("video", "#e5f5e0")}
_WIDTH = 10.0  # of a page, in inches
_IN_LINE = 3  # pictures side by side
_NUMBERED = 8  # rows and columns of tokens that have room for a number each


def plot_tokens(picture: Tensor, settings: PixelSettings, axes: Any, *, places: Tensor | None = None, first: int = 0) -> None:
    """A picture [H, W, 3] of bytes, its patches (thin lines) and its tokens (bold), numbered from `first` in their order.

    places [3, tokens], tokens = H W / (p m)^2: their positions; rows and columns are then labelled with height and width,
    otherwise they are counted. ValueError where the picture is not whole tokens, or has another number of them.
    """
    height, width = picture.shape[:2]
    check_divides(height, width, settings)
    p, m, side = settings.patch_size, settings.merge_size, settings.factor
    rows, columns = height // side, width // side
    if places is not None and list(places.shape) != [3, rows * columns]:
        raise ValueError(f"{rows} x {columns} tokens have positions [3, {rows * columns}], got {list(places.shape)}")
    axes.imshow(picture.cpu().numpy(), extent=(0, width, height, 0), interpolation="nearest")
    for step, thickness in ((p, 0.4), (side, 1.6)):
        axes.hlines(range(0, height + 1, step), 0, width, color="white", linewidth=thickness)
        axes.vlines(range(0, width + 1, step), 0, height, color="white", linewidth=thickness)
    # A token lies in the middle of its patches; where those lie is what the tower itself goes by.
    patches = coordinates([(1, height // p, width // p)], m).unflatten(1, (-1, m * m))
    middles = (patches.double().mean(-1) + 0.5) * p  # [2, tokens], in pixels
    cells = (middles / side).long()
    shown = cells % -(-max(rows, columns) // _NUMBERED) == 0
    labels = cells if places is None else places[1:].cpu()
    for set_ticks, at, label, keep in zip((axes.set_yticks, axes.set_xticks), middles, labels, shown, strict=True):
        ticks = dict(zip(at[keep].tolist(), label[keep].tolist(), strict=True))
        set_ticks(list(ticks), [str(each) for each in ticks.values()], fontsize=7)
    for number in shown.all(0).nonzero()[:, 0].tolist():
        y, x = middles[:, number].tolist()
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        axes.text(x, y, str(first + number), fontsize=7, ha="center", va="center", bbox=box)
    axes.tick_params(length=0)
    axes.set_xlabel("column" if places is None else "width", fontsize=8)
    axes.set_ylabel("row" if places is None else "height", fontsize=8)


def plot_positions(places: Tensor, types: Tensor, axes: Any, *, after: int | None = None) -> None:
    """Time, height and width of the tokens of one row, over their slots; placeholders of pictures are shaded.

    places [3, T], types [T] (mm_token_type_ids: 0 text, 1 image, 2 video), both without padding. after: the position that
    follows, drawn as a ring; written below it is the row's rotary offset (`Cache.rope_delta`), after - T. ValueError where
    the shapes do not fit each other.
    """
    tokens = types.numel()
    if types.dim() != 1 or list(places.shape) != [3, tokens]:
        raise ValueError(f"one row has positions [3, T] and types [T], got {list(places.shape)} and {list(types.shape)}")
    for (name, colour, thickness), values in zip(_AXES, places.tolist(), strict=True):
        axes.plot(range(tokens), values, color=colour, linewidth=thickness, drawstyle="steps-mid", label=name)
    kinds, counts = (each.tolist() for each in torch.unique_consecutive(types, return_counts=True))
    for kind, count, end in zip(kinds, counts, accumulate(counts), strict=True):
        axes.axvspan(end - count - 0.5, end - 0.5, facecolor=_KINDS[kind][1], edgecolor="none", zorder=0)
        if count >= (0.08 if kind == TEXT else 0.12) * tokens:  # otherwise narrower than what would be written there
            middle, said = end - 0.5 - count / 2, _said(kind, places[:, end - count : end])
            axes.text(middle, 0.97, said, transform=axes.get_xaxis_transform(), fontsize=7, ha="center", va="top")
    if after is not None:
        axes.plot([tokens], [after], color="black", marker="o", fillstyle="none", linestyle="none")
        said = f"next {after}\nrope_delta\n= {after} - {tokens}\n= {after - tokens}"
        axes.text(tokens, 0.9 * after, said, fontsize=7, va="top")
    top = max(1, after or 0, *places.flatten().tolist())
    axes.set(xlim=(-0.5, 1.09 * tokens), ylim=(-0.05 * top, 1.5 * top))  # above: what is said of each part
    axes.set_xlabel("slot", fontsize=8)
    axes.set_ylabel("position", fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _said(kind: int, places: Tensor) -> str:
    """From where to where the positions [3, n] of neighbours of one kind go."""
    low, high = (each.tolist() for each in places.aminmax(dim=1))
    ranges = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(low, high, strict=True)]
    lines = ranges[:1] if kind == TEXT else [f"{name} {each}" for (name, *_), each in zip(_AXES, ranges, strict=True)]
    return "\n".join([_KINDS[kind][0], *lines])


@dataclass(frozen=True)
class _Panel:
    """A picture of a page, the positions [3, tokens] of its tokens and the slot of the first one."""

    title: str
    picture: Tensor
    settings: PixelSettings
    places: Tensor
    first: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.picture.shape[0] // self.settings.factor, self.picture.shape[1] // self.settings.factor


def draw_vision(
    inputs: Mapping[str, Any], path: str | os.PathLike[str], *, settings: PixelSettings = IMAGE_DEFAULTS,
    video_settings: PixelSettings = VIDEO_DEFAULTS, title: str | None = None,
) -> None:
    """One page for a processor's output: every image, the first picture of every video, and the positions of every row.

    inputs: mm_token_type_ids [B, T], attention_mask [B, T] (all tokens, where there is none), pixel_values and
    image_grid_thw, pixel_values_videos and video_grid_thw. Slots count the tokens of a row without padding. The settings
    are those of the processors (`processor.image_processor.settings`). The ending of `path` says the format. ValueError
    where numbers of placeholders, grids and values do not fit each other, and where there is no matplotlib.
    """
    new_figure(1, 1)  # a missing matplotlib is said before the work, not after it
    types, present, pictures, merge = _taken(inputs, settings, video_settings)
    places, after = positions(types, pictures, merge, mask=present)
    panels = [panel for kind, own in ((IMAGE, settings), (VIDEO, video_settings))
              for panel in _panels(kind, types, present, places, pictures, own)]  # fmt: skip
    lines = [panels[at : at + _IN_LINE] for at in range(0, len(panels), _IN_LINE)]
    heights = [_height([panel.tokens for panel in line]) for line in lines] + [2.8] * len(types)
    figure = new_figure(_WIDTH, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, line in zip(parts[: len(lines)], lines, strict=True):
        for axes, panel in zip(part.subplots(1, len(line), squeeze=False)[0], line, strict=True):
            plot_tokens(panel.picture, panel.settings, axes, places=panel.places, first=panel.first)
            axes.set_title(panel.title, fontsize=9)
    for row, part in enumerate(parts[len(lines) :]):
        here, end, axes = present[row], int(after[row]), part.subplots()
        plot_positions(places[:, row, here], types[row, here], axes, after=end)
        name = f"row {row}: " if len(types) > 1 else ""
        axes.set_title(f"{name}{int(here.sum())} tokens in {end} positions", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def _height(tokens: list[tuple[int, int]]) -> float:
    """Inches for a line of pictures of so many rows and columns of tokens."""
    room = _WIDTH / len(tokens) - 0.6
    return 0.9 + min(5.0, max(rows * min(0.45, room / columns) for rows, columns in tokens))


def _taken(
    inputs: Mapping[str, Any], settings: PixelSettings, video_settings: PixelSettings
) -> tuple[Tensor, Tensor, VisualInputs, int]:
    """(types [B, T], which of them are no padding [B, T], the pictures, m), checked as the model checks them."""
    if inputs.get("mm_token_type_ids") is None:
        raise ValueError(
            f"the inputs hold {sorted(inputs)} and no mm_token_type_ids: take them from a Processor, or from "
            "qwen35moe.models.vision_inputs.token_types(input_ids, config)"
        )
    types, mask = inputs["mm_token_type_ids"].cpu(), inputs.get("attention_mask")
    present = torch.ones_like(types, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if types.dim() != 2 or present.shape != types.shape:
        raise ValueError(f"mm_token_type_ids and attention_mask are [B, T], got {list(types.shape)} and {list(present.shape)}")
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    pictures = VisualInputs(**{name: inputs[name].detach().cpu() for name in names if inputs.get(name) is not None})
    pictures.check_visual(ids=True)
    merges = [own.merge_size for kind, own in ((IMAGE, settings), (VIDEO, video_settings)) if pictures.present(kind)] or [1]
    if len(set(merges)) > 1:
        raise ValueError(f"merge_size: images {merges[0]}, videos {merges[1]}; a model has one")
    types = types.masked_fill(~present, TEXT)
    check_counts(types, pictures, merges[0])
    return types, present, pictures, merges[0]


def _panels(
    kind: int, types: Tensor, present: Tensor, places: Tensor, pictures: VisualInputs, settings: PixelSettings
) -> Iterator[_Panel]:
    """Every image, or the first picture of every video, in the order of their rows."""
    values, grids = pictures.pixels(kind), pictures.grids(kind, settings.merge_size)
    if values is None:
        return
    sizes = [t * h * w for t, h, w in grids]
    if values.shape[0] != sum(sizes):
        raise ValueError(f"{_KINDS[kind][0]}s have {values.shape[0]} rows of values, their grids call for {sum(sizes)}")
    where = (types == kind).nonzero(as_tuple=True)
    slots = (present.long().cumsum(1) - 1)[where]
    begins = [0, *accumulate(tokens_of(grids, settings.merge_size))]
    for number, ((t, h, w), patches) in enumerate(zip(grids, values.split(sizes), strict=True)):
        own = slice(begins[number], begins[number] + h * w // settings.merge_size**2)  # of the first frame
        first, last = int(slots[own][0]), int(slots[own][-1])
        row = f"row {int(where[0][own][0])}, " if len(types) > 1 else ""
        frame = "" if kind == IMAGE else f", frame 0 of {t}"
        yield _Panel(
            title=f"{row}{_KINDS[kind][0]} {number}{frame}: slots {first} to {last}",
            picture=pictures_of(patches[: h * w], (1, h, w), settings)[0],
            settings=settings,
            places=places[:, where[0], where[1]][:, own],
            first=first,
        )
