"""The adapter to zentorch, with a stand-in of its signature, its checks and what it does with weights; and, where it is
installed, the package itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import Qwen3_5MoeForCausalLM, backends, ops
from qwen35moe.config import Config
from qwen35moe_kernels import runtime, zentorch
from tests.support.configs import TINY
from tests.support.kernel_checks import assert_close, refusal
from tests.support.stand_ins import Zentorch, zentorch_installed

CACHE = "ZENDNNL_MATMUL_WEIGHT_CACHE"
BF16, F32 = torch.bfloat16, torch.float32
SIZES = [(9, 2, 3, 16, 10), (1, 3, 5, 24, 7)]  # tokens, top_k, experts, width, inner
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the checks of kernels draw CUDA tensors where there is a GPU")


def problem(
    tokens: int = 9, top_k: int = 2, experts: int = 3, width: int = 16, inner: int = 10, dtype: torch.dtype = F32
) -> tuple[Tensor, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    indices = torch.rand(tokens, experts).topk(top_k).indices
    return draw(tokens, width), draw(experts, 2 * inner, width), draw(experts, width, inner), indices, draw(tokens, top_k)


def reason(*args: Any, **options: Any) -> str | None:
    return refusal("experts", "zentorch", *args, **options)


def run(*args: Tensor) -> Tensor:
    with backends.use(experts="zentorch"):
        return backends.run("experts", *args)


def close(y: Tensor, args: tuple[Tensor, ...]) -> bool:
    expected = ops.experts.definition(*args)
    return bool((y - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.fixture(autouse=True)
def no_choice_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CACHE, "ZENDNNL_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def zen(tmp_path: Path) -> Iterator[Zentorch]:
    stand_in = Zentorch()
    with zentorch_installed(tmp_path, stand_in):
        yield stand_in


# ------------------------------------------------------------------------------------------------------- its results


@cpu_only
@pytest.mark.usefixtures("zen")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_computes_the_definition(size: tuple[int, ...], dtype: torch.dtype) -> None:
    args = problem(*size, dtype=dtype)
    bound = 1e-6 if dtype == F32 else 2**-6
    assert_close("experts", "zentorch", args, {}, dtype, forward=bound)
    assert_close("experts", "zentorch", (*args[:4], args[4].float()), {}, dtype, forward=bound)
    assert_close("experts", "zentorch", (args[0].mT.contiguous().mT, *args[1:]), {}, dtype, forward=bound)
    one_expert, twice = torch.full_like(args[3], 2), args[3].clone()
    twice[:, -1] = twice[:, 0]
    for indices in (one_expert, twice):  # zentorch itself refuses the former
        assert_close("experts", "zentorch", (*args[:3], indices, args[4]), {}, dtype, forward=bound)


def test_nothing_is_imported_before_the_first_call_and_auto_never_takes_it(zen: Zentorch) -> None:
    args = problem()
    assert "cannot run" not in backends.describe("experts", *args).split("zentorch")[1].splitlines()[0]
    with backends.ran() as ran:
        backends.run("experts", *args)
    assert ("experts", "zentorch") not in ran.counts
    assert "zentorch" not in sys.modules and CACHE not in os.environ and not zen.calls
    with backends.ran() as ran:
        assert close(run(*args), args)
    assert ran.counts == {("experts", "zentorch"): 1}
    assert "zentorch" in sys.modules and os.environ[CACHE] == "1" and zen.mode == 1
    calls = len(zen.calls)
    run(*args)
    assert len(zen.calls) == calls + 1  # the trial runs once
    assert run(*problem(tokens=0)).shape == (0, 16) and len(zen.calls) == calls + 1


@pytest.mark.usefixtures("zen")
def test_a_model_runs_on_it_and_can_be_saved() -> None:
    model = Qwen3_5MoeForCausalLM(Config.from_dict(TINY))
    model.init_weights(seed=3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.arange(11)[None] * 5
    with torch.no_grad():
        expected = model(ids).logits
        with backends.use(experts="zentorch"), backends.ran() as ran:
            logits = model(ids).logits
    assert ran.counts["experts", "zentorch"] == TINY["num_hidden_layers"]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with backends.use(experts="zentorch"), pytest.raises(ValueError, match="it has no backward and an input requires a grad"):
        model(ids)


def test_one_call_at_a_time(zen: Zentorch) -> None:
    args = problem(tokens=40)
    with backends.use(experts="zentorch"), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.experts(*args), range(12)))
    assert all(torch.equal(y, results[0]) for y in results) and close(results[0], args)


# ------------------------------------------------------------------------------------------------------ weights in place


def test_the_stand_in_reorders_weights_in_place_unless_it_keeps_a_copy() -> None:
    hidden, gate_up, down, indices, weights = problem()
    for mode, intact in ((2, False), (1, True), (0, True)):
        stand_in, copies = Zentorch(mode), (gate_up.clone(), down.clone())
        for _ in range(2):
            y = torch.zeros_like(hidden)
            stand_in.zentorch_fused_moe(y, hidden, *copies, None, None, weights, indices.int(), False, "silu")
            assert close(y, (hidden, gate_up, down, indices, weights))  # right in every mode
        assert torch.equal(copies[0], gate_up) == torch.equal(copies[1], down) == intact


@pytest.mark.parametrize("setting", ["2", "", "in place"])
def test_the_mode_in_place_is_refused(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, setting)
    args, stand_in = problem(), Zentorch()
    with zentorch_installed(tmp_path, stand_in):
        before = args[1].clone()
        with pytest.raises(ValueError, match=rf"{CACHE}={setting} lets zentorch change the weights in place.*set {CACHE}=1"):
            run(*args)
        assert f"zentorch      not on this machine: {CACHE}={setting}" in backends.describe("experts")
    assert torch.equal(args[1], before) and not stand_in.calls


def test_an_import_without_the_variable_and_a_file_of_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "zentorch", sys)
    with zentorch_installed(tmp_path, Zentorch()):
        assert reason(*problem()).startswith(f"zentorch was imported without {CACHE} and may change the weights in place")
    monkeypatch.setenv(CACHE, "0")
    with zentorch_installed(tmp_path, Zentorch()):
        assert reason(*problem()) is None
    monkeypatch.setenv("ZENDNNL_CONFIG_FILE", "zen.json")
    with zentorch_installed(tmp_path, Zentorch()):
        assert reason(*problem()).startswith("ZENDNNL_CONFIG_FILE=zen.json can let zentorch change the weights in place")


def test_the_variable_is_read_again_before_the_import(zen: Zentorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "2")
    with pytest.raises(ValueError, match=f"backend='zentorch' cannot run experts: {CACHE}=2"):
        run(*problem())
    assert "zentorch" not in sys.modules and not zen.calls


def test_a_version_that_reorders_in_place_anyway_does_not_reach_the_weights(tmp_path: Path) -> None:
    args, stand_in = problem(), Zentorch(mode=2)
    before = [x.clone() for x in args]
    with zentorch_installed(tmp_path, stand_in):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"zentorch 2\.13\.0\.2 changed gate_up, down in a trial call"):
                run(*args)
        assert "changed gate_up, down in a trial call" in reason(*args)
        assert not backends.verify("zentorch", device="cpu").ok
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))
    assert all(call[2].data_ptr() != args[1].data_ptr() for call in stand_in.calls)


def test_a_version_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    class Swapped(Zentorch):
        def zentorch_fused_moe(self, output: Tensor, input: Tensor, w13: Tensor, *rest: Any) -> None:
            swapped = torch.cat(w13.chunk(2, dim=1)[::-1], dim=1)  # silu(up) * gate
            super().zentorch_fused_moe(output, input, swapped, *rest)

    with zentorch_installed(tmp_path, Swapped()), pytest.raises(ValueError, match="was wrong by .* in a trial call in"):
        run(*problem())
    with zentorch_installed(tmp_path, Zentorch()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "zentorch", object())
        with pytest.raises(ValueError, match="zentorch 2.13.0.2 has no operator zentorch_fused_moe: pip install"):
            run(*problem())


class Sometimes(Zentorch):
    """Gives NaN for some sizes, as zentorch 2.13 does in bfloat16 without AVX-512."""

    def __init__(self, inner: int, tokens: int) -> None:
        super().__init__()
        self.wrong = inner, tokens

    def zentorch_fused_moe(self, output: Tensor, input: Tensor, w13: Tensor, w2: Tensor, *rest: Any) -> None:
        super().zentorch_fused_moe(output, input, w13, w2, *rest)
        if w2.shape[2] == self.wrong[0] and len(input) >= self.wrong[1]:
            output[-1] = float("nan")


def test_wrong_results_for_some_sizes_are_found(tmp_path: Path) -> None:
    with zentorch_installed(tmp_path, Sometimes(inner=12, tokens=2)):
        assert close(run(*(args := problem(inner=10))), args)
        with pytest.raises(ValueError, match=r"was wrong by nan in a trial call in torch.float32 with D=16, F=12"):
            run(*problem(tokens=1, inner=12))
        assert "in a trial call" in reason(*problem(inner=12)) and reason(*args) is None
    with zentorch_installed(tmp_path, Sometimes(inner=10, tokens=70)):
        few, many = problem(), problem(tokens=71)
        many = many[0], few[1], few[2], *many[3:]
        assert close(run(*few), few)
        with pytest.raises(RuntimeError, match="was wrong by nan for 71 tokens, as the first call with these weights showed"):
            run(*many)
        assert reason(*few).startswith("zentorch 2.13.0.2 was wrong by nan for 71 tokens")


def test_bfloat16_needs_avx512(zen: Zentorch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(*problem(dtype=BF16)) is None
    monkeypatch.setattr(zentorch, "_AVX512", False)
    assert reason(*problem(dtype=BF16)) == (
        "hidden is bfloat16, in which zentorch gives wrong results on a processor without AVX-512"
    )
    assert reason(*problem()) is None


def test_a_change_after_the_trial_raises(zen: Zentorch) -> None:
    run(*problem())
    args = problem(experts=4)
    zen.mode = 2  # for weights that come after those of the trial
    with pytest.raises(RuntimeError, match="zentorch 2.13.0.2 has changed gate_up: its values are lost"):
        run(*args)


# ------------------------------------------------------------------------------------------------------- copies of weights


def test_weights_that_have_changed_since_the_copy_are_refused(zen: Zentorch) -> None:
    """The stand-in, as zentorch, would compute with the old values."""
    hidden, gate_up, down, indices, weights = problem()
    gate_up, other = nn.Parameter(gate_up), torch.randn(gate_up.shape)
    args = hidden, gate_up, down, indices, weights
    with torch.no_grad():
        run(*args)
        assert reason(hidden + 1, *args[1:]) is None
        gate_up.data.copy_(other)  # which does not count as a new version
        assert reason(*args).startswith("gate_up has changed since zentorch copied it, and zentorch goes on using its copy")
        stale = torch.zeros_like(hidden)
        zen.zentorch_fused_moe(stale, hidden, gate_up, down, None, None, weights, indices.int(), False, "silu")
        assert not close(stale, args)
        with pytest.raises(ValueError, match=r"pass a new tensor \(gate_up.clone\(\)\), or set ZENDNNL_MATMUL_WEIGHT_CACHE=0"):
            run(*args)
        args = hidden, gate_up.clone(), down, indices, weights
        assert close(run(*args), args)
        down[1, 2, 3] += 1  # one number, not among those that are compared
        assert reason(*args).startswith("down has changed since zentorch copied it")


def test_without_copies_weights_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "0")
    args = problem()
    with zentorch_installed(tmp_path, Zentorch()):
        run(*args)
        args[1].normal_()
        args[2].add_(1)
        assert close(run(*args), args)
        args[2].add_(1)
        one = args[0][:1], *args[1:3], args[3][:1], args[4][:1]
        assert close(run(*one), one)


def test_memory_that_zentorch_has_copied_is_not_used_again(zen: Zentorch) -> None:
    addresses = set()
    for _ in range(20):  # without the adapter's references, torch would use the same memory again
        args = problem()
        assert close(run(*args), args)
        addresses |= {args[1].data_ptr(), args[2].data_ptr()}
    assert len(addresses) == 40


def test_another_weight_at_the_same_address_is_refused(zen: Zentorch) -> None:
    hidden, gate_up, down, indices, weights = problem(experts=5)
    run(hidden, gate_up[:3], down[:3], indices % 3, weights)
    assert "gate_up shares its memory with another weight that zentorch has read ([5, 20, 16] and [3, 20, 16])" in reason(
        hidden, gate_up, down, indices, weights
    )
    args = hidden, gate_up[:3], down[:3], indices % 3, weights  # other tensor objects of the same weights
    assert close(run(*args), args)
    assert zen.calls[-1][2] is zen.calls[-2][2]


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.usefixtures("zen")
def test_unsupported_names_the_argument() -> None:
    hidden, gate_up, down, indices, weights = problem()
    assert reason(hidden, gate_up, down, indices, weights) is None
    assert reason(hidden, gate_up, down, indices, weights, tap=print).startswith("a tap reads expert_in, expert_act or")
    assert reason(hidden.double(), gate_up, down, indices, weights) == "hidden is float64, not one of float32, bfloat16"
    assert "gate_up torch.bfloat16, zentorch takes one dtype" in reason(hidden, gate_up.to(BF16), down, indices, weights)
    assert reason(hidden, gate_up, down.mT.contiguous().mT, indices, weights).startswith("down is not contiguous")
    assert reason(hidden, gate_up[:1], down[:1], indices * 0, weights) == "gate_up has one expert, zentorch takes two or more"
    assert reason(hidden, gate_up, down, indices + 1, weights) == "indices holds 3, and there are 3 experts"
    assert reason(hidden, gate_up, down, indices - 1, weights) == "indices holds -1, and there are 3 experts"
    assert reason(hidden.to("meta"), gate_up, down, indices, weights) == "hidden is on meta, not on a CPU"
    assert reason(hidden, gate_up.to("meta"), down, indices, weights) == "gate_up is not an ordinary tensor on the CPU"
    assert reason(hidden, gate_up.as_subclass(Quantised), down, indices, weights).startswith("gate_up is not an ordinary")
    with torch.autocast("cpu", BF16):
        assert reason(hidden, gate_up, down, indices, weights).startswith("a dispatch mode or autocast is active")
    assert "requires a gradient" in reason(hidden.requires_grad_(), gate_up, down, indices, weights)


class Quantised(Tensor):
    pass


def test_a_missing_package_and_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, name, expected in (
        ("2.14.0.1", "zentorch", "zentorch 2.14.0.1 does not fit torch 2.13.1+cpu: pip install 'zentorch==2.13.*'"),
        ("2.13.0.2", "zentorch-weekly", None), ("2.13.0.2", "other", "zentorch is installed without its distribution: "),
    ):  # fmt: skip
        with zentorch_installed(tmp_path, Zentorch(), version, name):
            found = reason(*problem())
            assert found == expected or (expected and found and found.startswith(expected)), found
    monkeypatch.setattr(runtime, "installed", lambda package: False)
    assert zentorch.missing() == "zentorch is not installed: pip install 'qwen35moe[zen]'"


PROGRAM = """
import sys, torch
from qwen35moe import backends
assert "zentorch" not in sys.modules
report = backends.verify("zentorch", dtypes=(torch.float32, torch.bfloat16), device="cpu")
assert report.ok, str(report)
from tests.triton.test_zentorch import close, problem, reason, run
for size in ((1, 3, 7, 128, 64), (40, 3, 7, 128, 64), (33, 2, 5, 96, 40)):
    args = problem(*size)
    before = [x.clone() for x in args]
    assert close(run(*args), args) and close(run(*args), args)
    assert all(torch.equal(x, y) for x, y in zip(args, before))
    args[1].normal_()
    assert reason(*args).startswith("gate_up has changed since zentorch copied it")
"""


@pytest.mark.slow
@pytest.mark.skipif(zentorch.missing() is not None, reason=f"zentorch cannot be used: {zentorch.missing()}")
def test_the_package_itself_against_the_definition() -> None:
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZENDNNL_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
