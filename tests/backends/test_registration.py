"""Registration of implementations, and the optional package that registers the kernels."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.backends.operation import TABLE
from tests.backends.rms_norms import doubled, run

table: Any = importlib.import_module("qwen35moe.backends.operation")  # `backends.operation` is the decorator

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("own_table")
class TestRegister:
    def test_a_name_is_registered_once(self) -> None:
        with pytest.raises(ValueError, match="rms_norm already has an implementation 'torch'"):
            backends.register("rms_norm", "torch", doubled)
        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "torch", doubled)

    def test_invalid_registrations_are_errors(self) -> None:
        with pytest.raises(ValueError, match="unknown operation 'softmax'; known"):
            backends.register("softmax", "mine", doubled)
        with pytest.raises(ValueError, match="'auto' cannot be the name"):
            backends.register("rms_norm", "auto", doubled)
        with pytest.raises(ValueError, match="neither a function nor a reason"):
            backends.register("rms_norm", "mine", None)
        with pytest.raises(ValueError, match="no implementation 'cuda'; known: 'torch'"):
            backends.register("rms_norm", "mine", doubled, before="cuda")

    def test_a_signature_that_a_call_cannot_reach_is_an_error(self) -> None:
        def named_otherwise(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
            return x

        def more(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
            return x

        for fn, message in (
            (named_otherwise, r"\(x, weight, epsilon\), the operation is called with \(x, weight, eps\): it must take eps="),
            (lambda x: x, "the first 2 arguments are passed by position"),
            (more, "bias is never passed and has no default"),
            (3, "is int, not a function"),
        ):
            with pytest.raises(ValueError, match=message):
                backends.register("rms_norm", "mine", fn)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="unsupported of the implementation 'mine' of rms_norm takes"):
            backends.register("rms_norm", "mine", doubled, named_otherwise)  # type: ignore[arg-type]
        for fn in (lambda *args, **kwargs: args[0], lambda a, b, **rest: a, lambda x, weight, eps, speed=1: x):
            backends.register("rms_norm", "mine", fn)
            backends.unregister("rms_norm", "mine")

    def test_unknown_names_in_skips_and_transforms_are_errors(self) -> None:
        with pytest.raises(ValueError, match="skips='expert_outs' is no tapped value; near it: .*expert_out"):
            backends.register("experts", "mine", five_arguments, skips=("expert_outs",))
        with pytest.raises(ValueError, match="sequence of names"):
            backends.register("experts", "mine", five_arguments, skips="expert_out")
        with pytest.raises(ValueError, match=r"transforms=\['vamp'\] are unknown; known: grad, jvp, vmap"):
            backends.register("experts", "mine", five_arguments, transforms=("grad", "vamp"))

    def test_unregistering_the_chosen_implementation_resets_the_choice_to_auto(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled)
        backends.use(rms_norm="fast")
        backends.unregister("rms_norm", "fast")
        assert run(arguments) == 1.0

    def test_every_implementation_takes_the_arguments_of_the_definition(self) -> None:
        """A missing argument would be ignored; additional arguments are never passed and need a default."""
        for operation in backends.OPERATIONS:
            parameters = inspect.signature(TABLE[operation].definition).parameters
            for entry in backends.implementations(operation):
                if entry.fn is not None and operation != "rms_norm":  # rms_norm holds the implementation of this test
                    own = inspect.signature(entry.fn).parameters
                    assert parameters.keys() <= own.keys(), (operation, entry.name)
                    assert all(own[name].default is not inspect.Parameter.empty for name in own.keys() - parameters.keys())

    def test_the_table_holds_the_public_operations(self) -> None:
        assert tuple(sorted(TABLE)) == tuple(sorted(backends.OPERATIONS))
        assert all(getattr(ops, operation) is TABLE[operation] for operation in backends.OPERATIONS)

    def test_the_operations_and_their_order(self) -> None:
        assert backends.OPERATIONS == (
            *("rms_norm", "add_rms_norm", "gated_rms_norm", "linear", "projections", "rotary", "norm_rotary", "attention"),
            *("sigmoid_gate", "vision_attention", "gelu_linear", "short_convolution", "gated_delta_rule", "delta_net_step"),
            *("router", "experts", "swiglu", "add_shared_expert", "linear_cross_entropy"),
        )


@pytest.mark.usefixtures("own_table")
class TestOptionalPackage:
    """A missing qwen35moe_kernels is ignored; any other error while it is imported is raised."""

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
        monkeypatch.setitem(sys.modules, "qwen35moe_kernels", None)  # as import sees a missing module
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

    def test_a_choice_loads_it(self, package: Callable[[str], None]) -> None:
        package("def register(register):\n    register('rms_norm', 'fast', lambda x, weight, *, eps: x)")
        with backends.use(rms_norm="fast"):
            assert backends.resolve("rms_norm", 1, 2, eps=0).name == "fast"

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("import missing_dependency", ModuleNotFoundError, "No module named 'missing_dependency'"),
            ("from torch import missing_name", ImportError, "cannot import name"),
            ("def register(register):\n    raise OSError('libcudart.so.13')", OSError, "libcudart"),
        ],
    )
    def test_an_error_in_it_is_raised_every_time(
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

    def test_the_package_of_this_repository(self, arguments: tuple[Tensor, Tensor]) -> None:
        kernels = importlib.import_module("qwen35moe_kernels")
        assert Path(str(kernels.__file__)).parents[2] == ROOT
        registered: list[tuple[str, str]] = []
        kernels.register(lambda operation, name, *_, **__: registered.append((operation, name)))
        assert ("gated_delta_rule", "triton") in registered and ("attention", "flash_attn") in registered

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_compiled_call_loads_it(
        self, arguments: tuple[Tensor, Tensor], package: Callable[[str], None]
    ) -> None:
        package(
            """
            def register(register):
                register("rms_norm", "fast", lambda x, weight, *, eps: x + 7, before="torch")
            """
        )
        compiled = torch.compile(lambda x, w: backends.run("rms_norm", x, w, eps=1.0), fullgraph=True, backend="eager")
        assert compiled(*arguments).max() == 8.0 and table.loaded


def five_arguments(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return ops.experts.definition(hidden, gate_up, down, indices, weights)


EXPERTS = (torch.randn(5, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4), torch.tensor([[0, 2]] * 5), torch.rand(5, 2))


@pytest.mark.usefixtures("own_table")
class TestLeftOutParameters:
    """An implementation may leave out a parameter with a default: calls with another value go to others."""

    def test_experts_without_a_tap(self) -> None:
        backends.register("experts", "mine", five_arguments, before="loop")
        with backends.use(experts="mine"), backends.ran() as ran:
            assert torch.equal(ops.experts(*EXPERTS, tap=None), ops.experts.definition(*EXPERTS))
            with pytest.raises(ValueError, match="backend='mine' cannot run experts: it does not take tap="):
                ops.experts(*EXPERTS, tap=lambda name, value: value)
        assert ran.counts["experts", "mine"] == 1
        seen: list[str] = []
        ops.experts(*EXPERTS, tap=lambda name, value: seen.append(name) or value)  # "auto" goes on to one that takes it
        assert seen == ["expert_in", "expert_act", "expert_out"]
        report = backends.verify("mine")
        assert report.ok and [row.reason for row in report.rows if row.reason] == ["it does not take tap="]

    def test_one_that_takes_the_tap_and_does_not_call_it_fails(self) -> None:
        backends.register("experts", "deaf", lambda *args, tap=None: five_arguments(*args))
        report = backends.verify("deaf")
        assert not report.ok and sum(not row.ok for row in report.ran) == 1

    def test_one_that_skips_tapped_values_is_passed_over_while_they_are_tapped(self) -> None:
        fn = lambda *args, tap=None: five_arguments(*args)  # noqa: E731
        backends.register("experts", "mine", fn, before="loop", skips=("expert_out",))
        with backends.use(experts="mine"), pytest.raises(ValueError, match="a tap reads expert_out, which"):
            ops.experts(*EXPERTS, tap=lambda name, value: value)

    def test_attention_without_dropout(self) -> None:
        def mine(query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: Any = 0, cu_seqlens: Any = None) -> Tensor:
            return query

        backends.register("attention", "mine", mine)
        qkv = [torch.ones(1, 2, 1, 4)] * 3
        with backends.use(attention="mine"):
            assert ops.attention(*qkv, scale=1.0, dropout=0.0) is qkv[0]
            with pytest.raises(ValueError, match="it does not take dropout="):
                ops.attention(*qkv, scale=1.0, dropout=0.1)


@pytest.mark.usefixtures("own_table")
class TestFusedForms:
    """A fused form steps aside where others have registered one of the operations that it replaces."""

    @staticmethod
    def rule(query: Tensor, key: Tensor, value: Tensor, *, beta: Tensor, **options: Any) -> Any:
        return ops.gated_delta_rule.definition(query, key, value, beta=2 * beta, **options)

    @staticmethod
    def step() -> tuple[tuple, dict]:
        return next(iter(backends.cases("delta_net_step")[1](torch.float32, "cpu", torch.Generator().manual_seed(0))))

    def test_registered_in_front(self) -> None:
        args, options = self.step()
        with torch.no_grad():
            assert ops.delta_net_step.fused(*args, **options) is not None
            assert backends.is_builtin("gated_delta_rule", "short_convolution", "gated_rms_norm")
            backends.register("gated_delta_rule", "mine", self.rule, before="chunked_cpu")
            assert ops.delta_net_step.fused(*args, **options) is None
            entry, refused = ops.delta_net_step.choose(args, options, None)
            reasons = {other.name: reason for other, reason, _ in refused}
            assert entry.name == "torch" and reasons["fused_cpu"] == (
                "it does not call the implementation that was registered for gated_delta_rule"
            )
            assert not backends.is_builtin("short_convolution", "delta_rule") and backends.is_builtin("short_convolution")
            backends.unregister("gated_delta_rule", "mine")
            assert ops.delta_net_step.fused(*args, **options) is not None

    def test_registered_behind_all_it_replaces_nothing_unless_chosen(self) -> None:
        args, options = self.step()
        backends.register("gated_delta_rule", "mine", self.rule)
        with torch.no_grad():
            assert backends.is_builtin("gated_delta_rule") and ops.delta_net_step.fused(*args, **options) is not None
            with backends.use(gated_delta_rule="mine"):
                assert not backends.is_builtin("gated_delta_rule") and ops.delta_net_step.fused(*args, **options) is None
            caller = torch.nn.Identity()
            caller.__dict__["backend_choices"] = {"gated_delta_rule": "mine"}
            assert not backends.is_builtin("gated_delta_rule", caller=caller)

    def test_a_wrapper_of_a_builtin_is_not_builtin(self) -> None:
        @functools.wraps(ops.gated_delta_rule.definition)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.rule(*args, **kwargs)

        backends.register("gated_delta_rule", "wrapped", wrapped, before="chunked_cpu")
        assert not backends.is_builtin("gated_delta_rule")

    def test_their_own_fused_form_runs(self) -> None:
        args, options = self.step()
        backends.register("gated_delta_rule", "mine", self.rule, before="chunked_cpu")
        backends.register("delta_net_step", "mine", lambda *args, **kwargs: args, before="fused_cpu")
        with torch.no_grad():
            assert ops.delta_net_step.fused(*args, **options) == args


def test_importing_backends_and_taps_does_not_import_kernels_or_the_compiler() -> None:
    """The kernels, Triton and Dynamo (a second or more) are imported on first use."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "from qwen35moe import backends, taps\n"
        "print([name for name in ('qwen35moe_kernels', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "docs")
    assert process.stdout.strip() == "[]", process.stderr
