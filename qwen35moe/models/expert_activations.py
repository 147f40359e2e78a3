"""Each expert's inputs, outputs and weights in a forward: for pruning, merging and studying experts.

    with expert_activations(model) as recorded:
        model(ids)
    for part in recorded:
        saliency[part.layer, part.expert] += (part.weights * part.outputs.norm(dim=-1)).sum()

or, storing nothing, layer by layer during the forward: `with expert_activations(model, function): ...`. The values are those
of the taps expert_in and expert_out, so the experts run in the form that materialises them, and the model computes with
exactly these values.
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
from qwen35moe.taps.active import Tap

_VALUES = ("indices", "weights", "expert_in", "expert_out")


@dataclass(frozen=True)
class ExpertActivations:
    """The tokens of one expert in one forward: inputs and outputs [tokens, D], the outputs before they are weighted;
    weights [tokens]; tokens, their indices in the layers' N = rows * tokens.

    Padding is left out, and so are experts without a token. On the autograd graph if the forward was.
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
    """Context manager: collects the ExpertActivations of forwards of `model`, or calls `function` on each when its layer ends.

    layers: numbers of the layers to record, all by default; ValueError for one that has no experts. A recomputation under
    gradient checkpointing is not recorded again. Inside the block the experts run in the form "tapped" (or unfused), which
    holds the values of one whole layer.
    """
    return ExpertActivationRecorder(model, function, layers)


class ExpertActivationRecorder(Sequence[ExpertActivations]):
    """The collected ExpertActivations in the order of layers, then experts; readable inside the block and after it."""

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
        self._recording = _LastValues(model, names)
        self._function, self._kept = function or self._keep, list[ExpertActivations]()
        self._hooks = ExitStack()

    def __enter__(self) -> ExpertActivationRecorder:
        for layer in self._decoders:
            self._hooks.callback(layer.register_forward_hook(self._end).remove)
        self._hooks.enter_context(self._recording)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def _end(self, layer: Any, args: tuple, output: object) -> None:
        """After a layer, outside of what gradient checkpointing recomputes. args[1] is its LayerContext."""
        values = self._recording.values.pop(layer.mlp, {})
        if missing := [name for name in _VALUES if name not in values]:
            raise ValueError(
                f"expert_activations: the experts of layer {layer.mlp.layer} have run without computing {', '.join(missing)}: "
                "an operation or module of your own must pass its values to the argument tap"
            )
        for activations in _split(int(layer.mlp.layer), values, args[1].layout.valid):
            self._function(activations)

    def _keep(self, activations: ExpertActivations) -> None:
        self._kept.append(activations)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: Any) -> Any:
        return self._kept[number]

    def clear(self) -> None:
        """Deletes everything collected so far."""
        self._kept.clear()


class _LastValues(Recording):
    """A recording that keeps each layer's last values until the layer ends."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self.values: dict[nn.Module, dict[str, Tensor]] = {}

    def __exit__(self, *exc: object) -> None:
        Tap.__exit__(self, *exc)  # values that were not computed are reported when their layer ends

    def read(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Stores a named value of the forward in progress."""
        if (module, name) in self.targets:
            self.values.setdefault(module, {})[name] = value


def _split(layer: int, values: dict[str, Tensor], valid: Tensor | None) -> Iterator[ExpertActivations]:
    """The activations of each expert. Rows of expert_in are sorted by expert, in the stable order of the chosen experts."""
    indices = values["indices"]
    order = indices.reshape(-1).argsort(stable=True)
    tokens = order // indices.shape[1]
    parts = [tokens, values["expert_in"], values["expert_out"], values["weights"].reshape(-1)[order]]
    experts = indices.reshape(-1)[order]
    if valid is not None:
        real = valid.flatten()[tokens]
        parts, experts = [part[real] for part in parts], experts[real]
    hit, counts = experts.unique_consecutive(return_counts=True)
    for expert, *tensors in zip(hit.tolist(), *(part.split(counts.tolist()) for part in parts), strict=True):
        yield ExpertActivations(layer, expert, *tensors)
