"""Figures of a routing: load by layer and expert, margins, co-activation. Needs matplotlib (extra `plot`).

    draw(routing, "routing.png")                      all plots on one page
    plot_load(routing, axes)                          one plot, on axes of the caller's figure
"""

from __future__ import annotations

import math
import os
from html import escape
from typing import Any

import torch
from torch import Tensor

from qwen35moe.figures import new_figure, save_figure

from .statistics import coactivation, dead_experts, entropy, expert_load, imbalance, margins
from .value import Routing

_HTML_ROWS = 40  # layers in `html_table`


def plot_load(routing: Routing, axes: Any) -> None:
    """Heat map, a row per layer, a column per expert: load divided by the even load, E f_e; 1 is white."""
    relative = (expert_load(routing) * routing.num_experts).cpu().numpy()
    farthest = max(float(abs(relative - 1).max()), 1e-9)
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=1 - farthest, vmax=1 + farthest, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title="load / even load", xlabel="expert", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _name_layers(axes, routing)


def plot_margins(routing: Routing, axes: Any, values: Tensor | None = None) -> None:
    """For each layer the share of tokens whose top-k margin is below x. values [L, N]: the margins, for a routing without
    logits."""
    values = (margins(routing) if values is None else values).detach().double().cpu()
    for row, layer in zip(values, routing.layers, strict=True):
        finite = row[row.isfinite() & (row > 0)].sort().values
        if finite.numel():
            share = (torch.arange(finite.numel()) + 1 + (row.numel() - finite.numel())) / row.numel()
            axes.plot(finite.numpy(), share.numpy(), label=f"layer {layer}", linewidth=1)
    axes.set(title="top-k margin of the logits", xlabel="margin", ylabel="share of tokens below", xscale="log", ylim=(0, 1))
    if len(routing.layers) <= 8:
        axes.legend(fontsize=7)


def plot_coactivation(routing: Routing, axes: Any, layer: int | None = None) -> None:
    """Heat map over pairs of experts of one layer (by default the first): log2 of C_ij divided by its approximate value for
    independent choices of k different experts with these loads, C_ii C_jj (k-1) E / (k (E-1)). 0: as often as by chance.

    The diagonal and pairs that were never chosen together are blank.
    """
    number = routing.layers[0] if layer is None else layer
    if number not in routing.layers:
        raise ValueError(f"the routing has layers {routing.layers}, not {number}")
    together = coactivation(routing)[routing.layers.index(number)].cpu()
    single, k, experts = together.diagonal(), routing.indices.shape[-1], routing.num_experts
    chance = (k - 1) * experts / (k * max(experts - 1, 1))
    lift = (together / (single[:, None] * single[None] * chance)).log2().fill_diagonal_(math.nan)
    lift[~lift.isfinite()] = math.nan
    finite = lift[~lift.isnan()]
    farthest = float(finite.abs().max()) if finite.numel() else 1.0
    image = axes.imshow(lift.numpy(), cmap="PuOr", vmin=-farthest, vmax=farthest, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title=f"chosen together, layer {number}: log2 of co-activation / chance", xlabel="expert", ylabel="expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def draw(routing: Routing, path: str | os.PathLike[str], *, margin: Tensor | None = None, title: str | None = None) -> None:
    """All plots on one page, co-activation of the first and the last layer; the suffix of `path` sets the file format."""
    has_margins = margin is not None or routing.logits is not None
    outer_layers = list(dict.fromkeys((routing.layers[0], routing.layers[-1])))
    figure = new_figure(9, 2.6 + 0.12 * len(routing.layers) + 3.4)
    rows = figure.add_gridspec(2, 2, height_ratios=(1.6 + 0.12 * len(routing.layers), 3.4))
    plot_load(routing, figure.add_subplot(rows[0, 0] if has_margins else rows[0, :]))
    if has_margins:
        plot_margins(routing, figure.add_subplot(rows[0, 1]), margin)
    for column, layer in enumerate(outer_layers):
        plot_coactivation(routing, figure.add_subplot(rows[1, column]), layer)
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=110)


def html_table(routing: Routing) -> str:
    """An HTML table with a row per layer: how even its load is. For notebooks; at most 40 layers."""
    rows = ""
    if routing.num_experts:
        load, dead = expert_load(routing).cpu(), dead_experts(routing).sum(1).tolist()
        even, uneven = (entropy(routing) / math.log(max(routing.num_experts, 2))).tolist(), imbalance(routing).tolist()
        for row, layer in list(enumerate(routing.layers))[:_HTML_ROWS]:
            low, high = f"{float(load[row].min()):.2%}", f"{float(load[row].max()):.2%}"
            cells = (layer, f"{even[row]:.3f}", f"{uneven[row]:.2f}", low, high, dead[row])
            rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        heads = ("layer", "entropy / ln E", "max / mean", "least load", "most load", "dead")
        rows = f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
    return f"<div><code>{escape(repr(routing))}</code>{rows}</div>"


def _name_layers(axes: Any, routing: Routing) -> None:
    step = -(-len(routing.layers) // 24)
    axes.set_yticks(range(0, len(routing.layers), step), [str(layer) for layer in routing.layers[::step]])
