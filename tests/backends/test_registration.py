"""Registration of implementations, and the optional package that registers the kernels."""

from __future__ import annotations

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
            *("rms_norm", "gated_rms_norm", "rotary", "attention", "vision_attention", "gelu_linear", "short_convolution"),
            *("gated_delta_rule", "delta_net_step", "router", "experts", "linear_cross_entropy"),
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


def test_importing_backends_and_taps_does_not_import_kernels_or_the_compiler() -> None:
    """The kernels, Triton and Dynamo (a second or more) are imported on first use."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "from qwen35moe import backends, taps\n"
        "print([name for name in ('qwen35moe_kernels', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "docs")
    assert process.stdout.strip() == "[]", process.stderr
