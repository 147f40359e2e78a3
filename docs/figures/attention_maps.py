"""Draws attention_maps.png from the bundled checkpoint: `python docs/figures/attention_maps.py` (needs matplotlib).

The same weights, text and versions give the same figure; nothing is random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwen35moe
from qwen35moe import taps
from qwen35moe.figures import new_figure, save_figure
from qwen35moe.ops.attention_map import state_map

TEXT = "Paul, an apostle of Jesus Christ by the will of God, and Timotheus our brother,"
LAYER, LONG, SHORT = 0, 1, 2  # a DeltaNet layer, a head with slow decay and one with fast decay
ATTENTION, HEAD = 3, 0  # the attention layer and one of its heads


def computed() -> tuple[list[str], dict[str, Tensor], Tensor]:
    """The tokens, three maps [T, T] by title, and the share of each token in the recurrent state of head LONG [T]."""
    model, tokenizer = qwen35moe.load("tiny")
    model = model.float()
    ids = tokenizer.encode(TEXT)
    layer = f"layers.{LAYER}.linear_attn."
    with torch.no_grad(), taps.record(model, [layer + name for name in ("key", "value", "decay", "beta")]) as values:
        maps = model(torch.tensor([ids]), output_attentions=True).attentions
    key, value, decay, beta = (values[layer + name] for name in ("key", "value", "decay", "beta"))
    p = state_map(key, decay=decay, beta=beta)
    share = p[0, LONG].norm(dim=-1) * value[0, :, LONG].norm(dim=-1)  # the Frobenius norm of p_j (x) v_j
    kept = [f"{decay[0, :, head].mean().exp():.3g}" for head in (LONG, SHORT)]
    titles = {
        f"DeltaNet layer {LAYER}, head {LONG}\nkeeps {kept[0]} of its state per token": _by_row(maps[LAYER][0, LONG]),
        f"DeltaNet layer {LAYER}, head {SHORT}\nkeeps {kept[1]} of its state per token": _by_row(maps[LAYER][0, SHORT]),
        f"attention layer {ATTENTION}, head {HEAD}\nsoftmax": _by_row(maps[ATTENTION][0, HEAD]),
    }
    return [tokenizer.decode([token]) for token in ids], titles, share / share.sum()


def _by_row(weights: Tensor) -> Tensor:
    """Each row relative to its largest weight: the norm after a DeltaNet head removes the scale of its row."""
    return weights / weights.abs().amax(-1, keepdim=True)


def drawn(tokens: list[str], maps: dict[str, Tensor], share: Tensor) -> Any:
    """The figure: three maps, and each token's share of the final recurrent state."""
    figure = new_figure(13, 4)
    panels = figure.subplots(1, 4, width_ratios=(3, 3, 3, 2))
    places, labels = range(len(tokens)), [token.replace(" ", "\u00b7") for token in tokens]
    for axes, (title, weights) in zip(panels[:3], maps.items(), strict=True):
        image = axes.imshow(weights.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(places, labels, rotation=90, fontsize=6)
        axes.set_yticks(places, labels, fontsize=6)
    panels[0].set_ylabel("output at")
    figure.colorbar(image, ax=panels[:3], shrink=0.7, label="weight of a value / largest of its row")
    panels[3].barh(places, share.numpy(), color="0.4")
    panels[3].set_yticks(places, labels, fontsize=6)
    panels[3].invert_yaxis()
    panels[3].set_title(f"share of the final state,\nlayer {LAYER}, head {LONG}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("attention_maps.png"))
    figure = drawn(*computed())
    save_figure(figure, parser.parse_args().out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
