"""The dispatch benchmark itself, at tiny sizes: what it refuses, compares and repeats. No timings are judged."""

from __future__ import annotations

import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.__main__ import main
from benchmarks.moe import make_parser, merged, repeatable, targets
from benchmarks.moe.cases import Case, rotation, scores, shapes
from benchmarks.moe.implementations import ADAPTERS, implementations, reasons
from benchmarks.moe.measure import AnswerCheck, measure, peak
from benchmarks.moe.packed import PRODUCTS
from benchmarks.moe.report import markdown, panels, plot, table
from benchmarks.moe.roofline import limit, work
from benchmarks.tools import common, compare
from qwen35moe import ops

loop_experts = ops.experts.definition

QUICK = ["--preset", "tiny", "--rounds", "3", "--no-memory", "--seconds", "0.01", "--cache", "1"]
ROOF = {"read_gbps": 10.0, "product_tflops": 1.0}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of other people's kernels."""
    module: Any = types.ModuleType("somebodys")
    module.right = loop_experts
    module.wrong = lambda *arguments: loop_experts(*arguments) * 1.1
    module.narrow = lambda *arguments: loop_experts(*arguments)[:, :-1]

    def slow(*arguments: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return loop_experts(*arguments)

    module.slow = slow
    monkeypatch.setitem(sys.modules, "somebodys", module)
    return module


def report(tmp_path: Path, name: str, *more: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / name
    status = main(["moe", *QUICK, "--json", str(file), *more])
    return status, json.loads(file.read_text())


def test_a_wrong_implementation_is_not_timed(tmp_path: Path, kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    impl = [word for name in ("right", "wrong", "narrow") for word in ("--impl", f"{name}=somebodys:{name}")]
    status, written = report(tmp_path, "a.json", "--tokens", "5", "--dtype", "fp32", "--only", "right,wrong,narrow", *impl)
    rows = written["cases"][0]["implementations"]
    assert status == 1 and written["schema"] == 2
    assert rows["right"]["min_s"] > 0 and rows["right"]["wrong"] is None
    assert "min_s" not in rows["wrong"] and "relative errors 1.0e-01" in rows["wrong"]["wrong"]
    assert "min_s" not in rows["narrow"] and rows["narrow"]["wrong"].startswith("ValueError: it returned [5, ")
    assert "], expected [5, " in rows["narrow"]["wrong"]
    assert "not timed: relative errors" in capsys.readouterr().out


def test_a_slower_one_gives_exit_status_1(tmp_path: Path, kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["--tokens", "3", "--only", "mine"]
    report(tmp_path, "a.json", *cases, "--impl", "mine=somebodys:right")
    report(tmp_path, "b.json", *cases, "--impl", "mine=somebodys:slow")
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["compare", *files]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["compare", *files[::-1]]) == 0
    assert "faster" in capsys.readouterr().out
    assert main(["compare", files[0], files[0]]) == 0
    wrong = report(tmp_path, "c.json", *cases, "--impl", "mine=somebodys:wrong")
    assert wrong[0] == 1 and main(["compare", files[0], str(tmp_path / "c.json")]) == 1
    assert "not timed in c.json" in capsys.readouterr().out


@pytest.mark.parametrize("low,high,expected", [
    (1.03, 2.0, "SLOWER"), (0.5, 0.97, "faster"), (0.99, 1.01, "same"), (0.98, 1.02, "same"), (0.086, 22.9, "undecided"),
    (0.99, 1.03, "undecided"), (0.97, 1.01, "undecided"), (1.01, 1.5, "undecided"),
])  # fmt: skip
def test_a_wide_interval_decides_nothing(low: float, high: float, expected: str) -> None:
    assert compare.verdict(low, high, 0.02) == expected


def test_comparing_measurements_that_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(name: str, seconds: list[float]) -> str:
        one = {"min_s": min(seconds), "median_s": sorted(seconds)[len(seconds) // 2], "runs": len(seconds), "seconds": seconds}
        cases = [{"id": "moe/x", "implementations": {"mine": one}}]
        (tmp_path / name).write_text(json.dumps({"schema": 2, "benchmark": "moe", "cases": cases}))
        return str(tmp_path / name)

    quiet, busy = written("a.json", [1.0, 1.001, 1.002]), written("b.json", [0.1, 1.0, 20.0])
    assert main(["compare", quiet, busy]) == 0
    assert "undecided" in (out := capsys.readouterr().out) and "1 compared, 0 slower, 1 undecided" in out
    assert main(["compare", quiet, quiet]) == 0
    assert "same" in (out := capsys.readouterr().out) and "undecided" not in out
    single = written("c.json", [1.0])
    assert main(["compare", single, single]) == 0 and "same  (one number each)" in capsys.readouterr().out


def test_what_cannot_be_read_or_written_is_one_line(tmp_path: Path, kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("{")
    kernels.number = 3
    missing, text = str(tmp_path / "missing.json"), str(tmp_path / "text")
    wrong = {
        "cannot be read as a report": [["compare", missing, missing], ["rerun", missing], ["compare", text, text]],
        "there is no module 'no.such'": [["moe", *QUICK, "--impl", "no.such:f"]],
        "has no 'absent'": [["moe", *QUICK, "--impl", "somebodys:absent"]],
        "'number' is a int, not a function": [["moe", *QUICK, "--impl", "somebodys:number"]],
        "write [NAME=]package.module:function": [["moe", *QUICK, "--impl", "somebodys"]],
        "missing.json": [["moe", *QUICK, "--tokens", "1", "--trace", missing]],
    }
    for words, commands in wrong.items():
        for command in commands:
            assert main(command) == 2, command
            err = capsys.readouterr().err
            assert words in err and err.count("\n") == 1 and err.startswith(f"python -m benchmarks {command[0]}: "), err
    for option in ("--json", "--plot", "--markdown"):  # before anything is measured
        with pytest.raises(SystemExit):
            main(["moe", *QUICK, option, str(tmp_path / "no" / "file")])
        err = capsys.readouterr().err
        assert "cannot be written" in err and "no such folder" in err


def test_a_figure_has_a_panel_for_every_kind_of_case() -> None:
    """A line joins cases that differ in the number of tokens only."""
    first = Case("tiny", 1)
    kinds = [first, replace(first, skew="zipf"), replace(first, dtype="fp32"), replace(first, train=True),
             replace(first, cold=False), replace(first, preset="35b-a3b"), replace(first, seed=3),
             replace(first, trace="a/x.safetensors"), replace(first, trace="a/x.safetensors", layer=2)]  # fmt: skip
    report = {"cases": [{"case": vars(replace(kind, tokens=n))} for n in (1, 8) for kind in kinds]}
    groups = panels(report)
    assert len(groups) == len(kinds) and all([row["case"]["tokens"] for row in rows] == [1, 8] for rows in groups.values())
    assert "tiny, bf16, forward, zipf" in groups and "tiny, bf16, forward, trace x, layer 2" in groups


def test_times_of_a_busy_machine_carry_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, busy = ({"min_s": 0.022, "median_s": median, "runs": 9} for median in (0.024, 0.111))
    assert common.noise(quiet) == "" == common.noise({"error": None}) == common.noise(busy | {"runs": 1})
    assert common.noise(busy) == "  NOISY: median 5.0 times the minimum"
    assert not common.warn_if_busy([{"implementations": {"a": quiet, "b": {"wrong": "x"}}}])
    assert capsys.readouterr().err == ""
    assert common.warn_if_busy([{"implementations": {"a": quiet, "b": busy}}])
    assert "warning: 1 of 2 times have a median of more than 1.5 times the minimum" in capsys.readouterr().err
    row = dict(id="x", distinct_experts=1, bytes=1, flops=1)
    speed = dict(tflops=1.0, gbps=1.0, of_roofline=0.5)
    assert "NOISY" in "".join(table({**row, "implementations": {"a": busy | speed}}))
    case = common.Case("x", timings={"a": common.Timing((0.022, 0.111, 0.2))}, baseline="a")
    assert "NOISY: median 5.0" in "".join(case.table())


def test_rerun_repeats_the_cases(tmp_path: Path, kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tokens", "2,4", "--skew", "zipf,hot-2", "--only", "ours grouped", "--markdown", str(tmp_path / "a.md")]
    _, first = report(tmp_path, "a.json", *more)
    again = tmp_path / "again.json"
    assert main(["rerun", str(tmp_path / "a.json"), "--json", str(again)]) == 0
    second = json.loads(again.read_text())
    assert [row["id"] for row in second["cases"]] == [row["id"] for row in first["cases"]]
    assert [row["case"] for row in second["cases"]] == [row["case"] for row in first["cases"]]
    assert [row["distinct_experts"] for row in second["cases"]] == [row["distinct_experts"] for row in first["cases"]]
    assert len(first["cases"]) == 4 and first["arguments"][-2:] == ["--only", "ours grouped"]
    assert first["cases"][0]["id"] == "moe/tiny/N2/zipf/bf16/forward/cold"
    for arguments in (["--impl", "somebodys:right"], ["--impl=somebodys:right"], ["--im", "x:y"], ["--json", "x"]):
        (tmp_path / "bad.json").write_text(json.dumps({**first, "arguments": arguments}))
        with pytest.raises(SystemExit):
            main(["rerun", str(tmp_path / "bad.json")])
    assert "--trust" in capsys.readouterr().err


def test_backward_is_checked_too() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * 1.2

    case = Case("tiny", 40, dtype="fp32", train=True)
    inputs = rotation(case, "cpu", 1)[0]()
    check = AnswerCheck(case, inputs)
    assert check(loop_experts)["wrong"] is None
    for place in (0, 1, 2, 4):

        def spoiled(*arguments: torch.Tensor, place: int = place) -> torch.Tensor:
            changed = [Wrong.apply(x) if i == place else x for i, x in enumerate(arguments)]
            return loop_experts(*changed)  # type: ignore[arg-type]

        assert "relative errors" in check(spoiled)["wrong"], place
    assert "RuntimeError" in check(lambda *arguments: loop_experts(*(x.detach() for x in arguments)))["wrong"]


def test_every_implementations_that_can_run_is_right_and_has_a_peak() -> None:
    forms = implementations("cpu", [])
    quick: dict[str, Any] = dict(rounds=3, seconds=0.01, cache_bytes=1)
    for train in (False, True):
        row = measure(Case("tiny", 9, train=train), forms, ROOF, with_breakdown=not train, memory=False, **quick)
        rows = row["implementations"]
        assert all(one.get("wrong") is None for one in rows.values()), rows
        timed = {name for name, one in rows.items() if one.get("min_s")}
        assert {"ours", "ours sorted", "ours loop", "transformers eager", "transformers grouped_mm"} <= timed
        assert f"{PRODUCTS}, torch" in timed
        assert set(ADAPTERS) <= {name for name, one in rows.items() if one.get("skipped")}
        assert set(row) >= {"id", "flops", "bytes", "distinct_experts", "weight_copies"}
    packed = {name: forms[name] for name in ("ours packed", "packed by hand")}
    rows = measure(Case("tiny", 9, dtype="fp32"), packed, ROOF, memory=False, **quick)["implementations"]
    assert all(rows[name].get("min_s") or "oneDNN" in rows[name]["skipped"] for name in packed), rows
    few = measure(Case("tiny", 9), {"ours sorted": forms["ours sorted"]}, ROOF, **quick)
    assert few["implementations"]["ours sorted"]["peak_bytes"] > 0


def test_an_adapter_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {implementations("cuda", [])[name] for name in ADAPTERS} == {
        f"{package} is not installed" for package, _ in ADAPTERS.values()
    }
    with pytest.raises(ValueError, match=r"\[NAME=\]package.module:function"):
        implementations("cpu", ["nothing"])


def test_the_adapters_pass_the_documented_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures, computed by the definition."""
    case = Case("tiny", 7, dtype="fp32")
    hidden, gate_up, down, indices, weights = rotation(case, "cpu", 1)[0]()

    def vllm(x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> torch.Tensor:
        assert topk_ids.dtype == torch.int32 and topk_weights.dtype == torch.float32
        return loop_experts(x, w1, w2, topk_ids.long(), topk_weights)

    class Liger:
        @staticmethod
        def apply(x: Any, w1: Any, w2: Any, ids: Any, scores: Any) -> torch.Tensor:
            return loop_experts(x, w1, w2, ids.long(), scores)

    modules = {
        "vllm.model_executor.layers.fused_moe": dict(fused_experts=vllm),
        "liger_kernel.ops.fused_moe": dict(LigerFusedMoEFunction=Liger),
    }
    for path, names in modules.items():
        for depth in range(1, path.count(".") + 2):
            monkeypatch.setitem(sys.modules, ".".join(path.split(".")[:depth]), types.ModuleType(path))
        vars(sys.modules[path]).update(names)
    expected = loop_experts(hidden, gate_up, down, indices, weights)
    for name in ("vllm", "liger"):
        assert torch.equal(ADAPTERS[name][1]()(hidden, gate_up, down, indices, weights), expected)


def test_loads_and_traces(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for skew, least in (("uniform", 60), ("zipf", 40), ("hot-8", 8), ("bursty", 40)):
        hit = scores(skew, 512, 64, 4, rng).topk(4).indices
        assert all(len(set(row.tolist())) == 4 for row in hit[:20])
        counts = hit.flatten().bincount(minlength=64)
        assert int((counts > 0).sum()) >= least and (skew == "uniform") == (counts.max() < 3 * counts.float().mean())
    with pytest.raises(ValueError, match="skew 'hot'"):
        scores("hot", 4, 4, 2, rng)
    experts, top_k, _, _ = shapes()["tiny"]
    indices = torch.randint(0, experts, (3, 11, top_k))
    indices[1, 4] = -1
    save_file({"indices": indices}, tmp_path / "trace.safetensors")
    case = Case("tiny", 10, trace=str(tmp_path / "trace.safetensors"), layer=1)
    assert torch.equal(case.routing(), indices[1][torch.arange(11) != 4]) and "trace-trace-layer1" in case.id
    for wrong, layer, tokens in ((case.trace, 3, 5), (case.trace, 1, 11)):
        with pytest.raises(ValueError, match="holds"):
            Case("tiny", tokens, trace=wrong, layer=layer).routing()
    assert main(["moe", *QUICK, "--tokens", "6", "--trace", str(case.trace), "--only", "ours sorted"]) == 0


def test_cold_weights_change_at_every_turn_and_the_load_does_not() -> None:
    case = Case("tiny", 6)
    following, copies = rotation(case, "cpu", 3 * case.weight_bytes)
    seen = [following() for _ in range(6)]
    assert copies == 3 and len({x[1].data_ptr() for x in seen}) == 3
    loads = [sorted(x[3].flatten().bincount(minlength=case.shape[0]).tolist()) for x in seen]
    assert all(load == loads[0] for load in loads) and not torch.equal(seen[0][3], seen[1][3])
    warm = rotation(Case("tiny", 6, cold=False), "cpu", 1 << 30)[0]
    assert warm()[1].data_ptr() == warm()[1].data_ptr()


def test_bytes_count_the_experts_hit() -> None:
    experts, top_k, width, inner = shapes()["tiny"]
    case = Case("tiny", 5)
    one = work(case, torch.zeros(5, top_k, dtype=torch.long))
    assert one["distinct_experts"] == 1 and one["bytes"] == 2 * (3 * width * inner + 2 * 5 * width)
    assert one["flops"] == 6 * 5 * top_k * width * inner
    assert limit({"bytes": 20e9, "flops": 1e12}, ROOF) == 2.0 and limit({"bytes": 1e9, "flops": 3e12}, ROOF) == 3.0


def test_peak_memory_is_what_was_allocated_at_once() -> None:
    def function() -> torch.Tensor:
        total = torch.zeros(1 << 18)
        for _ in range(3):
            total = total + torch.ones(1 << 18)
        return total

    assert peak(function, "cpu") == 3 * 4 << 18
    assert peak(function, "cpu", [4 << 18]) == 2 * 4 << 18  # one allocation of that size counts as the gradient


def test_forms_that_would_copy_or_fill_too_much_do_not_run() -> None:
    indices = torch.arange(8).repeat(4096, 1)
    shape = Case("35b-a3b", 1).shape
    meta = [torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=True) for size in
            ((4096, shape[2]), (shape[0], 2 * shape[3], shape[2]), (shape[0], shape[2], shape[3]), (4096, 8))]
    values = (meta[0], meta[1], meta[2], indices, meta[3])
    assert "copy 206 GB" in str(reasons("transformers batched_mm", loop_experts, values))
    assert reasons("transformers grouped_mm", loop_experts, values) is None
    wide = (*values[:3], torch.arange(256).repeat(16, 1), meta[3])
    assert "zero gradient" in str(reasons("transformers eager", loop_experts, wide))


def test_the_table_of_targets_has_verdicts(tmp_path: Path) -> None:
    def row(case: Case, ours: float, theirs: float) -> dict[str, Any]:
        times = {"ours": ours, "transformers eager": theirs, "transformers grouped_mm": 2 * theirs, f"{PRODUCTS}, x": ours / 2}
        rows = {name: {"min_s": s, "median_s": s, "runs": 1, "tflops": 1.0, "gbps": 1.0, "of_roofline": 0.5,
                       "peak_bytes": int(s * 1e6)} for name, s in times.items()}
        return {"id": case.id, "case": vars(case), "implementations": rows, "flops": 1e9, "bytes": 1e6, "roof_s": 1e-3,
                "distinct_experts": 1}

    cases = targets.cases()
    assert len(cases) == 14 and len({case.id for case in cases}) == 14
    invented = {"cases": [row(case, 1.0, 2.4) for case in cases], "environment": {"processor": "any"}, "roofline": {}}
    table = targets.table(invented)
    assert table.count("reached") == 14 and table.count("missed") == 2  # both memory targets are missed at 1 / 2.4
    assert "| 35b-a3b, 1 tokens | 2400.00 (eager) | 1000.00 | 2.40x | >= 1.5x | reached | 4.80x (products alone, x) |" in table
    assert "min ms" in markdown(invented)
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib (extra plot)")
    plot(invented, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_appending_keeps_other_cases_of_the_same_machine(tmp_path: Path) -> None:
    old = {"schema": 1, "environment": {"cores": 2}, "cases": [{"id": "a", "x": 0}, {"id": "b"}]}
    new = {"schema": 1, "environment": {"cores": 2}, "cases": [{"id": "a", "x": 1}]}
    assert merged(old, new)["cases"] == [{"id": "b"}, {"id": "a", "x": 1}]
    with pytest.raises(ValueError, match="environment differs"):
        merged(old, {**new, "environment": {"cores": 3}})
    words = ["--tokens", "1", "--json", "x", "--append", "--plot=y", "--train", "yes"]
    assert repeatable(words) == ["--tokens", "1", "--train", "yes"]
    assert make_parser().parse_args(repeatable(words)).train == "yes"
