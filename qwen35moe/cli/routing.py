"""`qwen35moe routing`: statistics of the routers' choices on a text, which the model reads in windows."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..figures import figure_path
from ..files import file_to_write
from .options import CHECKPOINT, add_device
from .streams import read_file
from .terminal import printable

HELP = "Show the routers' choices on a text: load, margins, co-activation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help=CHECKPOINT)
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text; - reads standard input")
    parser.add_argument("--window", type=int, default=1024, metavar="N",
                        help="tokens per sequence; the text is cut into sequences (default: 1024)")  # fmt: skip
    parser.add_argument("--out", metavar="TRACE", help="write indices and weights to this file (see Routing.load)")
    parser.add_argument("--logits", action="store_true", help="write the router logits to the trace, too")
    parser.add_argument("--plot", metavar="PNG", help="plot load, margins and co-activation to this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    """Print the statistics, and write the trace and the plot if requested."""
    if options.window < 1:
        raise ValueError(f"--window must be at least 1, got {options.window}")
    if options.logits and not options.out:
        raise ValueError("--logits are written to the trace: add --out TRACE")
    text = read_file(options.text)
    from ..loading.load import load_with_tokenizer
    from ..routing.plots import draw

    if options.out:
        file_to_write(options.out)  # raises before the model is loaded
    if options.plot:
        figure_path(options.plot)
    model, tokenizer = load_with_tokenizer(options.folder, dtype=options.dtype, device=options.device)
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{options.text} is empty")
    routing, margin = trace(model, ids, options.window, keep_logits=options.logits)
    stats = {"folder": str(options.folder), "window": options.window, "dtype": str(model.dtype).removeprefix("torch.")}
    stats = statistics(routing, margin) | stats
    if options.out:
        about = {"model": Path(options.folder).name, "text": Path(options.text).name, "window": str(options.window)}
        routing.save(options.out, about | {"tokens": str(len(ids)), "dtype": stats["dtype"]})
    if options.plot:
        draw(routing, options.plot, margin=margin, title=f"{Path(options.folder).name}: {len(ids):,} tokens")
    print(json.dumps(stats, indent=2) if options.json else printable(report(stats)))


def trace(model: Any, ids: list[int], window: int, *, keep_logits: bool = False) -> tuple[Any, Any]:
    """(routing, margins [L, N]) of the ids, cut into windows that are separate sequences and packed into one Routing."""
    import torch
    from tqdm import tqdm

    from ..routing import Routing, margins

    if not model.config.text_config.is_moe:
        raise ValueError("this model is dense and has no routers")
    parts, margin = [], []
    with torch.no_grad(), tqdm(total=len(ids), unit="tok", disable=None, leave=False) as progress:
        for start in range(0, len(ids), window):
            rows = torch.tensor([ids[start : start + window]], device=model.device)
            out = model(rows, output_routing=True, logits_to_keep=1)
            margin.append(margins(out.routing).cpu())
            kept = out.routing if keep_logits else replace(out.routing, logits=None)
            parts.append(replace(kept, **{n: getattr(kept, n).cpu() for n in ("indices", "weights")},
                                 logits=None if kept.logits is None else kept.logits.cpu()))  # fmt: skip
            progress.update(rows.shape[1])
    return Routing.pack(parts), torch.cat(margin, dim=1)


def statistics(routing: Any, margin: Any) -> dict[str, Any]:
    """The data that `routing --json` prints; lists have one entry per layer. margin [L, N]."""
    import math

    from ..routing import coactivation, dead_experts, entropy, expert_load, imbalance

    pairs = coactivation(routing)
    pairs.diagonal(dim1=1, dim2=2).zero_()
    experts = routing.num_experts
    best = [divmod(int(layer.argmax()), experts) for layer in pairs]
    ordered = margin.sort(dim=1).values
    low, median = (ordered[:, int(share * (routing.tokens - 1))].tolist() for share in (0.01, 0.5))
    return {
        "tokens": routing.tokens,
        "layers": list(routing.layers),
        "num_experts": experts,
        "num_experts_per_tok": routing.indices.shape[-1],
        "load": expert_load(routing).tolist(),
        "entropy": (entropy(routing) / math.log(experts)).tolist() if experts > 1 else [1.0] * len(routing.layers),
        "imbalance": imbalance(routing).tolist(),
        "dead_experts": [row.nonzero()[:, 0].tolist() for row in dead_experts(routing)],
        "top_coactivation": [[i, j, float(layer[i, j])] for (i, j), layer in zip(best, pairs, strict=True)],
        "margin_p1": [_finite(value) for value in low],
        "margin_median": [_finite(value) for value in median],
    }


def _finite(value: float) -> float | None:
    """None for infinity, which JSON lacks: the margin if every expert is selected."""
    return value if value < float("inf") else None


def report(stats: dict[str, Any]) -> str:
    """The statistics as text."""
    experts = stats["num_experts"]
    lines = [
        f"{stats['folder']}: {stats['tokens']:,} tokens in windows of {stats['window']}, {stats['dtype']}; "
        f"{stats['num_experts_per_tok']} of {experts} experts per token (even load {1 / experts:.2%})",
        "",
        "layer  entropy  max/mean  least   most    dead  margin 1%  median   top co-activation",
    ]
    columns = ("layers", "entropy", "imbalance", "load", "dead_experts", "margin_p1", "margin_median", "top_coactivation")
    lines += [_row(*layer) for layer in zip(*(stats[name] for name in columns), strict=True)]
    lines += ["", "entropy: of the load, divided by ln E; an even load has entropy 1 and max/mean 1"]
    lines += ["margin: the lowest logit of the selected experts minus the highest of the others"]
    return "\n".join(lines)


def _row(
    layer: int, entropy: float, imbalance: float, load: list[float], dead: list[int], low: float | None, median: float | None,
    coactivation: tuple[int, int, float],
) -> str:
    low_text, median_text = ("-" if value is None else f"{value:.2g}" for value in (low, median))
    i, j, share = coactivation
    return (
        f"{layer:>5}  {entropy:7.4f}  {imbalance:8.2f}  {min(load):6.2%}  {max(load):6.2%}  {len(dead):4d}  {low_text:>9}  "
        f"{median_text:>6}   {i} and {j}: {share:.1%} of tokens"
    )
