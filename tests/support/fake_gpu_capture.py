"""Scenarios of `tests.support.fake_gpu` for captured decode steps: see qwen35moe/generation/captured.py.

A step on fake CUDA tensors that ends has read no value. In addition the operations of two steps are compared with all their
arguments: a number of the host that changes from step to step would be another argument, and a tensor in other memory another
storage. `graph` is captured where capturing would forbid an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.support.fake_gpu_generation import PENALISED, SAMPLED


def static_step(torch: Any, layers: int = 4) -> Callable[[], object]:
    """A step of the 35B model, or of four of its layers, for one row: the second one."""
    from qwen35moe import Config, Qwen3_5MoeForCausalLM
    from qwen35moe.models.static_step import StaticStep
    from tests.support.fake_gpu import ids, model_of

    config = Config.preset("35b-a3b").text_config
    model = model_of(torch, Qwen3_5MoeForCausalLM, config if layers == 40 else config.replace(num_hidden_layers=layers))
    cache = model.new_cache(1, max_length=300)
    with torch.no_grad():
        model(ids(torch, 1, 129), cache=cache)
        step = StaticStep(model, cache)
        step()
    return torch.no_grad()(lambda: step.run(step.prepare()[0]))


def equal_steps(torch: Any) -> Callable[[], object]:
    """Two steps of 4 layers, one after the other, whose operations and arguments must be equal."""
    from qwen35moe.cache.static import advance
    from qwen35moe.models.static_step import StaticStep
    from tests.support.fake_gpu import ids, small
    from tests.support.recorded import new_tensors

    model = small(torch)
    cache = model.new_cache(2, max_length=300)
    with torch.no_grad():
        model(ids(torch, 2, 129), cache=cache)
    step = StaticStep(model, cache)

    @torch.no_grad()
    def steps() -> None:
        traces = []
        for _ in range(2):
            positions = step.prepare()[0]
            with Trace() as trace:
                step.run(positions)
            advance(cache, frozen=False)
            traces.append(trace.calls)
        first, second = traces
        assert len(first) == len(second) > 100, (len(first), len(second))
        for before, after in zip(first, second, strict=True):
            assert before == after, f"{before} became {after}"

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Trace(TorchDispatchMode):
        """Every operation with its arguments: numbers by value, tensors by storage where it is older than the step."""

        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, Any]] = []
            self.fresh: dict[int, int] = {}
            self.alive: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            described = tree_map_only(torch.Tensor, self.describe, (args, kwargs))
            self.calls.append((str(func), described))
            for x in new_tensors(out, args, kwargs or {}):
                self.alive.append(x)  # so that its storage is not used again
                self.fresh.setdefault(x.untyped_storage()._cdata, len(self.fresh))
            return out

        def describe(self, x: Any) -> Any:
            storage = x.untyped_storage()._cdata
            place = f"temporary {self.fresh[storage]}" if storage in self.fresh else storage
            return place, str(x.device), x.dtype, tuple(x.shape), x.stride(), x.storage_offset()

    return steps


class Runs:
    """In place of `captured.GraphCapture`: runs every step as at its capture, in which no tensor of the host may take part, not
    even a number: its copy would wait."""

    def __init__(self, torch: Any) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        from tests.support.recorded import tensors

        class OnDevice(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                assert all(x.is_cuda for x in tensors((args, kwargs, out))), f"{func} gets a tensor of the host"
                return out

        self.mode = OnDevice

    def warm(self, function: Callable[[], None]) -> None:
        with self.mode():
            function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.warm(function)


def generation(torch: Any, **options: Any) -> Callable[[], object]:
    """generate() with the steps that it captures, from the prefill to the last token."""
    from qwen35moe.generation import captured, loop
    from tests.support.fake_gpu_generation import decoding

    call = decoding(torch, cache="static", **options)
    steps = mock.patch.object(loop, "captured_steps", lambda model, cache, wanted: captured.CapturedSteps(model, cache))
    # A fake tensor has no address.
    replaced = mock.patch.multiple(captured, capture_of=lambda device: Runs(torch), signature=lambda model, cache: 0)

    def captured_call() -> None:
        with steps, replaced:
            call()

    return captured_call


SCENARIOS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "static_step": static_step, "static_step_35b": lambda torch: static_step(torch, 40), "equal_steps": equal_steps,
    "captured": generation, "captured_sampled": lambda torch: generation(torch, **SAMPLED, **PENALISED),
}
