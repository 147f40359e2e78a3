"""`python -m benchmarks.gpu`: wrong kernels fail, steps are ended at their limits, a cut run keeps its rows."""

from __future__ import annotations

import gc
import importlib.util
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, checks, command, decode, environment, model, plan, rows, speed, suite, table, targets
from benchmarks.gpu.plan import MINUTES, RESERVE, Step, most, steps
from benchmarks.gpu.rows import CUT, FAILED, MEASURED, MET, MISSED, NOT_RUN, RIGHT, UNRUN, WRONG, Rows
from benchmarks.gpu.runner import PRELOAD, Runner, status
from benchmarks.gpu.work import Work
from benchmarks.tools import report
from benchmarks.tools.common import ROOT
from benchmarks.tools.compare import read
from qwen35moe import Qwen3_5MoeForCausalLM, backends

Register = Callable[..., None]


@pytest.fixture
def register() -> Iterator[Register]:
    names: list[tuple[str, str]] = []

    def add(operation: str, fn: Any, unsupported: Any = None, **options: Any) -> None:
        backends.register(operation, "mine", fn, unsupported, **options)
        names.append((operation, "mine"))

    yield add
    for name in names:
        backends.unregister(*name)


def checked(folder: Path, operation: str, name: str) -> list[rows.Row]:
    path = folder / "rows.jsonl"
    path.unlink(missing_ok=True)
    only = f"check/{operation}/{name}"
    checks.run(Rows(path, f"check/{operation}", only=only), Work(small=True, limit=60, out=folder), operation)
    return rows.latest(rows.read(path))


def exit_status(results: list[rows.Row]) -> int:
    return status(results, steps(backends.OPERATIONS))


def mine(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> Any:
    return backends.cases("rms_norm")[0](x, weight, eps=eps)


def changed(factor: float) -> Callable[..., torch.Tensor]:
    return lambda x, weight, *, eps: mine(x, weight, eps=eps) * factor


# ------------------------------------------------------------------------------------------------------------- checks


def test_every_operation_has_cases_and_a_step() -> None:
    assert set(backends.OPERATIONS) <= set(cases.CASES)
    assert {f"check/{name}" for name in backends.OPERATIONS} <= {step.id for step in steps(backends.OPERATIONS)}


def test_a_right_implementation_has_a_row_for_each_dtype_and_mode(register: Register, tmp_path: Path) -> None:
    register("rms_norm", mine)
    results = checked(tmp_path, "rms_norm", "mine")
    ids = {f"check/rms_norm/mine/{dtype}/{mode}" for dtype in ("bf16", "fp32") for mode in ("inference", "training")}
    assert {row["id"] for row in results} == ids and {row["verdict"] for row in results} == {RIGHT}
    assert exit_status(results) == 0


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return mine(x, weight, eps=eps) + 0.1 * (x - x.detach())


def changes_its_argument(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    y = mine(x, weight, eps=eps)
    weight.detach().add_(1)
    return y


def raises(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    raise RuntimeError("out of resources")


WRONGS = [
    (changed(1.05), {"inference", "training"}), (changed(float("nan")), {"inference", "training"}),
    (wrong_gradient, {"training"}), (changes_its_argument, {"inference", "training"}), (raises, {"inference", "training"}),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "modes"), WRONGS, ids=["value", "nan", "gradient", "argument", "raises"])
def test_a_wrong_implementation_fails(fn: Any, modes: set[str], register: Register, tmp_path: Path) -> None:
    register("rms_norm", fn)
    results = checked(tmp_path, "rms_norm", "mine")
    wrong = {row["id"].split("/")[-1] for row in results if row["verdict"] == WRONG}
    assert wrong == modes and exit_status(results) == 1


def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from qwen35moe_kernels import router

    assert [row["verdict"] for row in checked(tmp_path, "router", "triton/fp32/inference")] == [RIGHT]
    real = router._choose
    monkeypatch.setattr(router, "_choose", lambda logits, top_k: tuple(x.flip(1) for x in real(logits, top_k)))
    results = checked(tmp_path, "router", "triton/fp32/inference")
    assert [row["verdict"] for row in results] == [WRONG] and exit_status(results) == 1


def test_an_implementation_that_no_case_runs_fails(register: Register, tmp_path: Path) -> None:
    register("rms_norm", mine, lambda x, weight, *, eps: "x has no 12,345 columns")
    (row,) = checked(tmp_path, "rms_norm", "mine")
    assert row["verdict"] == UNRUN and "no 12,345 columns" in row["note"] and exit_status([row]) == 1
    runner = Runner(tmp_path, small=True, only="check", context=FORK, say=lambda text: None)
    runner.first = 0
    command.coverage(runner)
    assert [row["verdict"] for row in runner.rows()] == [WRONG]
    Rows(runner.path).write("check/rms_norm/mine/fp32/inference", RIGHT)  # by the step of another dtype
    Rows(runner.path).write("check/rms_norm/mine", UNRUN, note="x is bfloat16")
    command.coverage(runner)
    assert [row["verdict"] for row in runner.rows()] == [NOT_RUN, RIGHT]
    backends.unregister("rms_norm", "mine")
    backends.register("rms_norm", "mine", None, missing="it needs a GPU")
    (row,) = checked(tmp_path, "rms_norm", "mine")
    assert (row["verdict"], row["note"]) == (NOT_RUN, "it needs a GPU")


def without_gradients(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> str | None:
    return "it is for inference" if torch.is_grad_enabled() else None


def test_a_mode_that_no_case_runs_is_listed(register: Register, tmp_path: Path) -> None:
    register("rms_norm", mine, without_gradients)
    verdicts = {row["id"].split("/", 3)[3]: (row["verdict"], row.get("note")) for row in checked(tmp_path, "rms_norm", "mine")}
    assert verdicts["bf16/training"] == verdicts["fp32/training"] == (NOT_RUN, "it is for inference")
    assert verdicts["bf16/inference"][0] == verdicts["fp32/inference"][0] == RIGHT


def test_rotary_is_checked_backward_too() -> None:
    """Its kernel refuses gradients of cos and sin, which the check must not require."""
    pytest.importorskip("triton")
    entry = next(one for one in backends.implementations("rotary") if one.name == "triton")
    draw = cases.Draw(torch.float32, "cpu", cases.SMALL, True)
    assert not entry.missing and all(checks._refusal(entry, arguments, True) is None for arguments in cases.rotary(draw))


def test_an_operation_without_cases_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(checks.CASES, "router")
    checks.run(Rows(tmp_path / "rows.jsonl"), Work(small=True, limit=60, out=tmp_path), "router")
    (row,) = rows.latest(rows.read(tmp_path / "rows.jsonl"))
    assert row["verdict"] == WRONG and "no cases of router" in row["note"]


def test_a_kernel_that_no_check_launches_is_listed(tmp_path: Path) -> None:
    every = checks.kernels_of_the_package()
    assert {"experts_kernels.few_down_kernel", "experts_kernels.combine_kernel", "delta_rule_forward.recur"} <= every
    records = [{"launched": sorted(every - {"experts_kernels.few_down_kernel"})}]
    assert checks.kernels_not_launched(records) == ["experts_kernels.few_down_kernel"]
    runner = Runner(tmp_path, small=True, context=FORK, say=lambda text: None)
    command.coverage(runner)
    assert [row["verdict"] for row in runner.rows()] == [WRONG] and exit_status(runner.rows()) == 1


def test_attention_to_a_long_cache_is_divided_and_joined(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert [row["verdict"] for row in checked(tmp_path, "attention", "triton/fp32/inference")] == [RIGHT]
    launched = [record["launched"] for record in rows.read(tmp_path / "rows.jsonl") if "launched" in record]
    assert launched == [["decode_attention_kernels.join_kernel", "decode_attention_kernels.part_kernel"]]


def test_our_kernels_are_checked_first_and_packages_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    names: list[str] = []
    monkeypatch.setattr(checks, "_of_one", lambda rows, work, operation, entry, *rest: names.append(entry.name))
    for operation in ("gated_delta_rule", "short_convolution"):
        checks.run(Rows(tmp_path / "rows.jsonl"), Work(small=True, limit=60, out=tmp_path), operation)
    half = names.index("triton", 1)
    assert (names[0], names[half - 1], names[half], names[-1]) == ("triton", "fla", "triton", "causal_conv1d")
    assert len(names) == sum(len(backends.implementations(name)) for name in ("gated_delta_rule", "short_convolution"))


# ------------------------------------------------------------------------------------------------------------- steps

FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
HERE = __name__
needs_fork = pytest.mark.skipif(FORK is None, reason="this system has no fork")


def writes(out: Rows, work: Work) -> None:
    out.write("quick/row", RIGHT, 1.0)


def hangs(out: Rows, work: Work) -> None:
    out.write("slow/first", RIGHT, 1.0)
    out.measure("slow/second", lambda: time.sleep(60))


def crashes(out: Rows, work: Work) -> None:
    for name in ("first", "second", "third"):
        crash = name == "second"
        out.measure(f"crash/{name}", lambda crash=crash: os.kill(os.getpid(), signal.SIGKILL) if crash else {"verdict": RIGHT})


def spoils(out: Rows, work: Work) -> None:
    """An error after which every call of the process fails, in a row of three."""
    spoilt = []

    def row(name: str) -> dict[str, Any]:
        if spoilt or name == "second":
            spoilt.append(name)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"verdict": RIGHT}

    for name in ("first", "second", "third"):
        out.measure(f"spoil/{name}", lambda name=name: row(name))


def fails(out: Rows, work: Work) -> None:
    raise ValueError("no such model")


def step(function: Callable[..., None], limit: float = 30, **fields: Any) -> Step:
    return Step(function.__name__, f"{HERE}:{function.__name__}", limit, limit, "a step", **fields)


def ran(folder: Path, *plan: Step, **fields: Any) -> tuple[dict[str, rows.Row], Runner]:
    runner = Runner(folder, small=True, context=FORK, say=lambda text: None, **fields)
    runner.run(plan)
    return {row["id"]: row for row in runner.rows()}, runner


@needs_fork
def test_a_step_over_its_limit_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    started = time.time()
    results, _ = ran(tmp_path, step(hangs, 0.5, check=True), step(writes))
    assert time.time() - started < 30
    verdicts = {id: row["verdict"] for id, row in results.items()}
    assert verdicts == {"slow/first": RIGHT, "slow/second": CUT, "quick/row": RIGHT}
    assert "limit of 0 s" in results["slow/second"]["note"] or "limit of 1 s" in results["slow/second"]["note"]
    assert status(list(results.values()), [step(hangs, check=True)]) == 1, "a check that was cut is not verified"
    assert status(list(results.values()), [step(hangs)]) == 0, "a speed that was cut is no error"


@needs_fork
@pytest.mark.parametrize("function", [crashes, spoils])
def test_a_step_that_crashes_goes_on_behind_the_row(function: Callable[..., None], tmp_path: Path) -> None:
    results, _ = ran(tmp_path, step(function))
    assert [row["verdict"] for row in results.values()] == [RIGHT, FAILED, RIGHT]
    assert [id.split("/")[1] for id in results] == ["first", "second", "third"]
    assert status(list(results.values()), []) == 1


@needs_fork
def test_an_error_of_a_step_is_a_row(tmp_path: Path) -> None:
    results, _ = ran(tmp_path, step(fails), step(writes))
    assert results["fails"]["verdict"] == FAILED and results["fails"]["note"] == "ValueError: no such model"
    assert results["quick/row"]["verdict"] == RIGHT
    assert "no such model" in (tmp_path / "logs" / "fails.log").read_text()


def test_what_is_imported_before_the_fork_does_not_use_cuda() -> None:
    """A process that has used CUDA, if only to count devices, cannot fork processes that use it."""
    code = f"""
import importlib, torch
def used(*args, **kwargs): raise SystemExit("CUDA was used")
for name in ("is_available", "device_count", "_lazy_init", "get_device_capability"): setattr(torch.cuda, name, used)
for name in {PRELOAD!r}: importlib.import_module(name)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@needs_fork
def test_processes_are_forked_where_torch_counts_gpus_by_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    for small, count in ((False, -1), (False, 1), (True, -1)):
        monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda count=count: count)
        kinds.append(Runner(tmp_path, small=small).context.get_start_method())
    assert kinds == ["spawn", "forkserver", "forkserver"]


def test_checks_that_follow_from_others_do_not_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server has registered causal-conv1d as not installed, before it was built."""
    monkeypatch.setattr(command, "PTXAS", str(tmp_path))
    runner = Runner(tmp_path, small=False, context=FORK, say=lambda text: None)
    out = Rows(runner.path)
    out.write("wheels/causal_conv1d", RIGHT)
    out.write("check/gated_delta_rule/triton/fp32/training", WRONG)
    again = command.follow_up(runner)
    original = [one for one in steps(backends.OPERATIONS) if one.id == "check/gated_delta_rule"]
    assert [(one.name, one.limit) for one in again[1:]] == [(f"{one.name}@ptxas", one.limit) for one in original]
    assert again[0].name == "check/short_convolution@built"
    assert {runner._context(one).get_start_method() for one in again} == {"spawn"}
    assert runner._context(original[0]) is FORK


def test_a_torch_that_imports_slowly_is_not_taken_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "IMPORT", 0.001)
    with pytest.raises(TimeoutError, match="--device cuda or cpu"):
        command.has_gpu()


def test_memcheck_uses_the_kernels_that_warm_has_compiled(gpu: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, output = [], "checked rms_norm\nERROR SUMMARY: 0 errors\n"

    def limited(program: list[str], seconds: float, log: Path, environment: dict[str, str]) -> tuple[int, str]:
        caches.append((program[-len(suite.CHECKED) :], environment["TRITON_CACHE_DIR"]))
        return 0, output

    monkeypatch.setattr(suite, "limited", limited)
    monkeypatch.setattr(suite.shutil, "which", lambda name: name)
    assert suite.warmed(gpu)["verdict"] == suite.sanitized(gpu)["verdict"] == RIGHT
    assert caches == [(suite.CHECKED, str(gpu.out / "triton-cache-small"))] * 2
    order = [one.id for one in steps(backends.OPERATIONS)]
    assert order.index("warm") < order.index("memcheck")


@needs_fork
def test_steps_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    results, _ = ran(tmp_path, step(hangs, 0.5, group="a"), step(writes, group="a"), step(fails), workers=2)
    assert list(results).index("quick/row") < list(results).index("slow/second") < list(results).index("fails")


@needs_fork
def test_without_time_checks_are_cut_and_speeds_are_left_out(tmp_path: Path) -> None:
    results, _ = ran(tmp_path, step(writes, check=True), step(fails), minutes=RESERVE / 60)
    assert {id: row["verdict"] for id, row in results.items()} == {"writes": CUT, "fails": NOT_RUN}


@needs_fork
def test_a_run_that_is_killed_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert FORK is not None
    process = FORK.Process(target=ran, args=(tmp_path, step(writes), step(hangs)))
    process.start()
    path = tmp_path / "rows.jsonl"
    while not any(record.get("begin") == "slow/second" for record in rows.read(path)):
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with open(path, "a") as file:
        file.write('{"id": "slow/second", "verd')  # a line that was cut as well
    assert command.main(["--table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "--only quick/row" in printed and "--only slow/first" in printed and "2 right" in printed
    assert [case["id"] for case in read(tmp_path / "report.json")["cases"]] == ["quick/row", "slow/first"]


def test_one_row_alone(tmp_path: Path) -> None:
    out = Rows(tmp_path / "rows.jsonl", only="moe/forward/N1")
    for id in ("moe/forward/N1", "moe/forward/N16", "moe/training/N1"):
        out.measure(id, lambda: {"verdict": RIGHT})
    assert [row["id"] for row in rows.latest(rows.read(out.path))] == ["moe/forward/N1"]
    every = steps(backends.OPERATIONS)
    assert [one.id for one in every if one.wanted("moe/forward/N1")] == ["moe"]
    assert {one.id for one in every if one.wanted("check/experts/triton")} == {"check/experts"}
    assert {one.id for one in every if one.wanted("check")} == {f"check/{name}" for name in backends.OPERATIONS}
    with pytest.raises(ValueError, match="no step has that row"):
        command.main(["--only", "moes", "--device", "cpu"])


def test_a_row_that_is_measured_again_replaces_the_one_before(tmp_path: Path) -> None:
    out = Rows(tmp_path / "rows.jsonl")
    out.write("a", WRONG, 2.0)
    out.write("b", RIGHT, 1.0)
    out.write("a", RIGHT, 0.5)
    assert [(row["id"], row["verdict"]) for row in rows.latest(rows.read(out.path))] == [("a", RIGHT), ("b", RIGHT)]


def test_the_plan_fits_its_nine_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    every = steps(backends.OPERATIONS)
    assert most(every) <= 60 * MINUTES - RESERVE - 10, "ten seconds start the processes"
    assert all(callable(one.load()) for one in every)
    assert command.main(["--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert len({one.name for one in every}) == len(every) and all(f"\n{one.name} " in listed for one in every)
    assert listed != plan.listing(every, False, MINUTES)


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_targets_by_gpu() -> None:
    assert targets.memory_bound(220, "NVIDIA H200") == 220 and targets.memory_bound(220, "NVIDIA H100 80GB HBM3") == 176
    assert targets.compute_bound(400, "NVIDIA H100 80GB HBM3") == 400 and targets.compute_bound(400, "NVIDIA A10") is None


def test_missed_targets_are_no_errors(tmp_path: Path) -> None:
    met, missed = rows.judged(230, "tokens/s", 220), rows.judged(1.4, "of fla's time", 1.3, most=True)
    assert (met["verdict"], missed["verdict"], rows.judged(1, "ms", None)["verdict"]) == (MET, MISSED, MEASURED)
    assert rows.bounded(float("nan"), 1.0)["verdict"] == WRONG
    out = Rows(tmp_path / "rows.jsonl")
    out.write("decode/captured", **missed)
    assert exit_status(rows.latest(rows.read(out.path))) == 0 and exit_status([]) == 1


def test_a_peer_that_disagrees_is_an_error(tmp_path: Path) -> None:
    work, x = Work(small=True, limit=60, out=tmp_path), torch.ones(3)
    options: dict[str, Any] = {"rounds": 2, "ratio": None, "faster_by": 1.5, "against": "theirs"}
    assert speed.compare(work, lambda: x, {"theirs": lambda: 1.1 * x}, **options)["verdict"] == WRONG
    fields = speed.compare(work, lambda: x + 0, {"theirs": lambda: x + 0}, **options)
    assert set(fields["implementations"]) == {"ours", "theirs"} and fields["top"]

    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image")

    fields = speed.compare(work, lambda: x, {"theirs": broken}, **options)
    assert fields["verdict"] == MEASURED and "no kernel image" in fields["note"]


def test_one_wrong_gradient_of_many_is_found() -> None:
    theirs = {f"layers.{n}.weight": 0.01 for n in range(200)}
    assert model.worst_gradient({**theirs, "layers.7.weight": 0.05}, theirs, torch.bfloat16)["verdict"] == RIGHT
    row = model.worst_gradient({**theirs, "layers.7.weight": 0.9}, theirs, torch.bfloat16)
    assert row["verdict"] == WRONG and row["note"].startswith("layers.7.weight")
    exact = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="no gradient of b"):
        model.gradient_errors({"a": torch.ones(2)}, exact)


def test_speeds_and_the_model_are_those_of_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fla installed "auto" would run fla."""
    monkeypatch.setattr(Work, "own_kernels", lambda self: backends.use(gated_delta_rule="recurrent"))
    work, chosen = Work(small=True, limit=60, out=tmp_path), []

    def choice(*_: Any) -> Any:
        chosen.append(backends.choice_of("gated_delta_rule"))
        raise InterruptedError

    for module, name in ((speed, "delta_row"), (decode, "Subject"), (model, "our_errors")):
        monkeypatch.setattr(module, name, choice)
    monkeypatch.setattr(model, "peer_errors", lambda *_: ("peer", {"tensors": {}}))
    monkeypatch.setattr(model, "clone", lambda *_: None)
    out = Rows(tmp_path / "rows.jsonl")
    speed.delta(out, work)
    for function in (decode.decode, decode.prefill):
        with pytest.raises(InterruptedError):
            function(out, work)
    model.check_dtype(out, work, None, torch.ones(1), SimpleNamespace(), torch.float32)
    assert chosen == ["recurrent"] * (2 + 2 + 1)


def test_transformers_is_the_peer_in_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.decode.models

    installed = {"fla": object(), "fla.ops": object()}
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "causal_conv1d.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def theirs(*_: Any) -> Any:
        for name in (*installed, "causal_conv1d"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
        assert importlib.util.find_spec("fla") is importlib.util.find_spec("causal_conv1d") is None
        raise InterruptedError

    monkeypatch.setattr(benchmarks.decode.models, "Theirs", theirs)
    with pytest.raises(InterruptedError):
        model.transformers_errors(Work(small=True, limit=60, out=tmp_path), None, torch.ones(1), SimpleNamespace())
    assert all(sys.modules[name] is module for name, module in installed.items()) and "causal_conv1d" not in sys.modules
    assert importlib.util.find_spec("causal_conv1d") is not None


def test_a_few_tokens_have_other_experts_each_time_they_are_timed() -> None:
    """Answers that are compared have the same ones."""
    sets = [torch.tensor([[number]]) for number in range(3)]
    turns = speed.Turns(sets)
    ours, theirs = (turns(lambda h, g, d, indices, w: int(indices)) for _ in range(2))
    assert [form(0, 0, 0, 0) for form in (ours, theirs, ours, theirs, theirs, ours)] == [0, 0, 1, 2, 0, 1]


def test_garbage_of_before_is_not_visited_in_every_run(tmp_path: Path) -> None:
    frozen: list[int] = []
    Work(small=True, limit=60, out=tmp_path).time({"ours": lambda: frozen.append(gc.get_freeze_count())})
    assert min(frozen) > 1000 and gc.get_freeze_count() == 0


def test_outcomes_of_a_suite_that_was_cut() -> None:
    output = """
[gw0] [ 1%] PASSED tests/triton/test_gpu.py::test_a[1]
[gw1] [ 2%] FAILED tests/triton/test_gpu.py::test_b
tests/triton/test_gpu.py::test_c PASSED   [ 50%]
tests/triton/test_gpu.py::test_d SKIPPED (needs a CUDA device)   [100%]
=== short test summary info ===
FAILED tests/triton/test_gpu.py::test_b - AssertionError
"""
    assert suite.outcomes(output) == {"passed": 2, "failed": 1, "skipped": 1}


def test_the_closing_table_and_the_report_of_a_run(tmp_path: Path) -> None:
    out = Rows(tmp_path / "rows.jsonl", "check/x")
    out.write("environment/machine", MEASURED, "NVIDIA H200", machine={"gpu": "NVIDIA H200", "torch": "2.11"})
    for number in range(4):
        out.write(f"check/x/triton/bf16/{number}", RIGHT, 0.001 * number, "error", "<= 0.01")
    out.write("check/x/fla/bf16/training", WRONG, 0.5, "error", "<= 0.01", note="far")
    out.write("moe/forward/N9", MISSED, 1.1, "times", ">= 1.6", top=[["up_kernel", 1.0, 2.0]], baseline="theirs",
              implementations={"ours": {"min_s": 1.0, "median_s": 1.1, "runs": 3}})  # fmt: skip
    results = rows.latest(rows.read(out.path))
    text = table.table(results, "run")
    assert re.search(r"right +0.003 error \(4 rows\) +<= 0.01 +run --only check/x/triton$", text, re.MULTILINE)
    assert text.index("right") < text.index("missed") < text.index("wrong") < text.index("far")
    assert "up_kernel" in table.profiles(results)
    table.write(tmp_path / "an-h200" / "gpu.json", results, "an-h200")
    reports = report.found(tmp_path)
    assert set(reports) == {"an-h200"} and "moe/forward/N9" in report.page(reports, [], ["an-h200"])
    page = report.rewritten("<!-- results: gpu table=gpu -->\n<!-- end of results -->", reports)
    assert "NVIDIA H200" in page and "| moe/forward/N9 | >= 1.6 | 1.1 times | missed |" in page and "4 of 5 checks" in page


def test_warnings_are_kept_as_text() -> None:
    with decode.logged() as text:
        warnings.warn("of Python", stacklevel=1)
        logging.getLogger("qwen35moe.generation").warning("a decode step could not be captured: %s", "no memory")
    assert text == ["a decode step could not be captured: no memory", "of Python"]


# ------------------------------------------------------------------------------------------------------------- lines for a GPU


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.time - self.time)


class Profile:
    """In place of torch.profiler.profile: one kernel twice, and a call of the host."""

    def __init__(self, activities: Any) -> None:
        self.activities = activities

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def events(self) -> list[Any]:
        spent = SimpleNamespace(elapsed_us=lambda: 500.0)
        kinds = ("CUDA", "CUDA", "CPU")
        return [SimpleNamespace(name="up_kernel", device_type=SimpleNamespace(name=k), time_range=spent) for k in kinds]


class OnGpu(Work):
    @property
    def device(self) -> str:
        return "cpu"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """The lines for a GPU, on the CPU: torch.cuda's functions are replaced."""
    functions: dict[str, Any] = {
        "synchronize": lambda *_: None, "Event": Event, "empty_cache": lambda: None, "device": lambda _: nullcontext(),
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 7, "mem_get_info": lambda: (84e9, 85e9),
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3", "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda _: SimpleNamespace(total_memory=85e9), "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda _: None,
    }  # fmt: skip
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(speed, "FULL", cases.SMALL)
    small = model.configuration(True, 4)
    monkeypatch.setattr(decode, "configuration", lambda *_: small)
    return OnGpu(small=False, limit=60, out=tmp_path)


def test_our_kernels_are_chosen_on_a_gpu(gpu: Work, tmp_path: Path) -> None:
    pytest.importorskip("qwen35moe_kernels")
    for work, name in ((gpu, "triton"), (Work(small=True, limit=60, out=tmp_path), None)):
        with work.own_kernels():
            assert backends.choice_of("gated_delta_rule") == name
    assert backends.choice_of("gated_delta_rule") is None


def test_a_profile_counts_kernels_only(gpu: Work) -> None:
    assert gpu.profile(lambda: None) == {"top": [["up_kernel", 1.0, 2.0]], "launches": 2, "device_ms": 1.0}
    with gpu.no_synchronisation():
        pass


def test_the_machine_and_the_layers_that_fit(gpu: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    row = environment.facts(gpu)
    assert row["gpu"].startswith("NVIDIA H100") and row["machine"]["capability"] == [9, 0]
    assert decode.fitting(gpu, decode.STEP) == 40 and decode.fitting(gpu, decode.PREFILL) == 36
    assert environment.built(gpu)["note"] == "--wheels has no sdist of it"


def test_a_step_beside_its_targets(gpu: Work) -> None:
    subject = decode.Subject(gpu)
    assert "scaled to 40" not in subject.about and subject.layers == 40
    row = decode.eager(gpu, subject, lambda: None)
    assert (row["verdict"], row["measured"], row["target"]) == (MET, 2.0, "<= 700")
    assert decode.synchronisations(gpu, lambda: None)["verdict"] == MET

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    calls = [lambda: None, waits]
    assert decode.synchronisations(gpu, lambda: calls.pop(0)())["verdict"] == MISSED
    x = torch.ones(3)
    options: dict[str, Any] = {"rounds": 2, "ratio": 1e9, "faster_by": None, "against": "fla"}
    assert speed.compare(gpu, lambda: x, {"fla": lambda: x}, **options)["verdict"] == MET
    assert speed.compare(gpu, lambda: x, {"fla": lambda: x}, **{**options, "ratio": 0.0})["verdict"] == MISSED


def test_a_checkpoint_that_loads_wrongly_is_an_error(gpu: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    row = decode.load_row(gpu)
    assert row["verdict"] in (MET, MISSED) and row["target"] == ">= 10" and not (gpu.out / "checkpoint").exists()
    real = Qwen3_5MoeForCausalLM.from_pretrained

    def changed(*args: Any, **kwargs: Any) -> Any:
        loaded = real(*args, **kwargs)
        with torch.no_grad():
            loaded.model.norm.weight.add_(1)
        return loaded

    monkeypatch.setattr(Qwen3_5MoeForCausalLM, "from_pretrained", changed)
    row = decode.load_row(gpu)
    assert row["verdict"] == WRONG and "model.norm.weight" in row["note"]
