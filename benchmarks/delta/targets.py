"""What the fast paths are asked for: the situations it takes, and the table of asked and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common import Case
from benchmarks.delta.situations import GATES, Situation

LONG = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Target:
    """measure gives a number from the cases by id, or raises KeyError where something for it did not run."""

    what: str
    asked: float
    at_most: bool
    measure: Callable[[dict[str, Case]], float]

    def row(self, cases: dict[str, Case]) -> dict[str, object] | None:
        """What is printed and written; None when its situations were not run."""
        try:
            found = self.measure(cases)
        except KeyError:
            return None
        met = found <= self.asked if self.at_most else found >= self.asked
        sign = "<=" if self.at_most else ">="
        verdict = "met" if met else "missed"
        return {"what": self.what, "asked": f"{sign} {self.asked:g}", "found": f"{found:.3g}", "verdict": verdict}


def situations(device: str) -> list[Situation]:
    """Those that the targets of a device speak of."""
    if device.startswith("cuda"):
        found = [Situation("rule", tokens, mode=mode) for mode in ("forward", "train") for tokens in LONG]
        found += [Situation("layer", tokens) for tokens in (512, 2048, 8192)] + [Situation("layer", 2048, mode="train")]
        found += [Situation("convolution", 8192), Situation("rule", 1, batch=64), Situation("step", 1, batch=64, layers=12)]
        return [*found, Situation("fused_step", 1), Situation("fused_step", 1, batch=64)]
    found = [Situation("rule", 2048, gates) for gates in GATES] + [Situation("convolution", 2048)]
    found += [Situation("layer", tokens, gates) for tokens in (512, 2048) for gates in GATES]
    found += [Situation("step", 1, layers=12), Situation("rule", 1024, mode="train")]
    return found + [Situation("layer", 1024, gates, "train") for gates in GATES]


def targets(device: str) -> list[Target]:
    """In the order of the issue."""
    return list(_cuda()) if device.startswith("cuda") else list(_cpu())


def judged(cases: Sequence[Case], device: str) -> list[dict[str, object]]:
    """A row for every target whose situations were run."""
    by_id = {case.id: case for case in cases}
    return [row for target in targets(device) if (row := target.row(by_id)) is not None]


def _ours(case: Case) -> str:
    return str(case.facts["auto"])


def _seconds(cases: dict[str, Case], situation: Situation, name: str | None = None) -> float:
    case = cases[situation.id]
    return case.timings[name or _ours(case)].min


def _faster(situation: Situation) -> Callable[[dict[str, Case]], float]:
    return lambda cases: _seconds(cases, situation, "transformers") / _seconds(cases, situation)


def _slower(situation: Situation, name: str, other: str) -> Callable[[dict[str, Case]], float]:
    return lambda cases: _seconds(cases, situation, name) / _seconds(cases, situation, other)


def _init(operation: str, tokens: int) -> Callable[[dict[str, Case]], float]:
    hard, ordinary = (Situation(operation, tokens, gates) for gates in ("transformers", "ordinary"))
    return lambda cases: _seconds(cases, hard) / _seconds(cases, ordinary)


def _figure(situation: Situation, key: str, name: str | None = None) -> Callable[[dict[str, Case]], float]:
    def measure(cases: dict[str, Case]) -> float:
        case = cases[situation.id]
        return case.figures[name or _ours(case)][key]

    return measure


def _share(situation: Situation) -> Callable[[dict[str, Case]], float]:
    ours, theirs = _figure(situation, "saved_bytes"), _figure(situation, "saved_bytes", "transformers")
    return lambda cases: ours(cases) / theirs(cases)


def _cpu():  # noqa: ANN202
    for gates in GATES:
        yield Target(f"rule, T=2048, {gates} gates: times faster", 3, False, _faster(Situation("rule", 2048, gates)))
    for gates in GATES:
        yield Target(f"layer, T=2048, {gates} gates: times faster", 3.5, False, _faster(Situation("layer", 2048, gates)))
    for gates in GATES:
        yield Target(f"layer, T=512, {gates} gates: times faster", 2.3, False, _faster(Situation("layer", 512, gates)))
    for operation in ("rule", "layer"):
        what = f"{operation}, T=2048: our time at transformers' init / ordinary"
        yield Target(what, 1.15, True, _init(operation, 2048))
    yield Target("one cached token, 12 layers in turn: times faster", 1.4, False, _faster(Situation("step", 1, layers=12)))
    for gates, asked in zip(GATES, (2, 3), strict=True):
        situation = Situation("layer", 1024, gates, "train")
        yield Target(f"layer forward + backward, T=1024, {gates} gates: times faster", asked, False, _faster(situation))
        yield Target("the same: saved bytes / transformers'", 0.25, True, _share(situation))
    rule = Situation("rule", 1024, mode="train")
    saved = _figure(rule, "saved_bytes")
    yield Target("rule, T=1024: KiB saved per token", 64, True, lambda cases: saved(cases) / rule.tokens / 1024)
    yield Target("rule forward + backward, T=1024: times faster", 1, False, _faster(rule))


def _cuda():  # noqa: ANN202
    for tokens in LONG:
        forward, train = Situation("rule", tokens), Situation("rule", tokens, mode="train")
        yield Target(f"rule, T={tokens}: our Triton / fla", 1.3, True, _slower(forward, "ours triton", "fla"))
        yield Target(f"rule forward + backward, T={tokens}: our Triton / fla", 1.5, True, _slower(train, "ours triton", "fla"))
        yield Target(f"rule, T={tokens}: plain PyTorch / fla", 3, True, _slower(forward, "ours torch", "fla"))
    fused = Situation("fused_step", 1, batch=64)
    yield Target("one-token step, 64 rows: share of the copy rate", 0.6, False, _figure(fused, "of_copy"))
