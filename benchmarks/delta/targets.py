"""Targets of the fast paths: the scenarios that they need, and the table of target and measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.delta.scenarios import GATES, Scenario
from benchmarks.tools.common import Case

LONG = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Target:
    """measure computes the quantity from the cases by id; it raises KeyError if one of them did not run."""

    quantity: str
    target: float
    at_most: bool
    measure: Callable[[dict[str, Case]], float]

    def row(self, cases: dict[str, Case]) -> dict[str, object] | None:
        """The row of the table; None if a scenario was not run."""
        try:
            value = self.measure(cases)
        except KeyError:
            return None
        met = value <= self.target if self.at_most else value >= self.target
        sign = "<=" if self.at_most else ">="
        return {
            "quantity": self.quantity, "target": f"{sign} {self.target:g}", "measured": f"{value:.3g}",
            "verdict": "met" if met else "missed",
        }


def scenarios(device: str) -> list[Scenario]:
    """The scenarios that the targets of a device need."""
    if device.startswith("cuda"):
        return [
            *(Scenario("rule", tokens, mode=mode) for mode in ("forward", "train") for tokens in LONG),
            *(Scenario("layer", tokens) for tokens in (512, 2048, 8192)), Scenario("layer", 2048, mode="train"),
            Scenario("convolution", 8192), Scenario("rule", 1, batch=64), Scenario("step", 1, batch=64, layers=12),
            Scenario("fused_step", 1), Scenario("fused_step", 1, batch=64),
        ]
    return [
        *(Scenario("rule", 2048, gates) for gates in GATES), Scenario("convolution", 2048),
        *(Scenario("layer", tokens, gates) for tokens in (512, 2048) for gates in GATES),
        Scenario("step", 1, layers=12), Scenario("rule", 1024, mode="train"),
        *(Scenario("layer", 1024, gates, "train") for gates in GATES),
    ]


def targets(device: str) -> list[Target]:
    """The targets of a device."""
    return list(_cuda()) if device.startswith("cuda") else list(_cpu())


def verdicts(cases: Sequence[Case], device: str) -> list[dict[str, object]]:
    """A row for every target whose scenarios were run."""
    by_id = {case.id: case for case in cases}
    return [row for target in targets(device) if (row := target.row(by_id)) is not None]


def _seconds(cases: dict[str, Case], scenario: Scenario, name: str | None = None) -> float:
    case = cases[scenario.id]
    return case.timings[name or case.facts["auto"]].min


def _faster(scenario: Scenario) -> Callable[[dict[str, Case]], float]:
    return lambda cases: _seconds(cases, scenario, "transformers") / _seconds(cases, scenario)


def _slower(scenario: Scenario, name: str, other: str) -> Callable[[dict[str, Case]], float]:
    return lambda cases: _seconds(cases, scenario, name) / _seconds(cases, scenario, other)


def _init(operation: str, tokens: int) -> Callable[[dict[str, Case]], float]:
    hard, ordinary = (Scenario(operation, tokens, gates) for gates in ("transformers", "ordinary"))
    return lambda cases: _seconds(cases, hard) / _seconds(cases, ordinary)


def _figure(scenario: Scenario, key: str, name: str | None = None) -> Callable[[dict[str, Case]], float]:
    def measure(cases: dict[str, Case]) -> float:
        case = cases[scenario.id]
        return case.figures[name or case.facts["auto"]][key]

    return measure


def _share(scenario: Scenario) -> Callable[[dict[str, Case]], float]:
    ours, theirs = _figure(scenario, "saved_bytes"), _figure(scenario, "saved_bytes", "transformers")
    return lambda cases: ours(cases) / theirs(cases)


def _cpu():  # noqa: ANN202
    for gates in GATES:
        yield Target(f"rule, T=2048, {gates} gates: times faster", 3, False, _faster(Scenario("rule", 2048, gates)))
    for gates in GATES:
        yield Target(f"layer, T=2048, {gates} gates: times faster", 3.5, False, _faster(Scenario("layer", 2048, gates)))
    for gates in GATES:
        yield Target(f"layer, T=512, {gates} gates: times faster", 2.3, False, _faster(Scenario("layer", 512, gates)))
    for operation in ("rule", "layer"):
        quantity = f"{operation}, T=2048: our time at transformers' init / ordinary"
        yield Target(quantity, 1.15, True, _init(operation, 2048))
    yield Target("one cached token, 12 layers in turn: times faster", 1.4, False, _faster(Scenario("step", 1, layers=12)))
    for gates, target in zip(GATES, (2, 3), strict=True):
        scenario = Scenario("layer", 1024, gates, "train")
        yield Target(f"layer forward + backward, T=1024, {gates} gates: times faster", target, False, _faster(scenario))
        yield Target("the same: saved bytes / transformers'", 0.25, True, _share(scenario))
    rule = Scenario("rule", 1024, mode="train")
    saved = _figure(rule, "saved_bytes")
    yield Target("rule, T=1024: KiB saved per token", 64, True, lambda cases: saved(cases) / rule.tokens / 1024)
    yield Target("rule forward + backward, T=1024: times faster", 1, False, _faster(rule))


def _cuda():  # noqa: ANN202
    for tokens in LONG:
        forward, train = Scenario("rule", tokens), Scenario("rule", tokens, mode="train")
        yield Target(f"rule, T={tokens}: our Triton / fla", 1.3, True, _slower(forward, "ours triton", "fla"))
        yield Target(f"rule forward + backward, T={tokens}: our Triton / fla", 1.5, True, _slower(train, "ours triton", "fla"))
        yield Target(f"rule, T={tokens}: plain PyTorch / fla", 3, True, _slower(forward, "ours torch", "fla"))
    fused = Scenario("fused_step", 1, batch=64)
    yield Target("one-token step, 64 rows: share of the copy rate", 0.6, False, _figure(fused, "of_copy"))
