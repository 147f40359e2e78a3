"""What goes into each expert, what comes out, and by how much it counts: for pruning, merging and reading experts.

    with expert_activations(model) as seen:
        model(ids)
    for rows in seen:
        saliency[rows.layer, rows.expert] += (rows.weights * rows.outputs.norm(dim=-1)).sum()

or, keeping nothing, one layer at a time as the forward reaches it: `with expert_activations(model, function): ...`. It listens
to the named values expert_in and expert_out (taps), so the experts run in the form that shows them, and every value is
the one the model goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qwen35moe.modules.decoder import DecoderLayer
from qwen35moe.modules.moe import SparseMoeBlock
from qwen35moe.taps import Recording

_VALUES = ("indices", "weights", "expert_in", "expert_out")


@dataclass(frozen=True)
class ExpertActivations:
    """One expert's share of one forward, R (token, slot) pairs: inputs and outputs [R, D], the output before its weight
    in the sum, weights [R]; tokens [R], the rows of the layers' [rows * tokens] they come from.

    Tokens that are not there are left out, experts without a row do not appear. On the autograd graph if the forward was.
    """

    layer: int
    expert: int
    tokens: Tensor
    inputs: Tensor
    outputs: Tensor
    weights: Tensor


def expert_activations(
    model: nn.Module, function: Callable[[ExpertActivations], None] | None = None, layers: Sequence[int] | None = None
) -> ExpertActivationRecorder:
    """Context manager over the forwards of `model`: collects ExpertActivations, or calls `function` on each as its layer ends.

    layers: numbers of the layers to listen to, all by default; ValueError for one that has no experts. A recomputation
    under gradient checkpointing is not seen a second time. Inside the block the experts run in the form "watched" (or
    unfused), which holds the rows of one whole layer.
    """
    return ExpertActivationRecorder(model, function, layers)


class ExpertActivationRecorder(Sequence[ExpertActivations]):
    """What `expert_activations` collected, in the order of layers, then experts; readable inside the block and after it."""

    def __init__(
        self, model: nn.Module, function: Callable[[ExpertActivations], None] | None, layers: Sequence[int] | None
    ) -> None:
        blocks = {m.layer: m for m in model.modules() if isinstance(m, SparseMoeBlock)}
        missing = [layer for layer in layers or () if layer not in blocks]
        if missing or not blocks:
            which = f"layer {missing[0]} has none" if missing else "no layer has any"
            raise ValueError(f"expert_activations needs layers with experts, {which}; layers with experts: {sorted(blocks)}")
        wanted = sorted(blocks) if layers is None else layers
        self._decoders = [m for m in model.modules() if isinstance(m, DecoderLayer) and getattr(m.mlp, "layer", -1) in wanted]
        names = [f"layers.{layer}.mlp.{name}" for layer in wanted for name in _VALUES]
        self._listener = _Listener(model, names)
        self._function, self._kept = function or self._keep, list[ExpertActivations]()
        self._hooks = ExitStack()

    def __enter__(self) -> ExpertActivationRecorder:
        for layer in self._decoders:
            self._hooks.callback(layer.register_forward_hook(self._end).remove)
        self._hooks.enter_context(self._listener)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def _end(self, layer: Any, args: tuple, output: object) -> None:
        """After a layer, and outside of what is computed again; the step among its arguments knows which tokens exist."""
        for rows in _split(int(layer.mlp.layer), self._listener.values.pop(layer.mlp), args[1].layout.valid):
            self._function(rows)

    def _keep(self, rows: ExpertActivations) -> None:
        self._kept.append(rows)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: Any) -> Any:
        return self._kept[number]

    def clear(self) -> None:
        """Forget what was collected so far."""
        self._kept.clear()


class _Listener(Recording):
    """A recording that holds what each layer has shown last, until its end takes it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self.values: dict[nn.Module, dict[str, Tensor]] = {}

    def read(self, module: nn.Module, name: str, value: Tensor) -> None:
        """A named value of the forward in progress."""
        if (module, name) in self.targets:
            self.values.setdefault(module, {})[name] = value


def _split(layer: int, values: dict[str, Tensor], valid: Tensor | None) -> Iterator[ExpertActivations]:
    """The rows of each expert: those of expert_in lie expert by expert, in the stable order of the chosen experts."""
    indices = values["indices"]
    order = indices.reshape(-1).argsort(stable=True)
    tokens = order // indices.shape[1]
    parts = [tokens, values["expert_in"], values["expert_out"], values["weights"].reshape(-1)[order]]
    experts = indices.reshape(-1)[order]
    if valid is not None:
        there = valid.flatten()[tokens]
        parts, experts = [part[there] for part in parts], experts[there]
    hit, counts = experts.unique_consecutive(return_counts=True)
    for expert, *rows in zip(hit.tolist(), *(part.split(counts.tolist()) for part in parts), strict=True):
        yield ExpertActivations(layer, expert, *rows)
