"""The table of implementations: who runs, why, and how one finds out."""

from __future__ import annotations

import importlib
import inspect
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends, ops, taps
from qwen35moe.backends import record
from qwen35moe.backends.operation import CHOICES, TABLE, recomputing

cases_module: Any = importlib.import_module("qwen35moe.backends.cases")
table: Any = importlib.import_module("qwen35moe.backends.operation")  # `backends.operation` is the decorator

ROOT = Path(__file__).resolve().parents[2]


def plain(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x * weight * eps


def twice(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return 2 * x * weight * eps


def on_cuda(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    return None if x.is_cuda else f"query is on {x.device}, not on CUDA"


def even(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    return None if x.shape[-1] % 2 == 0 else f"the width {x.shape[-1]} is odd"


@pytest.fixture
def own_table() -> Iterator[None]:
    """All process-wide state as it was afterwards; meanwhile rms_norm has one implementation, `plain`."""
    backends.implementations("rms_norm")
    entries = {name: op.entries for name, op in TABLE.items()}
    last = {name: (op.last, op.refused, dict(op.reasons)) for name, op in TABLE.items()}
    choices, logged, added = dict(CHOICES), set(record._logged), dict(cases_module._added)
    for op in TABLE.values():
        op.last, op.refused, op.reasons = None, (), {}
    for store in (record._logged, CHOICES):
        store.clear()
    TABLE["rms_norm"].assign([])
    backends.register("rms_norm", "torch", plain)
    yield
    for name, op in TABLE.items():
        op.assign(entries[name])
        op.last, op.refused, op.reasons = last[name]
    for store, before in ((CHOICES, choices), (record._logged, logged), (cases_module._added, added)):
        store.clear()
        store.update(before)


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 3, 4), torch.ones(4)


def run(arguments: tuple[Tensor, Tensor], caller: Any = None) -> float:
    """1.0 when `plain` ran, 2.0 when `twice` ran."""
    return backends.run("rms_norm", *arguments, eps=1.0, caller=caller).max().item()


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.usefixtures("own_table")
class TestAuto:
    def test_takes_the_first_without_an_objection(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice, even, before="torch")
        assert [entry.name for entry in backends.implementations("rms_norm")] == ["fast", "torch"]
        assert run(arguments) == 2.0
        assert run((torch.ones(2, 5), torch.ones(5))) == 1.0

    def test_what_is_registered_without_a_place_comes_last(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "late", twice)
        assert run(arguments) == 1.0

    def test_says_every_reason_when_none_can_run(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "a", twice, on_cuda)
        backends.register("rms_norm", "b", None, missing="b is not installed")
        with pytest.raises(
            ValueError, match="no implementation can run rms_norm: a: query is on cpu, not on CUDA; b: b"
        ):
            run(arguments)

    def test_an_operation_without_implementations_says_so(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.unregister("rms_norm", "torch")
        with pytest.raises(ValueError, match="none is registered"):
            run(arguments)

    def test_resolve_says_who_would_run_and_leaves_no_trace(self, arguments: tuple[Tensor, Tensor]) -> None:
        assert backends.resolve("rms_norm", *arguments, eps=1.0).fn is plain
        assert TABLE["rms_norm"].last is None

    def test_a_form_without_backward_steps_aside_for_gradients(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice, before="torch", differentiable=False)
        assert run(arguments) == 2.0
        x, weight = arguments
        weight.requires_grad_()
        assert run((x, weight)) == 1.0
        with torch.no_grad():
            assert run((x, weight)) == 2.0

    def test_the_objection_gets_exactly_the_arguments_of_the_call(self, arguments: tuple[Tensor, Tensor]) -> None:
        seen = []

        def unsupported(*args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))

        backends.register("rms_norm", "fast", twice, unsupported, before="torch")
        run(arguments, caller=nn.Identity())
        assert seen[0][0][0] is arguments[0] and seen[0][1] == {"eps": 1.0}


@pytest.mark.usefixtures("own_table")
class TestForcedChoice:
    def test_a_choice_that_cannot_run_raises_with_the_reason(self) -> None:
        def rule(query: Tensor, key: Tensor) -> Tensor:
            return query

        def unsupported(query: Tensor, key: Tensor) -> str | None:
            return None if query.is_cuda else f"query is on {query.device}, not on CUDA"

        backends.register("gated_delta_rule", "triton_", rule, unsupported)
        with backends.use(delta_rule="triton_"), pytest.raises(ValueError) as caught:
            backends.run("gated_delta_rule", torch.ones(2), torch.ones(2))
        assert str(caught.value) == "backend='triton_' cannot run gated_delta_rule: query is on cpu, not on CUDA"

    def test_so_does_one_that_is_not_installed(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", None, missing="fast_norms is not installed: pip install fast_norms")
        with backends.use(rms_norm="fast"), pytest.raises(ValueError, match="cannot run rms_norm: fast_norms is not"):
            run(arguments)

    def test_as_a_statement_and_as_a_context_manager(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice)
        backends.use(rms_norm="fast")
        assert run(arguments) == 2.0
        with backends.use(rms_norm="torch"):
            assert run(arguments) == 1.0
            with backends.use(rms_norm="auto"):
                assert run(arguments) == 1.0
                backends.use(rms_norm="fast")
            assert run(arguments) == 1.0
        assert run(arguments) == 2.0
        backends.use(rms_norm="auto")
        assert run(arguments) == 1.0

    def test_the_former_choice_returns_after_an_error(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice)
        with pytest.raises(RuntimeError), backends.use(rms_norm="fast"):
            raise RuntimeError
        assert run(arguments) == 1.0

    def test_one_scope_may_be_entered_again(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice)
        scope = backends.use(rms_norm="fast")
        for _ in range(2):
            with scope:
                assert run(arguments) == 2.0
            assert run(arguments) == 1.0

    def test_a_model_s_own_choice_comes_first(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice)
        caller = nn.Identity()
        caller.__dict__["backend_choices"] = {"rms_norm": "fast"}
        assert run(arguments, caller) == 2.0
        with backends.use(rms_norm="torch"):
            assert run(arguments, caller) == 2.0
            assert run(arguments) == 1.0
        caller.__dict__["backend_choices"] = {"rms_norm": "auto"}
        with backends.use(rms_norm="fast"):
            assert run(arguments, caller) == 1.0
        caller.__dict__["backend_choices"] = {"experts": "sorted"}
        with backends.use(rms_norm="fast"):
            assert run(arguments, caller) == 2.0

    def test_unknown_names_raise_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="unknown operation 'delta'; known: rms_norm, .*gated_delta_rule"):
            backends.use(delta="torch")
        with pytest.raises(ValueError, match="rms_norm has no implementation 'tritn'; known: 'torch'"):
            backends.use(rms_norm="tritn")
        with pytest.raises(ValueError, match="unknown operation 'norm'"):
            backends.run("norm", 1)
        with pytest.raises(ValueError, match="unknown operation"):
            backends.describe("norm")
        assert CHOICES == {}

    def test_nothing_is_set_when_one_of_several_names_is_wrong(self) -> None:
        with pytest.raises(ValueError):
            backends.use(rms_norm="torch", experts="nobody's")
        assert CHOICES == {}

    def test_short_names(self) -> None:
        assert backends.checked_choices({"delta_rule": "torch", "convolution": "auto"}) == {
            "gated_delta_rule": "torch",
            "short_convolution": "auto",
        }


@pytest.mark.usefixtures("own_table")
class TestRegister:
    def test_a_name_is_taken_once(self) -> None:
        with pytest.raises(ValueError, match="rms_norm already has an implementation 'torch'"):
            backends.register("rms_norm", "torch", twice)
        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "torch", twice)

    def test_refuses_what_cannot_be_meant(self) -> None:
        with pytest.raises(ValueError, match="unknown operation 'softmax'; known"):
            backends.register("softmax", "mine", twice)
        with pytest.raises(ValueError, match="'auto' cannot be the name"):
            backends.register("rms_norm", "auto", twice)
        with pytest.raises(ValueError, match="neither a function nor a reason"):
            backends.register("rms_norm", "mine", None)
        with pytest.raises(ValueError, match="no implementation 'cuda'; known: 'torch'"):
            backends.register("rms_norm", "mine", twice, before="cuda")

    def test_removing_what_was_chosen_goes_back_to_auto(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice)
        backends.use(rms_norm="fast")
        backends.unregister("rms_norm", "fast")
        assert run(arguments) == 1.0

    def test_every_implementation_takes_the_arguments_of_the_definition(self) -> None:
        """An argument that an implementation lacks would be lost, one more would never be passed."""
        for operation in backends.OPERATIONS:
            parameters = inspect.signature(TABLE[operation].definition).parameters
            for entry in backends.implementations(operation):
                if entry.fn is not None and operation != "rms_norm":  # rms_norm has the test's own here
                    own = inspect.signature(entry.fn).parameters
                    assert parameters.keys() <= own.keys(), (operation, entry.name)
                    assert all(own[name].default is not inspect.Parameter.empty for name in own.keys() - parameters.keys())

    def test_the_table_is_the_public_list(self) -> None:
        assert tuple(sorted(TABLE)) == tuple(sorted(backends.OPERATIONS))
        assert all(getattr(ops, operation) is TABLE[operation] for operation in backends.OPERATIONS)

    def test_every_operation_of_the_design_is_known(self) -> None:
        assert backends.OPERATIONS == (
            *("rms_norm", "gated_rms_norm", "rotary", "attention", "vision_attention", "gelu_linear", "short_convolution"),
            *("gated_delta_rule", "delta_net_step", "router", "experts", "linear_cross_entropy"),
        )


# ------------------------------------------------------------------------------------------------------- what happened


class Norm(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return backends.run("rms_norm", x, self.weight, eps=1.0, caller=self)


@pytest.mark.usefixtures("own_table")
class TestRan:
    def test_counts_names_layers_and_shapes(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice, even, before="torch")
        with backends.ran() as ran:
            for layer in (0, 1, 2, 4):
                Norm(f"layers.{layer}.norm")(arguments[0])
            run((torch.ones(5), torch.ones(5)))
        run(arguments)
        assert ran.counts == {("rms_norm", "fast"): 4, ("rms_norm", "torch"): 1}
        assert ran.calls[0] == ("rms_norm", "fast", "layers.0.norm", ((2, 3, 4), (4,)))
        assert ran.calls[-1] == ("rms_norm", "torch", "", ((5,), (5,)))
        lines = str(ran).splitlines()
        assert lines[0].split() == ["operation", "ran", "calls", "where", "shapes"]
        assert lines[1].split() == ["rms_norm", "fast", "4", "layers.{0-2,4}.norm", "[2,", "3,", "4]", "[4]"]

    def test_blocks_nest_and_close(self, arguments: tuple[Tensor, Tensor]) -> None:
        with backends.ran() as outer:
            run(arguments)
            with backends.ran() as inner:
                run(arguments)
        assert (len(outer.calls), len(inner.calls)) == (2, 1)
        assert not record.RECORDING
        assert str(backends.ran()) == "nothing ran"

    def test_sees_what_backward_computes_again(self, arguments: tuple[Tensor, Tensor]) -> None:
        norm = Norm("layers.0.norm")
        with backends.ran() as ran:
            backends.checkpoint(norm, arguments[0]).sum().backward()
        assert ran.counts == {("rms_norm", "torch"): 2}


@pytest.mark.usefixtures("own_table")
class TestLog:
    def messages(self, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    def test_once_per_operation(self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        for _ in range(3):
            run(arguments)
        assert self.messages(caplog) == [("INFO", "rms_norm runs on 'torch'")]

    def test_a_refused_fast_path_is_a_warning_and_said_once(
        self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", twice, on_cuda, before="torch")
        for _ in range(3):
            run(arguments)
        said = "rms_norm runs on 'torch' (fast was refused: query is on cpu, not on CUDA)"
        assert self.messages(caplog) == [("WARNING", said)]

    def test_also_when_it_ran_before(self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", twice, even, before="torch")
        for width in (4, 5, 4, 5):
            run((torch.ones(width), torch.ones(width)))
        assert [level for level, _ in self.messages(caplog)] == ["INFO", "WARNING"]

    def test_what_is_not_installed_is_no_warning(
        self, arguments: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", None, before="torch", missing="fast_norms is not installed")
        run(arguments)
        said = "rms_norm runs on 'torch' (fast was refused: fast_norms is not installed)"
        assert self.messages(caplog) == [("INFO", said)]


@pytest.mark.usefixtures("own_table")
class TestDescribe:
    def test_every_implementation_and_why(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "gone", None, before="torch", missing="gone is not installed")
        backends.register("rms_norm", "fast", twice, on_cuda, before="torch")
        backends.register("rms_norm", "slow", twice)
        assert self.lines() == {
            "gone": "not on this machine: gone is not installed",
            "fast": "not needed yet",
            "torch": "runs anything",
            "slow": "only when chosen: torch comes first and runs anything",
        }
        run(arguments)
        after = self.lines()
        assert after["fast"] == "refused: query is on cpu, not on CUDA"
        assert after["torch"] == "ran in the last call"
        with backends.use(rms_norm="slow"):
            assert self.lines()["slow"] == "chosen by backends.use"
            assert self.lines()["torch"] == "passed over: slow is chosen"

    def test_for_given_arguments(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", twice, on_cuda, before="torch")
        text = backends.describe("rms_norm", *arguments, eps=1.0)
        assert "fast          cannot run these arguments: query is on cpu, not on CUDA" in text
        assert "torch         runs these arguments" in text
        with backends.use(rms_norm="fast"):
            assert "not on CUDA (and is chosen)" in backends.describe("rms_norm", *arguments, eps=1.0)

    def test_lists_all_operations(self) -> None:
        text = backends.describe()
        assert all(f"\n{operation}\n" in f"\n{text}\n" for operation in backends.OPERATIONS)

    def lines(self) -> dict[str, str]:
        first, *rest = backends.describe("rms_norm").splitlines()
        assert first == "rms_norm"
        return {name: why.strip() for name, _, why in (line.strip().partition(" ") for line in rest)}


# ------------------------------------------------------------------------------------------------------- other seams


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = taps.tap(self, "decay", x)
        return backends.run("rms_norm", x, x.new_ones(x.shape[-1]), eps=1.0, caller=self)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.linear_attn = Mixer()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0].get_submodule("linear_attn")(x)


@pytest.mark.usefixtures("own_table")
class TestTapsAndCheckpoints:
    def test_who_goes_around_a_value_steps_aside_for_a_listener(self) -> None:
        backends.register("rms_norm", "fused", twice, before="torch", skips=("decay", "core"))
        model, x = Model(), torch.ones(2, 4)
        assert model(x).max() == 2.0
        with taps.record(model, "layers.0.linear_attn.decay"):
            assert model(x).max() == 1.0
            assert Model()(x).max() == 2.0  # nobody listens to this one
            with backends.use(rms_norm="fused"), pytest.raises(ValueError, match="a tap reads decay, which this"):
                model(x)
        assert model(x).max() == 2.0

    def test_a_recomputation_repeats_the_choices_of_its_forward(self) -> None:
        backends.register("rms_norm", "fast", twice)
        x = torch.ones(2, 4, requires_grad=True)
        with backends.ran() as ran:
            with backends.use(rms_norm="fast"):
                y = backends.checkpoint(Mixer(), x)
            backends.use(rms_norm="torch")
            y.sum().backward()
            z = backends.checkpoint(Mixer(), x)
            backends.use(rms_norm="fast")
            z.sum().backward()
        assert [call.name for call in ran.calls] == ["fast", "fast", "torch", "torch"]
        assert not recomputing

    def test_also_that_of_auto_and_of_a_nested_checkpoint(self) -> None:
        backends.register("rms_norm", "fast", twice)
        x = torch.ones(2, 4, requires_grad=True)
        inner, outer = Mixer(), Mixer()
        with backends.ran() as ran:
            y = backends.checkpoint(lambda t: outer(backends.checkpoint(inner, t)), x)
            with backends.use(rms_norm="fast"):
                y.sum().backward()
        assert {call.name for call in ran.calls} == {"torch"}
        assert len(ran.calls) >= 4

    def test_and_the_listeners_of_its_forward(self) -> None:
        """Otherwise the recomputation would take the fused form and save other tensors than the forward did."""
        backends.register("rms_norm", "fused", twice, before="torch", skips=("decay",))
        model, x = Model(), torch.ones(2, 4, requires_grad=True)
        with backends.ran() as ran:
            with taps.record(model, "*.decay"):
                y = backends.checkpoint(model, x)
            y.sum().backward()
            z = backends.checkpoint(model, x)
            with taps.record(model, "*.decay") as late:
                z.sum().backward()
        assert [call.name for call in ran.calls] == ["torch", "torch", "fused", "fused"]
        assert not late


@pytest.mark.usefixtures("own_table")
class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_one_graph_when_nobody_listens(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", twice, on_cuda, before="torch", skips=("decay",))
        model, x = Model(), torch.ones(2, 4)
        model.layers[0].get_submodule("linear_attn").__dict__["path"] = "layers.0.linear_attn"
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with backends.ran() as ran:
            assert compiled(x).max() == 1.0
        assert not ran.calls and not caplog.records  # neither recorded nor logged
        assert compiled(x).max() == 1.0

    def test_follows_the_choices(self) -> None:
        backends.register("rms_norm", "fast", twice)
        model, x = Model(), torch.ones(2, 4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert compiled(x).max() == 1.0
        with backends.use(rms_norm="fast"):
            assert compiled(x).max() == 2.0
        assert compiled(x).max() == 1.0
        backends.register("rms_norm", "faster", twice, before="torch")
        assert compiled(x).max() == 2.0

    def test_checkpointed_layers(self) -> None:
        model, x = Model(), torch.ones(2, 4, requires_grad=True)
        compiled = torch.compile(lambda t: backends.checkpoint(model, t), fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(2, 4))


@pytest.mark.usefixtures("own_table")
class TestOptionalPackage:
    """Only the absence of qwen35moe_kernels itself is forgiven."""

    @pytest.fixture(autouse=True)
    def not_loaded(self, own_table: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(table, "loaded", False)
        monkeypatch.delitem(sys.modules, "qwen35moe_kernels", raising=False)

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
        def write(text: str) -> None:
            (tmp_path / "qwen35moe_kernels").mkdir()
            (tmp_path / "qwen35moe_kernels" / "__init__.py").write_text(textwrap.dedent(text))
            monkeypatch.syspath_prepend(tmp_path)

        yield write
        sys.modules.pop("qwen35moe_kernels", None)

    def test_absent(self, arguments: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "qwen35moe_kernels", None)  # what a missing module looks like to import
        assert run(arguments) == 1.0 and table.loaded

    def test_present(self, arguments: tuple[Tensor, Tensor], package: Callable[[str], None]) -> None:
        package(
            """
            def register(register):
                register("rms_norm", "fast", lambda x, weight, *, eps: x + 7, before="torch")
            """
        )
        assert run(arguments) == 8.0
        assert [entry.name for entry in backends.implementations("rms_norm")] == ["fast", "torch"]

    def test_a_choice_may_be_its_first_use(self, package: Callable[[str], None]) -> None:
        package("def register(register):\n    register('rms_norm', 'fast', lambda x, weight, *, eps: x)")
        with backends.use(rms_norm="fast"):
            assert backends.resolve("rms_norm", 1, 2, eps=0).name == "fast"

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("import a_package_it_needs", ModuleNotFoundError, "No module named 'a_package_it_needs'"),
            ("from torch import nothing_like_that", ImportError, "cannot import name"),
            ("def register(register):\n    raise OSError('libcudart.so.13')", OSError, "libcudart"),
        ],
    )
    def test_broken_fails_every_time(
        self,
        text: str,
        error: type[Exception],
        message: str,
        arguments: tuple[Tensor, Tensor],
        package: Callable[[str], None],
    ) -> None:
        package(text)
        for _ in range(2):
            with pytest.raises(error, match=message):
                run(arguments)

    def test_the_one_in_this_repository(self, arguments: tuple[Tensor, Tensor]) -> None:
        kernels = importlib.import_module("qwen35moe_kernels")
        assert Path(str(kernels.__file__)).parents[2] == ROOT
        entered: list[tuple[str, str]] = []
        kernels.register(lambda operation, name, *_, **__: entered.append((operation, name)))
        assert ("gated_delta_rule", "triton") in entered and ("attention", "flash_attn") in entered

    def test_compiling_first_loads_it_too(
        self, arguments: tuple[Tensor, Tensor], package: Callable[[str], None]
    ) -> None:
        package(
            """
            def register(register):
                register("rms_norm", "fast", lambda x, weight, *, eps: x + 7, before="torch")
            """
        )
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, w: backends.run("rms_norm", x, w, eps=1.0), fullgraph=True, backend="eager")
        assert compiled(*arguments).max() == 8.0 and table.loaded


def test_importing_the_seams_is_light() -> None:
    """Neither the fast paths nor the compiler (a second or more) are imported before they are needed."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "from qwen35moe import backends, taps\n"
        "print([name for name in ('qwen35moe_kernels', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.stdout.strip() == "[]", done.stderr


# -------------------------------------------------------------------------------------------------------- verification


def norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for shape in ((2, 3, 4), (1, 7)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, x[0].flatten()[: shape[-1]].clone()), {"eps": 0.5}


@pytest.mark.usefixtures("own_table")
class TestVerify:
    @pytest.fixture(autouse=True)
    def cases(self, own_table: None) -> None:
        backends.add_cases("rms_norm", plain, norm_cases)

    def test_a_right_form_is_ok_forward_and_backward(self) -> None:
        report = backends.verify("rms_norm", dtypes=(torch.float32, torch.bfloat16))
        assert report.ok and len(report.ran) == 4
        assert 0 < report.worst["rms_norm", "torch"] < 4e-2
        assert "rms_norm   torch           float32   2/2" in str(report)

    def test_a_wrong_value_is_found(self) -> None:
        backends.register("rms_norm", "wrong", lambda x, weight, *, eps: plain(x, weight, eps=eps) + 1e-3)
        report = backends.verify("wrong")
        assert not report.ok and report.worst["rms_norm", "wrong"] > 1e-4
        assert "FAILED on 2, first case 0" in str(report)

    def test_a_wrong_gradient_is_found(self) -> None:
        def wrong(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            return plain(x, weight.detach(), eps=eps)

        backends.register("rms_norm", "wrong", wrong)
        row = backends.verify("wrong").rows[0]
        assert row.forward < 1e-6 and row.backward == 1.0 and not row.ok

    def test_nan_and_missing_gradients_and_shapes_and_errors_fail(self) -> None:
        def raises(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            raise RuntimeError("no such kernel")

        backends.register("rms_norm", "nan", lambda x, weight, *, eps: plain(x, weight, eps=eps) * float("nan"))
        backends.register("rms_norm", "cut", lambda x, weight, *, eps: plain(x, weight, eps=eps).detach())
        backends.register("rms_norm", "thin", lambda x, weight, *, eps: plain(x, weight, eps=eps)[..., :1])
        backends.register("rms_norm", "many", lambda x, weight, *, eps: (x, x))
        backends.register("rms_norm", "raises", raises)
        for name in ("nan", "cut", "thin", "many", "raises"):
            report = backends.verify(name)
            assert not report.ok, name
            assert report.worst["rms_norm", name] == float("inf"), name
        assert "RuntimeError: no such kernel" in str(backends.verify("raises"))
        assert "2 outputs, the definition has 1" in str(backends.verify("many"))

    def test_what_objects_did_not_run_and_proves_nothing(self) -> None:
        backends.register("rms_norm", "fast", twice, on_cuda)
        report = backends.verify("fast", device="cpu")
        assert not report.ok and not report.worst
        assert "did not run: query is on cpu, not on CUDA" in str(report)
        assert backends.verify("rms_norm", device="cpu").ok  # torch ran and is right

    def test_a_form_without_backward_is_judged_on_its_forward(self) -> None:
        def forward_only(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            assert not x.requires_grad
            return plain(x, weight, eps=eps)

        backends.register("rms_norm", "fast", forward_only, differentiable=False)
        assert backends.verify("fast").ok

    def test_an_implementation_may_write_into_its_arguments(self) -> None:
        def greedy(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            y = x * weight * eps
            with torch.no_grad():
                x.zero_()
            return y.clone()

        backends.register("rms_norm", "greedy", greedy, differentiable=False)
        assert backends.verify("greedy").ok

    def test_integers_must_be_equal(self) -> None:
        def top(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
            return x * weight, x.argmax(-1)

        def bottom(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
            return x * weight, x.argmin(-1)

        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "top", top)
        backends.register("rms_norm", "bottom", bottom)
        backends.add_cases("rms_norm", top, norm_cases)
        assert backends.verify("top").ok
        assert backends.verify("bottom").worst["rms_norm", "bottom"] == float("inf")

    def test_names(self) -> None:
        with pytest.raises(ValueError, match="unknown name 'nobody'; implementations: .*torch"):
            backends.verify("nobody")
        assert {row.operation for row in backends.verify("rms_norm").rows} == {"rms_norm"}
        assert backends.cases("rms_norm") == (plain, norm_cases)
        assert backends.cases("delta_net_step")[0] is ops.delta_net_step.definition
        with pytest.raises(ValueError, match="unknown operation 'delta_step'; known: rms_norm"):
            backends.cases("delta_step")


def test_every_registered_implementation_is_right() -> None:
    """The suite's own cases, on what this repository ships."""
    report = backends.verify()
    print(report)
    assert report.ok, str(report)
    assert {row.operation for row in report.ran} >= {"rms_norm", "gated_delta_rule", "experts"}
