"""Gated DeltaNet: rule, convolution, layer, cached token; every implementation, transformers, fla and causal_conv1d.

Without arguments: the situations that the targets speak of, and the table of targets at the end. Otherwise the product of
what is given:

    python -m benchmarks delta --operations rule,layer --tokens 512,1024,2048,4096 --plot delta.png
    python -m benchmarks delta --device cuda

Sizes are those of Qwen3.5-35B-A3B (hidden 2048, 16 key heads, 32 value heads, 128 wide, 4 taps). Every contestant's answer
is compared with float64 first; one that is wrong has no time. Ratios are of minima of interleaved runs. Bytes: saved_bytes,
what autograd keeps for the backward, inputs included and weights not; peak_bytes, on a GPU, of forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from benchmarks.common import Case, Report, Timing, arguments, interleave, peak_bytes, saved_bytes, touch
from benchmarks.delta import layers, operations
from benchmarks.delta.lines import draw
from benchmarks.delta.situations import DTYPES, FULL_SIZE, GATES, MODES, Race, Situation, Sizes
from benchmarks.delta.targets import judged, situations
from qwen35moe.backends.verification import BOUNDS

RACES: dict[str, Callable[[Situation, str, Sizes], Race]] = {
    "rule": operations.rule, "convolution": operations.convolution, "layer": layers.layer, "step": layers.step,
    "fused_step": operations.fused_step,
}
WHOLE_LAYER = 2  # times the bounds of one operation: a layer rounds its values between five of them


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    report = Report("delta", device=options.device, rounds=options.rounds)
    copied = copy_rate(options.device) if options.device.startswith("cuda") else None
    for situation in chosen(options):
        with report.case(situation.id) as case:
            run(case, situation, copied, warmup=options.warmup)
    rows = judged(report.cases, options.device)
    report.extra["targets"] = rows
    if rows:
        print("\ntarget | asked | measured | verdict\n---|---|---|---")
        print("\n".join(" | ".join(map(str, row.values())) for row in rows))
    if options.plot:
        draw(report.as_dict(), options.plot)
        options.plot = None
    return report.finish(options)


def parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--warmup", type=int, default=1, help="runs of each contestant that are not counted")
    parser.add_argument("--targets", action="store_true", help="the situations of the targets (the default)")
    parser.add_argument("--only", default="", help="of those, the ones whose id begins so")
    parser.add_argument("--operations", type=_listed(tuple(RACES)), help=f"of {', '.join(RACES)}")
    parser.add_argument("--tokens", type=_listed(), help="lengths")
    parser.add_argument("--gates", type=_listed(GATES), help=f"of {', '.join(GATES)}")
    parser.add_argument("--modes", type=_listed(MODES), help="forward, train (forward and backward)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, default=12, help="of the operation step")
    return parser


def _listed(known: tuple[str, ...] | None = None) -> Callable[[str], list]:
    def parse(text: str) -> list:
        names = text.split(",")
        if known is None:
            return [int(name) for name in names]
        if wrong := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: not of {', '.join(known)}")
        return names

    return parse


def chosen(options: argparse.Namespace) -> Iterator[Situation]:
    """What the command line asks for."""
    free = (options.operations, options.tokens, options.gates, options.modes)
    if options.targets or not any(free):
        yield from (s for s in situations(options.device) if s.id.startswith(options.only))
        return
    names, lengths, gates, modes = free
    product = itertools.product(names or ["rule", "layer"], lengths or [512, 2048], gates or GATES, modes or MODES[:1])
    known: set[str] = set()
    for operation, tokens, gate, mode in product:
        single = operation in ("step", "fused_step")
        situation = Situation(
            operation, 1 if single else tokens, gate, "forward" if single else mode, options.batch, options.dtype,
            options.layers if operation == "step" else 1,
        )
        if situation.id not in known:
            known.add(situation.id)
            yield situation


def run(case: Case, situation: Situation, copied: float | None = None, sizes: Sizes = FULL_SIZE, warmup: int = 1) -> None:
    """Judge every contestant of the situation, count its bytes, and time those that are right."""
    race = RACES[situation.operation](situation, case.device, sizes)
    case.facts.update(asdict(situation), auto=race.auto)
    case.refused.update(race.refused)
    truth = race.truth()
    for name, contestant in race.contestants.items():
        try:
            found = race.view(contestant.answer(situation.mode, race.cotangents))
            for value in (value for value in truth if value in found):
                case.check(name, found[value], truth[value], bound=bound(situation, value))
        except Exception as error:  # one broken contestant must not take the report with it; it has no time
            case.wrong[name] = f"{type(error).__name__}: {error}"
            continue
        del found
        figures = case.figures.setdefault(name, {})
        if situation.mode == "train":
            figures["saved_bytes"] = saved_bytes(contestant.forward, race.weights)
        if case.device.startswith("cuda"):
            figures["peak_bytes"] = peak_bytes(lambda c=contestant: c.answer(situation.mode, race.cotangents), case.device)
    del truth
    touch(*race.inputs)
    runs = {
        name: (lambda c=contestant: c.answer(situation.mode, race.cotangents))
        for name, contestant in race.contestants.items()
    }
    case.time(runs, baseline=race.baseline, warmup=warmup)
    for name, timing in case.timings.items():
        _rates(case.figures.setdefault(name, {}), timing, situation, race, copied)


def _rates(figures: dict[str, float], timing: Timing, situation: Situation, race: Race, copied: float | None) -> None:
    if situation.layers > 1:
        figures["per_layer_s"] = timing.min / situation.layers
    if race.moved:
        figures["gb_per_s"] = race.moved / timing.min / 1e9
        if copied:
            figures["of_copy"] = figures["gb_per_s"] / copied


def bound(situation: Situation, value: str) -> float:
    """The error that an answer may have: that of `backends.verify` for one operation, twice that for a whole layer."""
    forward, backward = BOUNDS[DTYPES[situation.dtype]]
    whole = WHOLE_LAYER if situation.operation in ("layer", "step") else 1
    return whole * (backward if value.startswith("d_") else forward)


def copy_rate(device: str, nbytes: int = 1 << 30) -> float:
    """GB/s, read and written, of a plain copy on this device: what a memory-bound operation is measured against."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / interleave({"copy": lambda: target.copy_(source)}, device=device)["copy"].min / 1e9
