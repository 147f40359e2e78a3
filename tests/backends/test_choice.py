"""The choice of an implementation: automatic, with `backends.use`, and per model."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.backends.operation import CHOICES, TABLE
from tests.backends.rms_norms import doubled, not_on_cuda, odd_width, plain, run

choice_module: Any = importlib.import_module("qwen35moe.backends.choice")


@pytest.mark.usefixtures("own_table")
class TestAuto:
    def test_the_first_supported_implementation_runs(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled, odd_width, before="torch")
        assert [entry.name for entry in backends.implementations("rms_norm")] == ["fast", "torch"]
        assert run(arguments) == 2.0
        assert run((torch.ones(2, 5), torch.ones(5))) == 1.0

    def test_an_implementation_registered_without_before_comes_last(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "late", doubled)
        assert run(arguments) == 1.0

    def test_the_error_lists_every_reason_when_none_can_run(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "a", doubled, not_on_cuda)
        backends.register("rms_norm", "b", None, missing="b is not installed")
        with pytest.raises(
            ValueError, match="no implementation can run rms_norm: a: query is on cpu, not on CUDA; b: b"
        ):
            run(arguments)

    def test_an_operation_without_implementations_is_an_error(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.unregister("rms_norm", "torch")
        with pytest.raises(ValueError, match="none is registered"):
            run(arguments)

    def test_resolve_returns_the_choice_without_recording_it(self, arguments: tuple[Tensor, Tensor]) -> None:
        assert backends.resolve("rms_norm", *arguments, eps=1.0).fn is plain
        assert TABLE["rms_norm"].last is None

    def test_an_implementation_without_backward_is_skipped_with_gradients(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled, before="torch", differentiable=False)
        assert run(arguments) == 2.0
        x, weight = arguments
        weight.requires_grad_()
        assert run((x, weight)) == 1.0
        with torch.no_grad():
            assert run((x, weight)) == 2.0

    def test_unsupported_receives_exactly_the_arguments_of_the_call(self, arguments: tuple[Tensor, Tensor]) -> None:
        calls = []

        def unsupported(*args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

        backends.register("rms_norm", "fast", doubled, unsupported, before="torch")
        run(arguments, caller=nn.Identity())
        assert calls[0][0][0] is arguments[0] and calls[0][1] == {"eps": 1.0}


@pytest.mark.usefixtures("own_table")
class TestForcedChoice:
    def test_a_choice_that_cannot_run_is_an_error_with_the_reason(self) -> None:
        def rule(query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor) -> Tensor:
            return query

        def unsupported(query: Tensor, *_: Tensor, **__: Tensor) -> str | None:
            return None if query.is_cuda else f"query is on {query.device}, not on CUDA"

        backends.register("gated_delta_rule", "fake", rule, unsupported)
        with backends.use(delta_rule="fake"), pytest.raises(ValueError) as error:
            backends.run("gated_delta_rule", *[torch.ones(1, 2, 1, 2)] * 3, decay=torch.ones(1, 2, 1), beta=torch.ones(1, 2, 1))
        assert str(error.value) == "backend='fake' cannot run gated_delta_rule: query is on cpu, not on CUDA"

    def test_a_choice_that_is_not_installed_is_an_error_with_the_reason(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", None, missing="fast_norms is not installed: pip install fast_norms")
        with backends.use(rms_norm="fast"), pytest.raises(ValueError, match="cannot run rms_norm: fast_norms is not"):
            run(arguments)

    def test_as_a_statement_and_as_a_context_manager(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled)
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

    def test_the_previous_choice_is_restored_after_an_error(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled)
        with pytest.raises(RuntimeError), backends.use(rms_norm="fast"):
            raise RuntimeError
        assert run(arguments) == 1.0

    def test_a_scope_can_be_entered_twice(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled)
        scope = backends.use(rms_norm="fast")
        for _ in range(2):
            with scope:
                assert run(arguments) == 2.0
            assert run(arguments) == 1.0

    def test_the_choice_of_a_model_takes_precedence(self, arguments: tuple[Tensor, Tensor]) -> None:
        backends.register("rms_norm", "fast", doubled)
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

    def test_unknown_names_are_errors_that_list_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="unknown operation 'delta'; known: rms_norm, .*gated_delta_rule"):
            backends.use(delta="torch")
        with pytest.raises(ValueError, match="rms_norm has no implementation 'tritn'; known: 'torch'"):
            backends.use(rms_norm="tritn")
        with pytest.raises(ValueError, match="unknown operation 'norm'"):
            backends.run("norm", 1)
        with pytest.raises(ValueError, match="unknown operation"):
            backends.describe("norm")
        assert CHOICES == {}

    def test_one_wrong_name_of_several_leaves_all_choices_unchanged(self) -> None:
        with pytest.raises(ValueError):
            backends.use(rms_norm="torch", experts="unknown")
        assert CHOICES == {}

    def test_short_names(self) -> None:
        assert backends.checked_choices({"delta_rule": "torch", "convolution": "auto"}) == {
            "gated_delta_rule": "torch",
            "short_convolution": "auto",
        }


@pytest.mark.usefixtures("own_table")
class TestOverlappingBlocks:
    """Every block takes back its own choice alone, in whatever order blocks end."""

    @pytest.fixture(autouse=True)
    def forms(self, own_table: None) -> None:
        for name in ("a", "b", "c"):
            backends.register("rms_norm", name, doubled)

    def test_blocks_that_end_in_the_order_in_which_they_began(self) -> None:
        first, second = backends.use(rms_norm="a"), backends.use(rms_norm="b")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert backends.choice_of("rms_norm") == "b"
        second.__exit__(None, None, None)
        assert backends.choice_of("rms_norm") is None and CHOICES == {}

    def test_generators(self) -> None:
        def scoped(name: str) -> Iterator[str | None]:
            with backends.use(rms_norm=name, experts="loop"):
                yield backends.choice_of("rms_norm")
                yield backends.choice_of("rms_norm")

        backends.use(rms_norm="c")
        first, second = scoped("a"), scoped("b")
        assert (next(first), next(second), next(first)) == ("a", "b", "b")
        first.close()
        assert (next(second), backends.choice_of("experts")) == ("b", "loop")
        second.close()
        assert CHOICES == {"rms_norm": "c"}

    def test_tasks(self) -> None:
        async def task(name: str, steps: int) -> None:
            with backends.use(rms_norm=name):
                for _ in range(steps):
                    await asyncio.sleep(0)

        async def together() -> None:
            await asyncio.gather(task("a", 1), task("b", 4), task("c", 2))

        asyncio.run(together())
        assert CHOICES == {}

    def test_threads(self) -> None:
        def work(name: str) -> None:
            for _ in range(100):
                with backends.use(rms_norm=name):
                    time.sleep(0)

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert CHOICES == {}

    def test_an_error_in_the_outer_block_and_a_choice_that_was_unregistered(self) -> None:
        outer = backends.use(rms_norm="a")
        with pytest.raises(RuntimeError), outer, backends.use(rms_norm="b"):
            backends.unregister("rms_norm", "b")
            assert CHOICES == {}
            raise RuntimeError
        assert CHOICES == {}

    def test_many_statements_do_not_pile_up(self) -> None:
        for _ in range(50):
            backends.use(rms_norm="a")
            backends.use(rms_norm="b")
        assert len(choice_module._stacks["rms_norm"]) <= 2 and CHOICES == {"rms_norm": "b"}
