"""Gated DeltaNet: rule, convolution, layer, cached token; all implementations beside transformers, fla and causal_conv1d.

Without arguments: the scenarios that the targets need, and the table of targets at the end. Otherwise the product of the
lists:

    python -m benchmarks delta --operations rule,layer --tokens 512,1024,2048,4096 --plot delta.png
    python -m benchmarks delta --device cuda

Sizes are those of Qwen3.5-35B-A3B (hidden 2048, 16 key heads, 32 value heads, 128 wide, 4 taps). Every answer is first
compared with float64; a wrong implementation is not timed. Ratios are of minima of interleaved runs. Bytes: saved_bytes,
which autograd keeps for the backward, with inputs and without weights; peak_bytes, on a GPU, of forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.delta import layers, operations
from benchmarks.delta.plot import draw
from benchmarks.delta.scenarios import DTYPES, FULL_SIZE, GATES, MODES, Comparison, Scenario, Sizes
from benchmarks.delta.targets import scenarios, verdicts
from benchmarks.tools.common import Case, Report, Timing, arguments, interleave, limit_dtypes, touch
from benchmarks.tools.memory import peak_bytes, saved_bytes
from qwen35moe.backends.verification import BOUNDS

COMPARISONS: dict[str, Callable[[Scenario, str, Sizes], Comparison]] = {
    "rule": operations.rule, "convolution": operations.convolution, "layer": layers.layer, "step": layers.step,
    "fused_step": operations.fused_step,
}
WHOLE_LAYER = 2  # times the bounds of one operation: a layer rounds its values between five of them


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    dtypes = limit_dtypes(options, DTYPES[options.dtype])
    report = Report("delta", device=options.device, rounds=options.rounds, dtypes=dtypes)
    copied = copy_rate(options.device) if options.device.startswith("cuda") else None
    for scenario in choose(options):
        with report.case(scenario.id) as case:
            case.limits = report.limits_of(scenario.dtype)
            run(case, scenario, copied, warmup=options.warmup)
    rows = verdicts(report.cases, options.device)
    report.extra["targets"] = rows
    if rows:
        print("\nquantity | target | measured | verdict\n---|---|---|---")
        print("\n".join(" | ".join(map(str, row.values())) for row in rows))
    if options.plot:
        draw(report.as_dict(), options.plot)
        options.plot = None
    return report.finish(options)


def parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--warmup", type=int, default=1, help="runs of each implementation that are not counted")
    parser.add_argument("--targets", action="store_true", help="the scenarios of the targets (the default)")
    parser.add_argument("--only", default="", help="of those, the ones whose id begins with this")
    parser.add_argument("--operations", type=_listed(tuple(COMPARISONS)), help=f"with commas, of {', '.join(COMPARISONS)}")
    parser.add_argument("--tokens", type=_listed(), help="lengths, with commas")
    parser.add_argument("--gates", type=_listed(GATES), help=f"with commas, of {', '.join(GATES)}")
    parser.add_argument("--modes", type=_listed(MODES), help="forward, train (forward and backward)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, default=12, help="of the operation step")
    return parser


def _listed(allowed: tuple[str, ...] | None = None) -> Callable[[str], list]:
    def parse(text: str) -> list:
        names = text.split(",")
        if allowed is None:
            return [int(name) for name in names]
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not of {', '.join(allowed)}")
        return names

    return parse


def choose(options: argparse.Namespace) -> Iterator[Scenario]:
    """The scenarios of the command line."""
    lists = (options.operations, options.tokens, options.gates, options.modes)
    if options.targets or not any(lists):
        yield from (s for s in scenarios(options.device) if s.id.startswith(options.only))
        return
    names, lengths, gates, modes = lists
    product = itertools.product(names or ["rule", "layer"], lengths or [512, 2048], gates or GATES, modes or MODES[:1])
    ids: set[str] = set()
    for operation, tokens, gate, mode in product:
        decode = operation in ("step", "fused_step")
        scenario = Scenario(
            operation, 1 if decode else tokens, gate, "forward" if decode else mode, options.batch, options.dtype,
            options.layers if operation == "step" else 1,
        )
        if scenario.id not in ids:
            ids.add(scenario.id)
            yield scenario


def run(case: Case, scenario: Scenario, copied: float | None = None, sizes: Sizes = FULL_SIZE, warmup: int = 1) -> None:
    """Check the answer of every implementation of the scenario, count its bytes, and time those that are right."""
    comparison = COMPARISONS[scenario.operation](scenario, case.device, sizes)
    case.facts.update(asdict(scenario), auto=comparison.auto)
    case.refused.update(comparison.refused)
    case.needed.update(needed(scenario, comparison))
    truth = comparison.truth()
    runs = {
        name: partial(implementation.answer, scenario.mode, comparison.cotangents)
        for name, implementation in comparison.implementations.items()
    }
    for name, implementation in comparison.implementations.items():
        try:
            answer = comparison.view(runs[name]())
            for value in (value for value in truth if value in answer):
                case.check(name, answer[value], truth[value], bound=bound(scenario, value))
        except Exception as error:  # a broken implementation is reported and not timed; the others still are
            case.wrong[name] = f"{type(error).__name__}: {error}"
            continue
        del answer
        figures = case.figures.setdefault(name, {})
        if scenario.mode == "train":
            figures["saved_bytes"] = saved_bytes(implementation.forward, comparison.weights)
        if case.device.startswith("cuda"):
            figures["peak_bytes"] = peak_bytes(runs[name], case.device)
    del truth
    touch(*comparison.inputs)
    case.time(runs, baseline=comparison.baseline, warmup=warmup)
    for name, timing in case.timings.items():
        _rates(case.figures.setdefault(name, {}), timing, scenario, comparison, copied)


def needed(scenario: Scenario, comparison: Comparison) -> dict[str, float]:
    """The least bytes and operations of a whole layer: each weight once, and its products; the rule is not counted."""
    weights = {w.data_ptr(): w for w in comparison.weights if w.dim() == 2}  # both libraries' are the same memory
    if scenario.operation not in ("layer", "step") or not weights:
        return {}
    passes = 3 if scenario.mode == "train" else 1
    rows = scenario.batch * (1 if scenario.operation == "step" else scenario.tokens)
    flops = 2.0 * passes * rows * sum(w.numel() for w in weights.values())
    return {"nbytes": float(comparison.moved or sum(w.nbytes for w in weights.values())), "flops": flops}


def _rates(figures: dict[str, float], timing: Timing, scenario: Scenario, comparison: Comparison, copied: float | None) -> None:
    if scenario.layers > 1:
        figures["per_layer_s"] = timing.min / scenario.layers
    if comparison.moved:
        figures["gb_per_s"] = comparison.moved / timing.min / 1e9
        if copied:
            figures["of_copy"] = figures["gb_per_s"] / copied


def bound(scenario: Scenario, value: str) -> float:
    """The error that an answer may have: that of `backends.verify` for one operation, twice that for a whole layer."""
    forward, backward = BOUNDS[DTYPES[scenario.dtype]]
    whole = WHOLE_LAYER if scenario.operation in ("layer", "step") else 1
    return whole * (backward if value.startswith("d_") else forward)


def copy_rate(device: str, nbytes: int = 1 << 30) -> float:
    """GB/s, read and written, of a copy on this device: the limit of a memory-bound operation."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / interleave({"copy": lambda: target.copy_(source)}, device=device)["copy"].min / 1e9
