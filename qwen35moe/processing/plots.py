"""Plots of a prompt as the model receives it: images with their patches and tokens, and the three positions of every token.

Needs matplotlib (extra [plot]).

    draw_vision(processor(...), "page.png")             all images and rows on one page
    plot_tokens(image, settings, axes)                  one image, on the caller's axes
    plot_positions(position_ids, types, axes)           one row of a batch

Images are reconstructed from pixel_values (pixels.py), and positions are computed by models/vision_inputs.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen35moe.figures import figure_path, new_figure, save_figure
from qwen35moe.models.vision_inputs import IMAGE, TEXT, VIDEO, VisualInputs, check_counts
from qwen35moe.models.vision_positions import positions
from qwen35moe.ops.vision_grid import coordinates, tokens_of

from .pixels import IMAGE_DEFAULTS, VIDEO_DEFAULTS, PixelSettings, check_divisible, images_from_values

# Drawn on top of each other, thick to thin, so that all three are visible where they are equal.
_AXES = (("time", "#9ecae1", 6.0), ("height", "#e6550d", 2.8), ("width", "black", 1.0))
_KINDS = {TEXT: ("text", "none"), IMAGE: ("image", "#fdf0dc"), VIDEO: ("video", "#e5f5e0")}
_WIDTH = 10.0  # of a page, in inches
_PER_LINE = 3  # panels side by side
_NUMBERED = 8  # rows and columns of tokens up to which each token is numbered


def plot_tokens(
    image: Tensor, settings: PixelSettings, axes: Any, *, position_ids: Tensor | None = None, first: int = 0
) -> None:
    """An image [H, W, 3] uint8 with its patches (thin lines) and its tokens (thick lines), numbered from `first` in order.

    position_ids [3, tokens], tokens = H W / (p m)^2: rows and columns are labelled with height and width; without it they are
    counted. ValueError if the image does not divide into tokens or position_ids has another number of them.
    """
    height, width = image.shape[:2]
    check_divisible(height, width, settings)
    p, m, side = settings.patch_size, settings.merge_size, settings.factor
    rows, columns = height // side, width // side
    if position_ids is not None and list(position_ids.shape) != [3, rows * columns]:
        raise ValueError(f"{rows} x {columns} tokens have positions [3, {rows * columns}], got {list(position_ids.shape)}")
    axes.imshow(image.cpu().numpy(), extent=(0, width, height, 0), interpolation="nearest")
    for step, thickness in ((p, 0.4), (side, 1.6)):
        axes.hlines(range(0, height + 1, step), 0, width, color="white", linewidth=thickness)
        axes.vlines(range(0, width + 1, step), 0, height, color="white", linewidth=thickness)
    # The centre of a token is the mean of its patches, whose coordinates are those that the vision tower computes.
    patches = coordinates([(1, height // p, width // p)], m).unflatten(1, (-1, m * m))
    centres = (patches.double().mean(-1) + 0.5) * p  # [2, tokens], in pixels
    cells = (centres / side).long()
    numbered = cells % -(-max(rows, columns) // _NUMBERED) == 0
    labels = cells if position_ids is None else position_ids[1:].cpu()
    for set_ticks, centre, label, keep in zip((axes.set_yticks, axes.set_xticks), centres, labels, numbered, strict=True):
        ticks = dict(zip(centre[keep].tolist(), label[keep].tolist(), strict=True))
        set_ticks(list(ticks), [str(tick) for tick in ticks.values()], fontsize=7)
    for token in numbered.all(0).nonzero()[:, 0].tolist():
        y, x = centres[:, token].tolist()
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        axes.text(x, y, str(first + token), fontsize=7, ha="center", va="center", bbox=box)
    axes.tick_params(length=0)
    axes.set_xlabel("column" if position_ids is None else "width", fontsize=8)
    axes.set_ylabel("row" if position_ids is None else "height", fontsize=8)


def plot_positions(position_ids: Tensor, types: Tensor, axes: Any, *, next_position: int | None = None) -> None:
    """Time, height and width of the tokens of one row over their indices; placeholders of images and videos are shaded.

    position_ids [3, T], types [T] (mm_token_type_ids: 0 text, 1 image, 2 video), both without padding. next_position: the
    position of the next token, drawn as a ring with the row's rotary offset (`Cache.rope_delta`), next_position - T.
    ValueError if the shapes do not match.
    """
    tokens = types.numel()
    if types.dim() != 1 or list(position_ids.shape) != [3, tokens]:
        raise ValueError(f"one row has positions [3, T] and types [T], got {list(position_ids.shape)} and {list(types.shape)}")
    for (name, colour, thickness), values in zip(_AXES, position_ids.tolist(), strict=True):
        axes.plot(range(tokens), values, color=colour, linewidth=thickness, drawstyle="steps-mid", label=name)
    kinds, counts = (values.tolist() for values in torch.unique_consecutive(types, return_counts=True))
    for kind, count, end in zip(kinds, counts, accumulate(counts), strict=True):
        axes.axvspan(end - count - 0.5, end - 0.5, facecolor=_KINDS[kind][1], edgecolor="none", zorder=0)
        if count >= (0.08 if kind == TEXT else 0.12) * tokens:  # narrower spans have no room for a label
            label, middle = _label(kind, position_ids[:, end - count : end]), end - 0.5 - count / 2
            axes.text(middle, 0.97, label, transform=axes.get_xaxis_transform(), fontsize=7, ha="center", va="top")
    if next_position is not None:
        axes.plot([tokens], [next_position], color="black", marker="o", fillstyle="none", linestyle="none")
        label = f"next {next_position}\nrope_delta\n= {next_position} - {tokens}\n= {next_position - tokens}"
        axes.text(tokens, 0.9 * next_position, label, fontsize=7, va="top")
    top = max(1, next_position or 0, *position_ids.flatten().tolist())
    axes.set(xlim=(-0.5, 1.09 * tokens), ylim=(-0.05 * top, 1.5 * top))  # room above the lines for the labels
    axes.set_xlabel("token", fontsize=8)
    axes.set_ylabel("position", fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _label(kind: int, position_ids: Tensor) -> str:
    """The kind of a span of tokens and the ranges of its positions [3, n]."""
    low, high = (values.tolist() for values in position_ids.aminmax(dim=1))
    ranges = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(low, high, strict=True)]
    named = zip((name for name, *_ in _AXES), ranges, strict=True)
    return "\n".join([_KINDS[kind][0], *(ranges[:1] if kind == TEXT else (f"{name} {span}" for name, span in named))])


@dataclass(frozen=True)
class _Panel:
    """An image of a page, the positions [3, tokens] of its tokens, and the index of the first one in its row."""

    title: str
    image: Tensor
    settings: PixelSettings
    position_ids: Tensor
    first: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.image.shape[0] // self.settings.factor, self.image.shape[1] // self.settings.factor


def draw_vision(
    inputs: Mapping[str, Any], path: str | os.PathLike[str], *, settings: PixelSettings = IMAGE_DEFAULTS,
    video_settings: PixelSettings = VIDEO_DEFAULTS, title: str | None = None,
) -> None:
    """One page for a processor's output: every image, the first frame of every video, and the positions of every row.

    inputs: mm_token_type_ids [B, T], optionally attention_mask [B, T], pixel_values and image_grid_thw, pixel_values_videos
    and video_grid_thw. Padding is left out. settings, video_settings: those of the processors
    (`processor.image_processor.settings`). The extension of `path` selects the file format. ValueError if placeholders, grids
    and values do not match, or if matplotlib is missing.
    """
    figure_path(path)  # raises early
    types, mask, visual, merge = _checked(inputs, settings, video_settings)
    position_ids, next_positions = positions(types, visual, merge, mask=mask)
    panels = [panel for kind, own in ((IMAGE, settings), (VIDEO, video_settings))
              for panel in _panels(kind, types, mask, position_ids, visual, own)]  # fmt: skip
    lines = [panels[start : start + _PER_LINE] for start in range(0, len(panels), _PER_LINE)]
    heights = [_height([panel.tokens for panel in line]) for line in lines] + [2.8] * len(types)
    figure = new_figure(_WIDTH, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, line in zip(parts[: len(lines)], lines, strict=True):
        for axes, panel in zip(part.subplots(1, len(line), squeeze=False)[0], line, strict=True):
            plot_tokens(panel.image, panel.settings, axes, position_ids=panel.position_ids, first=panel.first)
            axes.set_title(panel.title, fontsize=9)
    for row, part in enumerate(parts[len(lines) :]):
        present, end, axes = mask[row], int(next_positions[row]), part.subplots()
        plot_positions(position_ids[:, row, present], types[row, present], axes, next_position=end)
        name = f"row {row}: " if len(types) > 1 else ""
        axes.set_title(f"{name}{int(present.sum())} tokens in {end} positions", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=100)


def _height(tokens: list[tuple[int, int]]) -> float:
    """The height in inches of a line of panels with these rows and columns of tokens."""
    room = _WIDTH / len(tokens) - 0.6
    return 0.9 + min(5.0, max(rows * min(0.45, room / columns) for rows, columns in tokens))


def _checked(
    inputs: Mapping[str, Any], settings: PixelSettings, video_settings: PixelSettings
) -> tuple[Tensor, Tensor, VisualInputs, int]:
    """(types [B, T], mask [B, T] of tokens that are not padding, visual inputs, m), with the checks of the model."""
    if inputs.get("mm_token_type_ids") is None:
        raise ValueError(
            f"the inputs hold {sorted(inputs)} but no mm_token_type_ids: compute them with a Processor, or with "
            "qwen35moe.models.vision_inputs.token_types(input_ids, config)"
        )
    types, mask = inputs["mm_token_type_ids"].cpu(), inputs.get("attention_mask")
    mask = torch.ones_like(types, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if types.dim() != 2 or mask.shape != types.shape:
        raise ValueError(f"mm_token_type_ids and attention_mask are [B, T], got {list(types.shape)} and {list(mask.shape)}")
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    visual = VisualInputs(**{name: inputs[name].detach().cpu() for name in names if inputs.get(name) is not None})
    visual.check_visual(ids=True)
    merges = [own.merge_size for kind, own in ((IMAGE, settings), (VIDEO, video_settings)) if visual.present(kind)] or [1]
    if len(set(merges)) > 1:
        raise ValueError(f"merge_size must be the same for both, got {merges[0]} for images and {merges[1]} for videos")
    types = types.masked_fill(~mask, TEXT)
    check_counts(types, visual, merges[0])
    return types, mask, visual, merges[0]


def _panels(
    kind: int, types: Tensor, mask: Tensor, position_ids: Tensor, visual: VisualInputs, settings: PixelSettings
) -> Iterator[_Panel]:
    """Every image, or the first frame of every video, in the order of the rows."""
    values, grids = visual.pixels(kind), visual.grids(kind, settings.merge_size)
    if values is None:
        return
    sizes = [t * h * w for t, h, w in grids]
    if values.shape[0] != sum(sizes):
        raise ValueError(f"{_KINDS[kind][0]}s: {values.shape[0]} rows of values, but {sum(sizes)} patches in the grids")
    rows, columns = (types == kind).nonzero(as_tuple=True)
    indices = (mask.long().cumsum(1) - 1)[rows, columns]  # of the placeholders, in their rows without padding
    starts = [0, *accumulate(tokens_of(grids, settings.merge_size))]
    for number, ((t, h, w), patches) in enumerate(zip(grids, values.split(sizes), strict=True)):
        own = slice(starts[number], starts[number] + h * w // settings.merge_size**2)  # the first frame
        first, last = int(indices[own][0]), int(indices[own][-1])
        row = f"row {int(rows[own][0])}, " if len(types) > 1 else ""
        frame = "" if kind == IMAGE else f", frame 0 of {t}"
        yield _Panel(
            title=f"{row}{_KINDS[kind][0]} {number}{frame}: tokens {first} to {last}",
            image=images_from_values(patches[: h * w], (1, h, w), settings)[0],
            settings=settings,
            position_ids=position_ids[:, rows, columns][:, own],
            first=first,
        )
