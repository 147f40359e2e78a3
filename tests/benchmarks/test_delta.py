"""`python -m benchmarks delta` and `numerics` at small sizes: implementations, checks of answers, bytes. No timings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import delta
from benchmarks.delta import plot as delta_plot
from benchmarks.delta import targets
from benchmarks.delta.scenarios import GATES, Scenario, Sizes, draw_gates
from benchmarks.tools import numerics
from benchmarks.tools.common import Case, Timing
from benchmarks.tools.memory import saved_bytes
from qwen35moe import backends
from qwen35moe.ops.cpu.delta_rule import gated_delta_rule_torch

SMALL = Sizes(hidden=40, groups=2, heads=6, key=16, value=8, taps=4)


@pytest.fixture(autouse=True)
def without_triton_s_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes most of a minute here; tests/triton/ compares the kernels' values with the definitions."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def compared(scenario: Scenario) -> Case:
    case = Case(scenario.id, rounds=1)
    delta.run(case, scenario, sizes=SMALL, warmup=0)
    return case


@pytest.fixture
def wrong() -> Iterator[None]:
    """An implementation in front of all others whose output is 5 % too large."""

    def off(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, state = gated_delta_rule_torch(*args, **options)
        return out * 1.05, state

    backends.register("gated_delta_rule", "off", off, before=backends.implementations("gated_delta_rule")[0].name)
    yield
    backends.unregister("gated_delta_rule", "off")


@pytest.mark.parametrize(
    "scenario,implementations",
    [
        (Scenario("rule", 40), {"transformers", "ours torch", "ours recurrent"}),
        (Scenario("rule", 70, "transformers", "train"), {"transformers", "ours torch"}),
        (Scenario("rule", 1, batch=3), {"transformers", "ours torch", "ours recurrent"}),
        (Scenario("convolution", 33, mode="train"), {"transformers", "ours torch"}),
        (Scenario("layer", 70, dtype="fp32"), {"transformers", "ours"}),
        (Scenario("layer", 70, "transformers", "train"), {"transformers", "ours"}),
        (Scenario("step", 1, layers=3, batch=2), {"transformers", "ours"}),
        (Scenario("fused_step", 1, batch=3), {"ours torch"}),
    ],
    ids=lambda value: value.id if isinstance(value, Scenario) else "",
)
def test_every_operation_is_checked_counted_and_timed(scenario: Scenario, implementations: set[str]) -> None:
    case = compared(scenario)
    assert not case.wrong and implementations <= case.timings.keys() == case.errors.keys()
    assert all(0 < error < delta.bound(scenario, "d_") for error in case.errors.values())
    assert case.facts["auto"] in case.timings and case.facts["tokens"] == scenario.tokens
    if scenario.mode == "train":
        saved = {name: figures["saved_bytes"] for name, figures in case.figures.items()}
        assert all(saved[name] > 0 for name in implementations)
    if scenario.layers > 1:
        assert case.figures["ours"]["per_layer_s"] == case.timings["ours"].min / scenario.layers
    if scenario.tokens == 1:
        assert all(figures["gb_per_s"] > 0 for figures in case.figures.values())


def test_implementations_that_cannot_run_are_listed_with_a_reason() -> None:
    case = compared(Scenario("rule", 70, mode="train"))
    assert "definition" in case.refused["ours recurrent"] and "no backward" in case.refused["ours chunked_cpu"]
    assert "fla" in case.refused and any("not run: " in line for line in case.table())


@pytest.mark.usefixtures("wrong")
def test_a_wrong_implementation_is_not_timed_and_the_library_s_choice_is_named() -> None:
    case = compared(Scenario("rule", 40))
    assert case.facts["auto"] == "ours off" and "ours off" in case.wrong and "ours off" not in case.timings
    assert "ours torch" in case.timings
    layer = compared(Scenario("layer", 40))
    assert "ours" in layer.errors  # the gated norm that follows removes a factor of 5 % on every head's output
    backends.unregister("gated_delta_rule", "off")
    backends.register("gated_delta_rule", "off", lambda *a, **k: 1 / 0, before="torch")
    assert "ZeroDivisionError" in compared(Scenario("rule", 40)).wrong["ours off"]


def test_saved_bytes_counts_each_storage_once_and_no_weights() -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    assert saved_bytes(lambda: torch.nn.functional.linear(x, weight), [weight]) == x.nbytes
    assert saved_bytes(lambda: x * x.mT.mT) == x.nbytes  # two views of one storage
    assert saved_bytes(lambda: x.exp().sum()) == x.nbytes  # the result, as long as the graph holds it


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_read_their_scenarios(device: str) -> None:
    """Invented cases: our implementations take 1 s and save 1 KiB per token, the others 10 times that."""
    cases = []
    for scenario in targets.scenarios(device):
        names = {"transformers": 10.0, "fla": 10.0, "ours": 1.0, "ours torch": 1.0, "ours triton": 1.0}
        case = Case(scenario.id, facts={"auto": "ours torch" if scenario.operation == "rule" else "ours"})
        case.timings = {name: Timing((seconds,)) for name, seconds in names.items()}
        saved = {name: seconds * 1024 * scenario.tokens for name, seconds in names.items()}
        case.figures = {name: {"saved_bytes": saved[name], "of_copy": 0.5} for name in names}
        if scenario.operation == "fused_step":
            case.facts["auto"] = "ours torch"
        cases.append(case)
    rows = targets.verdicts(cases, device)
    assert len(rows) == len(targets.targets(device)) > 10
    verdicts = {row["quantity"]: row["verdict"] for row in rows}
    assert [quantity for quantity, verdict in verdicts.items() if verdict != "met"] == (
        ["one-token step, 64 rows: share of the copy rate"] if device == "cuda" else []
    )
    assert targets.verdicts(cases[:1], device) != rows  # a scenario that was not run has no row


def test_the_command_line_chooses_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*argv: str) -> list[str]:
        return [s.id for s in delta.choose(delta.parser().parse_args(argv))]

    assert ids() == ids("--targets") == [s.id for s in targets.scenarios("cpu")]
    assert ids("--only", "layer/T512") == [f"layer/T512/{gates}/bf16/forward" for gates in GATES]
    assert ids("--operations", "rule,step", "--tokens", "64,128", "--gates", "ordinary", "--modes", "train") == [
        "rule/T64/ordinary/bf16/train", "rule/T128/ordinary/bf16/train", "step/T1/L12/ordinary/bf16/forward"
    ]
    assert len(set(ids("--device", "cuda"))) == len(ids("--device", "cuda")) > 10
    with pytest.raises(SystemExit):
        ids("--operations", "rules")
    assert "rules: not of rule, convolution" in capsys.readouterr().err


def test_a_report_its_schema_and_its_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(delta.COMPARISONS, "rule", lambda s, device, _: delta.operations.rule(s, device, SMALL))
    path = tmp_path / "report.json"
    argv = ["--operations", "rule", "--tokens", "16,32", "--gates", "ordinary", "--rounds", "1", "--json", str(path)]
    assert delta.main(argv) == 0
    report = json.loads(path.read_text())
    assert report["schema"] == 2 and report["targets"] == []
    assert [case["facts"]["tokens"] for case in report["cases"]] == [16, 32]
    kinds = [Scenario("rule", 8), Scenario("rule", 8, "ordinary", "train"), Scenario("rule", 8, batch=2),
             Scenario("rule", 8, dtype="fp32"), Scenario("rule", 8, layers=3), Scenario("layer", 8)]  # fmt: skip
    assert len({delta_plot.title(asdict(kind)) for kind in kinds}) == len(kinds)
    assert report["cases"][0]["implementations"]["ours torch"]["ratio"] > 0
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        with pytest.raises(ValueError, match=r"qwen35moe\[plot\]"):
            delta.draw(report, tmp_path / "plot.png")
    else:
        delta.draw(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_gates_that_are_drawn() -> None:
    """ordinary: a head keeps between e^-0.001 and e^-2 per token in the median; transformers' init erases the state at once."""
    rng = torch.Generator().manual_seed(0)
    ordinary, init = (draw_gates(gates, 1, 200, 400, rng) for gates in GATES)
    assert ordinary.max() < 0 and init.max() < 0
    assert -0.3 < ordinary.median() < -0.01 and -14 < init.median() < -6


def test_numerics_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every form that runs has its rows, and ours are within the bounds of the contract."""
    path = tmp_path / "numerics.md"
    assert numerics.main(["--tokens", "40", "--write", str(path)]) == 0
    text = path.read_text()
    assert all(f"## {gates} gates" in text for gates in numerics.GATES)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = [row for row in table if row[0] != "form"]
    forms = {row[0] for row in table}
    assert {"chunked_cpu", "torch", "recurrent", "transformers chunk"} <= forms
    in_double = {row[0] for row in table if row[1] == "float64"}
    assert in_double == {form for form in forms if not form.startswith("transformers")} - {"recurrent", "triton"}
    assert len(table) == (2 * len(forms) + len(in_double)) * len(numerics.GATES)
    for form, dtype, _, *cells in table:
        if not form.startswith(("transformers", "fla")):
            bounds = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-2}
            assert all(cell == "-" or float(cell) <= bounds[dtype] for cell in cells[:-1]), (form, dtype, cells)
            assert cells[-1] == "-" or float(cells[-1]) <= max(1e-4, bounds[dtype]), (form, dtype, cells)
