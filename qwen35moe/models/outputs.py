"""Results: `ModelOutput` in the order of the caller's tokens, made of a `DecoderOutput` in the order of the layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.inputs import TextInputs
from qwen35moe.modules.context import LayerOutput
from qwen35moe.ops.balancing import load_balancing_loss, load_imbalance
from qwen35moe.routing import RouterOutput, Routing

if TYPE_CHECKING:
    from qwen35moe.models.text import Qwen3_5MoeTextModel

# In the order of `to_tuple()`, which is that of transformers' outputs of a model with a head and of one without it.
NAMES = (
    "loss", "aux_loss", "logits", "last_hidden_state", "past_key_values", "hidden_states", "attentions", "router_logits",
    "routing", "load_imbalance", "balancing_loss",
)  # fmt: skip


def _with_keys(output: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output)


def _register(cls: type[ModelOutput]) -> None:
    """Registers a class of outputs as a pytree of its results, for torch.export, DDP and FSDP."""
    pytree.register_pytree_node(
        cls,
        lambda output: (list(output.values()), list(output.keys())),
        lambda values, names: cls(zip(names, values, strict=True)),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=_with_keys,
    )


class ModelOutput(OrderedDict[str, Any]):
    """The results of a forward call: an ordered mapping of those that are present, with the same names as attributes.

    As transformers' ModelOutput: a dict and a pytree; an attribute that is not present is None and not among the keys;
    `output[0]`, `output[:2]` and `to_tuple()` count the present ones, so that [0] is the loss when labels were given, else the
    logits (of a model without a head, the hidden states). `==` compares the values of tensors.

    loss, scalar; aux_loss, scalar, the load-balancing loss (of a model without a head: balancing_loss); logits
    [B, T, vocabulary] (or of the positions logits_to_keep); last_hidden_state [B, T, D], of a model without a head;
    past_key_values, also `cache`: the cache passed in, or made for use_cache=True; hidden_states, the embedding, then one
    [B, T, D] per layer, the last after the final norm; attentions, one per layer: softmax weights [B, H, T, P] of an attention
    layer, over the tokens in the cache and the new ones; the exact map [B, H, T, T] of a Gated DeltaNet layer, over the new
    tokens only (earlier ones are in its recurrent state, see docs/guide/attention_maps.md); router_logits, one [B*T, E] per
    sparse layer; routing; load_imbalance [L], beside router_logits: the highest load of an expert divided by the mean load of
    its layer, 1 when it is even. Values at padded positions are zero.
    """

    if TYPE_CHECKING:
        loss: Tensor | None
        last_hidden_state: Tensor | None
        aux_loss: Tensor | None
        logits: Tensor | None
        past_key_values: Cache | None
        hidden_states: tuple[Tensor, ...] | None
        attentions: tuple[Tensor, ...] | None
        router_logits: tuple[Tensor, ...] | None
        routing: Routing | None
        load_imbalance: Tensor | None
        balancing_loss: Tensor | None

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:
        super().__init__()
        results = dict(values, **named)
        for name in (*NAMES, *(name for name in results if name not in NAMES)):
            value = results.get(name)
            if value is not None:
                super().__setitem__(name, value)

    def __init_subclass__(cls) -> None:
        _register(cls)

    @property
    def cache(self) -> Cache | None:
        """`past_key_values`."""
        return self.get("past_key_values")

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r} is not in this output, which has {', '.join(self)}")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        """None removes a result; a new one is put at its place in the order."""
        if value is None:
            self.pop(key, None)
            return
        new = key not in self
        super().__setitem__(key, value)
        if new and key in NAMES:
            for name in [name for name in self if name not in NAMES[: NAMES.index(key) + 1]]:
                self.move_to_end(name)

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are present, in order."""
        return tuple(self.values())

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _equal(dict(self), dict(other))  # type: ignore[call-overload]

    def __ne__(self, other: object) -> bool:  # OrderedDict has its own
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = "".join(f"  {name}={_shown(value)},\n" for name, value in self.items())
        return f"{type(self).__name__}(\n{values})" if values else f"{type(self).__name__}()"


class LossOutput(ModelOutput):
    """The results of a call with output_logits=False: everything but the logits."""


def _entry(name: str, warning: str | None = None) -> Any:
    def read(output: ModelOutput) -> Any:
        value = output.get(name)
        if value is None and warning is not None:
            warnings.warn(warning, stacklevel=2)
        return value

    return property(read, lambda output, value: output.__setitem__(name, value))


_register(ModelOutput)
for _name in NAMES:
    setattr(ModelOutput, _name, _entry(_name))
ModelOutput.past_key_values = _entry(
    "past_key_values",
    "this call kept no state, so past_key_values is None: pass use_cache=True, or cache=model.new_cache(batch_size)",
)
LossOutput.logits = _entry("logits", "the logits were not computed, so they are None: the call had output_logits=False")


def returned(output: ModelOutput, inputs: TextInputs) -> Any:
    """The output, or a tuple of its values for return_dict=False."""
    return output.to_tuple() if inputs.return_dict is False else output


def _equal(one: Any, other: Any) -> bool:
    """Whether two results are equal: tensors by their values, containers by their members."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def _shown(value: Any) -> str:
    """A result in one line of `repr`: shapes and dtypes, and the value of a scalar."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"
        return f"{value.item():.6g} ({kind})" if not value.dim() and plain else f"{list(value.shape)} {kind}"
    if isinstance(value, list | tuple) and value and all(isinstance(member, Tensor) for member in value):
        shapes = {_shown(member) for member in value}
        return f"{len(value)} x {shapes.pop()}" if len(shapes) == 1 else f"({', '.join(_shown(member) for member in value)})"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:96]} ..."


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
        results: dict[str, Any] = {"last_hidden_state": layout.restore(self.hidden), "past_key_values": inputs.cache}
        if inputs.output_hidden_states:
            results["hidden_states"] = tuple(layout.restore(state) for state in [*self.states, self.hidden])
        if inputs.output_attentions:
            attentions = [layer.attention for layer in layers if layer.attention is not None]
            results["attentions"] = tuple(restore_attention(weights, layout) for weights in attentions)
        router_logits = inputs.output_router_logits
        if router_logits is None:
            router_logits = not model.dense and model.config.output_router_logits
        if router_logits:
            results["router_logits"] = tuple(restore_flat(choice.logits, layout) for choice in self.choices)
            results |= self._balance(model)
        if inputs.output_routing:
            results["routing"] = self._routing(model)
        return ModelOutput(results)

    def _balance(self, model: Qwen3_5MoeTextModel) -> dict[str, Tensor]:
        """The load-balancing loss as the configuration has it, and the imbalance of each layer's load; padding left out."""
        text, valid = model.config.text_config, self.layout.valid
        mask = None if valid is None else valid.flatten()
        logits, indices = ([getattr(choice, name) for choice in self.choices] for name in ("logits", "indices"))
        per_layer = text.router_aux_loss_per_layer
        loss = load_balancing_loss(logits, indices, mask=mask, per_layer=per_layer)
        imbalance = load_imbalance(indices, text.num_experts, mask=mask)
        return {"balancing_loss": loss.mean() if per_layer else loss, "load_imbalance": imbalance}

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
    size = layout.shape[1]
    row, column = layout.source // size, layout.source % size
    together = row[:, :, None] == row[:, None]
    if layout.valid is not None:
        together = together & layout.valid[:, :, None] & layout.valid[:, None]
    # Pairs of a query and a key of other rows, and of padding, go to one more row, which is cut off.
    target = torch.where(together, row[:, :, None], layout.shape[0])
    whole = weights.new_zeros(layout.shape[0] + 1, size, size, weights.shape[1])
    index = (target, column[:, :, None].expand_as(target), column[:, None].expand_as(target))
    return whole.index_put(index, weights.permute(0, 2, 3, 1))[:-1].permute(0, 3, 1, 2)
