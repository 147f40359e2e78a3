"""Errors of lower precision: router flips apart from arithmetic, and forms of the experts against each other.

A model is run in float64, then in float32 and bfloat16 with the same weights, three times each: with its own routing,
with the experts of the float64 run (weights from its own logits), and with those experts and weights. The errors of the
replayed runs come from arithmetic; the further error of the unforced run comes from tokens that went to other experts.
--markdown FILE writes the tables between the marks in that page.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwen35moe
from benchmarks.tools.common import ROOT, logit_errors, output_path
from benchmarks.tools.machine import environment, header
from qwen35moe import backends
from qwen35moe.files import write_text
from qwen35moe.routing import Routing, agreement, flips, margins

BEGIN, END = "<!-- routing_numerics: begin -->", "<!-- routing_numerics: end -->"


@dataclass(frozen=True)
class Run:
    """One forward: logits [T, vocabulary] in float64, and the routing."""

    logits: Tensor
    routing: Routing


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m benchmarks routing_numerics", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a checkpoint: a folder, a Hub name, or tiny")
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "figures" / "passages.txt", help="a text, UTF-8")
    parser.add_argument("--tokens", type=int, default=1024, help="at most so many tokens of it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=output_path, help="write the figures here")
    parser.add_argument("--markdown", type=output_path, help="write the tables into this page, between its marks")
    options = parser.parse_args(argv)
    report = measure(options.model, options.text.read_text(encoding="utf-8"), options.tokens, options.device)
    text = tables(report)
    print(f"{header(report['environment'])}\n\n{text}")
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.markdown:
        page = options.markdown.read_text(encoding="utf-8")
        if BEGIN not in page or END not in page:
            raise SystemExit(f"{options.markdown} lacks the marks {BEGIN} and {END}")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        section = f"{BEGIN}\n{header(report['environment'])}\n\n{text}\n{END}"
        write_text(options.markdown, before + section + after)
    return int(not all(row["replay_bit_for_bit"] for row in report["dtypes"]))


@torch.no_grad()
def measure(name: str, text: str, tokens: int, device: str = "cpu") -> dict[str, Any]:
    """All figures, as in the JSON file."""
    model, tokenizer = qwen35moe.load(name, dtype="float64", device=device)
    ids = torch.tensor([tokenizer.encode(text)[:tokens]], device=device)
    truth = run(model, ids)
    margin = margins(truth.routing)
    del model
    dtypes, forms = [], []
    for dtype in ("float32", "bfloat16"):
        model, _ = qwen35moe.load(name, dtype=dtype, device=device)
        own = run(model, ids)
        again = run(model, ids, routing=own.routing)
        forced = replace(truth.routing, logits=None)
        dtypes.append({
            "dtype": dtype,
            "unforced": compare(own, truth),
            "experts replayed": compare(run(model, ids, routing=forced.indices_only()), truth),
            "experts and weights replayed": compare(run(model, ids, routing=forced), truth),
            "replay_bit_for_bit": torch.equal(again.logits, own.logits),
            "flips": flip_facts(own.routing, truth.routing, margin),
        })  # fmt: skip
        forms += form_facts(model, ids, dtype)
    return {"environment": environment(), "model": Path(name).name, "tokens": ids.shape[1], "dtypes": dtypes, "forms": forms}


def run(model: Any, ids: Tensor, routing: Routing | None = None) -> Run:
    out = model(ids, routing=routing, output_routing=True)
    return Run(out.logits[0].double(), out.routing)


def compare(actual: Run, truth: Run) -> dict[str, float]:
    """`logit_errors`, and the mean KL(truth || actual) in nats a token."""
    p, q = truth.logits.log_softmax(-1), actual.logits.log_softmax(-1)
    return {**logit_errors(actual.logits, truth.logits), "kl": float((p.exp() * (p - q)).sum(-1).mean())}


def flip_facts(actual: Routing, truth: Routing, margin: Tensor) -> dict[str, Any]:
    """Share of tokens with another set of experts, by layer; the largest margin at which that happened."""
    flipped = flips(actual, truth)
    moved = (actual.logits.double() - truth.logits.double()).abs().amax(-1) if actual.logits is not None else None  # type: ignore[union-attr]
    return {
        "by_layer": flipped.double().mean(1).tolist(),
        "share": float(flipped.double().mean()),
        "choices_changed": float(1 - agreement(actual, truth).mean()),
        "largest_margin": float(margin[flipped].max()) if bool(flipped.any()) else None,
        "median_margin": float(margin.median()),
        "router_logit_error": None if moved is None else float(moved.max()),
    }


def form_facts(model: Any, ids: Tensor, dtype: str) -> list[dict[str, Any]]:
    """Every form of the experts that this machine runs, against the definition in the same dtype: unforced, and with its
    routing."""
    rows = []
    model.use_backends(experts="loop")
    reference = run(model, ids)
    for form in backends.implementations("experts"):
        model.use_backends(experts=form.name)
        try:
            with backends.ran() as ran:
                unforced, replayed = run(model, ids), run(model, ids, routing=reference.routing)
        except ValueError as error:
            rows.append({"dtype": dtype, "form": form.name, "refused": str(error).splitlines()[0]})
            continue
        used = {name for operation, name in ran.counts if operation == "experts"}
        assert used == {form.name}, f"{form.name} was chosen, {used} ran"
        rows.append({
            "dtype": dtype, "form": form.name,
            "flips": int(flips(unforced.routing, reference.routing).sum()),
            "unforced": compare(unforced, reference)["max"], "replayed": compare(replayed, reference)["max"],
        })  # fmt: skip
    model.use_backends(experts="auto")
    return rows


def tables(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"`{report['model']}`, {report['tokens']} tokens, against the same weights in float64:", "",
        "| dtype | routing | largest error | rms error | KL, nats | same first token |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["dtypes"]:
        for which in ("unforced", "experts replayed", "experts and weights replayed"):
            c = row[which]
            lines.append(f"| {row['dtype']} | {which} | {c['max']:.1e} | {c['rms']:.1e} | {c['kl']:.1e} | {c['top1']:.2%} |")
    lines += ["", "| dtype | flips, all layers | by layer | choices changed | largest margin at a flip | largest error of a "
              "router logit | own routing replayed |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in report["dtypes"]:
        f = row["flips"]
        layers = " ".join(f"{share:.2%}" for share in f["by_layer"])
        largest = "no flip" if f["largest_margin"] is None else f"{f['largest_margin']:.1e}"
        bits = "bit for bit" if row["replay_bit_for_bit"] else "DIFFERS"
        lines.append(
            f"| {row['dtype']} | {f['share']:.2%} | {layers} | {f['choices_changed']:.2%} | {largest} | "
            f"{f['router_logit_error']:.1e} | {bits} |"
        )
    lines += ["", "Forms of the experts against the definition (`loop`) in the same dtype, largest error of the logits:", "",
              "| dtype | form | flips (token, layer) | unforced | routing replayed |", "|---|---|---|---|---|"]  # fmt: skip
    for row in report["forms"]:
        if "refused" in row:
            lines.append(f"| {row['dtype']} | {row['form']} | does not run: {row['refused'].split(': ', 1)[-1]} | | |")
        else:
            lines.append(f"| {row['dtype']} | {row['form']} | {row['flips']} | {row['unforced']:.1e} | {row['replayed']:.1e} |")
    return "\n".join(lines)
