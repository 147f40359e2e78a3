"""Results: `ModelOutput` in the order of the caller's tokens, made of a `DecoderOutput` in the order of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.inputs import TextInputs
from qwen35moe.modules.context import LayerOutput
from qwen35moe.routing import RouterOutput, Routing

if TYPE_CHECKING:
    from qwen35moe.models.text import Qwen3_5MoeTextModel


@dataclass
class ModelOutput:
    """The results of a forward call, as attributes and as a mapping of those that are not None.

    logits [B, T, vocabulary] (or of the positions logits_to_keep); loss and aux_loss, scalars; router_logits, one [B*T, E]
    per sparse layer; hidden_states, the embedding, then one [B, T, D] per layer, the last after the final norm;
    attentions, one per layer: softmax weights [B, H, T, P] of an attention layer, over the tokens in the cache and the new
    ones; the exact map [B, H, T, T] of a Gated DeltaNet layer, over the new tokens only (earlier ones are in its recurrent
    state, see docs/guide/attention_maps.md); routing; cache, the one passed in. Values at padded positions are zero.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: Routing | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache: Cache | None = None

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return list(self.values())[key]
        if key not in self.keys():
            raise KeyError(f"{key!r} is not in this output, which has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Names of the results that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name, None) is not None)

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, getattr(self, name)) for name in self.keys())

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default


class LossOutput(ModelOutput):
    """The results of a call with output_logits=False: everything but the logits."""

    @property
    def logits(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not computed: AttributeError."""
        raise AttributeError("the logits were not computed: the call had output_logits=False")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        """The constructor's None."""


@dataclass
class DecoderOutput:
    """What the decoder computed, in the layers' arrangement `layout`: hidden [rows, tokens, D] after the final norm;
    states, the embedding and the output of every layer but the last, when they are returned; one LayerOutput per layer."""

    layout: TokenLayout
    hidden: Tensor
    states: list[Tensor]
    layers: list[LayerOutput]

    @property
    def choices(self) -> list[RouterOutput]:
        """The routers' choices, one per sparse layer."""
        return [layer.router for layer in self.layers if layer.router is not None]

    def results(self, inputs: TextInputs, model: Qwen3_5MoeTextModel) -> ModelOutput:
        """The results that the call asks for, in the caller's order."""
        layout, layers = self.layout, self.layers
        output = ModelOutput(last_hidden_state=layout.restore(self.hidden), cache=inputs.cache)
        if inputs.output_hidden_states:
            output.hidden_states = tuple(layout.restore(state) for state in [*self.states, self.hidden])
        if inputs.output_attentions:
            attentions = [layer.attention for layer in layers if layer.attention is not None]
            output.attentions = tuple(restore_attention(weights, layout) for weights in attentions)
        router_logits = inputs.output_router_logits
        if router_logits is None:
            router_logits = not model.dense and model.config.output_router_logits
        if router_logits:
            output.router_logits = tuple(restore_flat(choice.logits, layout) for choice in self.choices)
        if inputs.output_routing:
            output.routing = self._routing(model)
        return output

    def _routing(self, model: Qwen3_5MoeTextModel) -> Routing:
        """The choices of all sparse layers, which are named by their numbers in the checkpoint."""
        layers = tuple(model.source_layers[i] for i, layer in enumerate(self.layers) if layer.router is not None)
        indices, weights, logits = (
            torch.stack([restore_flat(getattr(choice, name), self.layout) for choice in self.choices])
            for name in ("indices", "weights", "logits")
        )
        experts = model.config.text_config.num_experts
        return Routing(indices, weights, logits, layers, experts, self.layout.shape, self.layout.mask())


def restore_flat(values: Tensor, layout: TokenLayout) -> Tensor:
    """[rows * tokens, ...] of the layers to [B * T, ...] of the caller."""
    return layout.restore(values.unflatten(0, (layout.rows, layout.tokens))).flatten(0, 1)


def restore_attention(weights: Tensor, layout: TokenLayout) -> Tensor:
    """Attention weights [rows, H, tokens, P] to the caller's [B, H, T, P]; the keys too where they are the tokens."""
    if layout.source is None:
        return weights
    if weights.shape[-1] != layout.tokens:
        return layout.restore(weights.transpose(1, 2)).transpose(1, 2)
    row, column = layout.source // layout.shape[1], layout.source % layout.shape[1]
    valid = torch.ones_like(row, dtype=torch.bool) if layout.valid is None else layout.valid
    together = valid[:, :, None] & valid[:, None] & (row[:, :, None] == row[:, None])
    r, i, j = together.nonzero(as_tuple=True)
    whole = weights.new_zeros(layout.shape[0], *[layout.shape[1]] * 2, weights.shape[1])
    index = (row[r, i], column[r, i], column[r, j])
    return whole.index_put(index, weights.permute(0, 2, 3, 1)[r, i, j]).permute(0, 3, 1, 2)
