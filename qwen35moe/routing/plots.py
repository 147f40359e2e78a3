"""VisualInputs of a routing: load by layer and expert, margins, co-activation. Needs matplotlib (extra `plot`).

    draw(routing, "routing.png")                      all of them on one page
    plot_load(routing, axes)                          one, on axes of the caller's own figure
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .statistics import coactivation, expert_load, margins
from .value import Routing


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure without a window; ValueError with the way out where there is no matplotlib."""
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("a plot needs matplotlib: pip install 'qwen35moe[plot]'") from None
    return figure.Figure(figsize=(width, height), layout="constrained")


def plot_load(routing: Routing, axes: Any) -> None:
    """Heat map, a row per layer, a column per expert: load over the even load, E f_e; 1 is white."""
    relative = (expert_load(routing) * routing.num_experts).cpu().numpy()
    farthest = max(float(abs(relative - 1).max()), 1e-9)
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=1 - farthest, vmax=1 + farthest, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title="load / even load", xlabel="expert", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _name_layers(axes, routing)


def plot_margins(routing: Routing, axes: Any, values: Tensor | None = None) -> None:
    """For each layer the share of tokens whose top-k margin lies below x. values [L, N']: margins from elsewhere, when
    the routing has no logits."""
    values = (margins(routing) if values is None else values).detach().double().cpu()
    for row, layer in zip(values, routing.layers, strict=True):
        finite = row[row.isfinite() & (row > 0)].sort().values
        if finite.numel():
            place = (torch.arange(finite.numel()) + 1 + (row.numel() - finite.numel())) / row.numel()
            axes.plot(finite.numpy(), place.numpy(), label=f"layer {layer}", linewidth=1)
    axes.set(title="top-k margin of the logits", xlabel="margin", ylabel="share of tokens below", xscale="log", ylim=(0, 1))
    if len(routing.layers) <= 8:
        axes.legend(fontsize=7)


def plot_coactivation(routing: Routing, axes: Any, layer: int | None = None) -> None:
    """Heat map over pairs of experts of one layer (the first one by default): log2 of C_ij over what independent choices
    of S different experts with these loads would give about, C_ii C_jj (S-1) E / (S (E-1)). 0: as often as by chance.

    The diagonal and pairs that were never seen stay blank.
    """
    number = routing.layers[0] if layer is None else layer
    if number not in routing.layers:
        raise ValueError(f"the routing holds layers {routing.layers}, not {number}")
    together = coactivation(routing)[routing.layers.index(number)].cpu()
    alone, slots, experts = together.diagonal(), routing.indices.shape[-1], routing.num_experts
    chance = (slots - 1) * experts / (slots * max(experts - 1, 1))
    lift = (together / (alone[:, None] * alone[None] * chance)).log2().fill_diagonal_(math.nan)
    lift[~lift.isfinite()] = math.nan
    seen = lift[~lift.isnan()]
    farthest = float(seen.abs().max()) if seen.numel() else 1.0
    image = axes.imshow(lift.numpy(), cmap="PuOr", vmin=-farthest, vmax=farthest, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title=f"chosen together, layer {number}: log2 of C / chance", xlabel="expert", ylabel="expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def draw(routing: Routing, path: str | os.PathLike[str], *, margin: Tensor | None = None, title: str | None = None) -> None:
    """All pictures on one page, co-activation of the first and the last layer; the ending of `path` says the format."""
    has_margins = margin is not None or routing.logits is not None
    ends = list(dict.fromkeys((routing.layers[0], routing.layers[-1])))
    figure = new_figure(9, 2.6 + 0.12 * len(routing.layers) + 3.4)
    rows = figure.add_gridspec(2, 2, height_ratios=(1.6 + 0.12 * len(routing.layers), 3.4))
    plot_load(routing, figure.add_subplot(rows[0, 0] if has_margins else rows[0, :]))
    if has_margins:
        plot_margins(routing, figure.add_subplot(rows[0, 1]), margin)
    for place, layer in enumerate(ends):
        plot_coactivation(routing, figure.add_subplot(rows[1, place]), layer)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _name_layers(axes: Any, routing: Routing) -> None:
    step = -(-len(routing.layers) // 24)
    axes.set_yticks(range(0, len(routing.layers), step), [str(layer) for layer in routing.layers[::step]])
