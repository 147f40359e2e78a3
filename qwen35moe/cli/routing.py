"""`qwen35moe routing`: a text through the model, window by window, and what its routers chose."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


def run(options: argparse.Namespace) -> None:
    """Print the statistics, and write trace and picture where asked."""
    from ..loading import load
    from ..routing.plots import draw, new_figure

    if options.window < 1:
        raise ValueError(f"--window {options.window}: a window holds at least one token")
    if options.logits and not options.out:
        raise ValueError("--logits goes into the trace: say --out TRACE as well")
    if options.plot:
        new_figure(1, 1)  # a missing matplotlib is said before the work, not after it
    text = sys.stdin.read() if options.text == "-" else Path(options.text).read_text(encoding="utf-8")
    model, tokenizer = load(options.folder, dtype=options.dtype, device=options.device)
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{options.text} holds no text")
    routing, margin = trace(model, ids, options.window, keep_logits=options.logits)
    facts = survey(routing, margin) | {"folder": str(options.folder), "window": options.window, "dtype": str(model.dtype)[6:]}
    if options.out:
        about = {"model": Path(options.folder).name, "text": Path(options.text).name, "window": str(options.window)}
        routing.save(options.out, about | {"tokens": str(len(ids)), "dtype": facts["dtype"]})
    if options.plot:
        draw(routing, options.plot, margin=margin, title=f"{Path(options.folder).name}: {len(ids):,} tokens")
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def trace(model: Any, ids: list[int], window: int, *, keep_logits: bool = False) -> tuple[Any, Any]:
    """(routing, margins [L, N]) of the ids read in windows, each a sequence of its own, packed into one value."""
    import torch
    from tqdm import tqdm

    from ..routing import Routing, margins

    if not model.config.text_config.is_moe:
        raise ValueError("this model is dense and has no routers")
    parts, apart = [], []
    with torch.no_grad(), tqdm(total=len(ids), unit="tok", disable=None, leave=False) as progress:
        for start in range(0, len(ids), window):
            rows = torch.tensor([ids[start : start + window]], device=model.device)
            out = model(rows, output_routing=True, logits_to_keep=1)
            apart.append(margins(out.routing).cpu())
            kept = out.routing if keep_logits else replace(out.routing, logits=None)
            parts.append(replace(kept, **{n: getattr(kept, n).cpu() for n in ("indices", "weights")},
                                 logits=None if kept.logits is None else kept.logits.cpu()))  # fmt: skip
            progress.update(rows.shape[1])
    return Routing.pack(parts), torch.cat(apart, dim=1)


def survey(routing: Any, margin: Any) -> dict[str, Any]:
    """The facts that `routing --json` prints; a list has one entry per layer."""
    import math

    from ..routing import coactivation, dead_experts, entropy, expert_load, imbalance

    together = coactivation(routing)
    together.diagonal(dim1=1, dim2=2).zero_()
    experts = routing.num_experts
    closest = [divmod(int(layer.argmax()), experts) for layer in together]
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
        "most_together": [[i, j, float(layer[i, j])] for (i, j), layer in zip(closest, together, strict=True)],
        "margin_p1": [_finite(value) for value in low],
        "margin_median": [_finite(value) for value in median],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: None where every expert is chosen and no margin exists."""
    return value if value < float("inf") else None


def report(facts: dict[str, Any]) -> str:
    """The facts as a page of text."""
    experts = facts["num_experts"]
    lines = [
        f"{facts['folder']}: {facts['tokens']:,} tokens in windows of {facts['window']}, {facts['dtype']}; "
        f"{facts['num_experts_per_tok']} of {experts} experts per token (even load {1 / experts:.2%})",
        "",
        "layer  entropy  max/mean  least   most    dead  margin 1%  median   chosen together most",
    ]
    columns = ("layers", "entropy", "imbalance", "load", "dead_experts", "margin_p1", "margin_median", "most_together")
    for layer, even, worst, load, dead, low, median, (i, j, share) in zip(*(facts[name] for name in columns), strict=True):
        low, median = (" -" if value is None else f"{value:.2g}" for value in (low, median))
        lines.append(
            f"{layer:>5}  {even:7.4f}  {worst:8.2f}  {min(load):6.2%}  {max(load):6.2%}  {len(dead):4d}  {low:>9}  {median:>6}"
            f"   {i} and {j}: {share:.1%} of tokens"
        )
    lines += ["", "entropy of the load over ln E (1: even); max/mean 1: even; margin: k-th largest logit minus the next"]
    return "\n".join(lines)
