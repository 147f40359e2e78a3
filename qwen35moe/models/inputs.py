"""The arguments of a forward call, named and described once, and read and checked once.

`TextInputs` and `CausalLMInputs` hold the arguments. `prepared` checks them (`checks.check`) and returns the `TokenLayout` of
their tokens.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from qwen35moe.backends.values import values_known
from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.compat import read_keywords
from qwen35moe.compat.forward import FORWARD
from qwen35moe.models.checks import check, check_tokens
from qwen35moe.models.packing import require
from qwen35moe.routing import ForcedRouting, Intervention, ReadyMade, Routing

if TYPE_CHECKING:
    from typing_extensions import Self

    from qwen35moe.models.text import Qwen3_5MoeTextModel


@dataclass(frozen=True, eq=False)
class TransformersKeywords:
    """transformers' keywords (docs/guide/from_transformers.md): past_key_values (cache), use_cache (True without a cache makes
    a growing one), cache_position [T], return_dict (False: a tuple), cu_seq_lens_q and cu_seq_lens_k (cu_seqlens), max_length_q
    and max_length_k, seq_idx [B, T] (the number of each token's document), token_type_ids and mm_token_type_ids (zeros).
    """

    _: KW_ONLY
    past_key_values: Cache | None = None
    use_cache: bool | None = None
    cache_position: Tensor | None = None
    return_dict: bool | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None
    seq_idx: Tensor | None = None
    token_type_ids: Tensor | None = None
    mm_token_type_ids: Tensor | None = None

    def translated(self, method: str) -> Self:
        """The same arguments in our names. ValueError where two of them disagree."""
        renamed = {name: value for name in RENAMED if (value := getattr(self, name)) is not None}
        if not renamed:
            return self
        ours = {name: value for name in ("cache", "cu_seqlens") if (value := getattr(self, name)) is not None}
        bounds: Any = ours.get("cu_seqlens")
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if bounds is None or name not in renamed:
                bounds = renamed.get(name, bounds)
            elif renamed[name].shape == bounds.shape and not values_known(renamed[name]):
                # read_keywords would compare values, which a compiled graph and torch.vmap cannot branch on
                require((renamed[name] == bounds).all(), f"{method}() got {name} that differ: give cu_seqlens")
                renamed[name] = bounds
        return replace(self, **read_keywords(method, FORWARD, {**ours, **renamed}, own=ours), **dict.fromkeys(renamed))


RENAMED = ("past_key_values", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True, eq=False)
class Planned:
    """The layout of a call that a model with a head has checked, for the model inside it."""

    inputs: TextInputs
    layout: TokenLayout

    def holds(self, inputs: TextInputs) -> bool:
        """Whether the arguments that the layout depends on are still those; hooks may have replaced them."""
        return all(getattr(self.inputs, name) is getattr(inputs, name) for name in _OF_LAYOUT)


_OF_LAYOUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "cu_seqlens", "seq_idx")


@dataclass(frozen=True, eq=False)
class TextInputs(TransformersKeywords):
    """input_ids [B, T], or inputs_embeds [B, T, D] instead.
    attention_mask [B, past + T]: ones for tokens, zeros for padding, over what the cache has seen and the new tokens; or,
    without a cache, the number of each token's document in its row, 1 1 1 2 2 0.
    position_ids [B, T], or [3, B, T] for time, height and width, or [4, B, T] with the positions of the text in front: by
    default counted from each row's first token. Where they start again, a packed document begins.
    cache: continued and updated.
    cu_seqlens [documents + 1]: bounds of the documents packed in one row; with a cache, document d continues row d.
    routing: what the routers are to choose, a `Routing`, indices [B, T, L, k] or a function (layer, logits).
    output_router_logits (by default as the configuration says), output_routing, output_hidden_states, output_attentions:
    results to return, see `ModelOutput`.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache: Cache | None = None
    cu_seqlens: Tensor | None = None
    _: KW_ONLY
    routing: Routing | Tensor | Intervention | None = None
    output_router_logits: bool | None = None
    output_routing: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    planned: Planned | None = field(default=None, metadata={"internal": True})


@dataclass(frozen=True, eq=False)
class CausalLMInputs(TextInputs):
    """labels [B, T]: token ids, -100 where there is nothing to learn. Position t is trained on label t + 1, never across
    packed documents or padding.
    num_items_in_batch: the loss is the sum over labels divided by this number; None: their mean.
    output_logits=False: computes the loss without ever holding the logits.
    logits_to_keep: the logits of the last n positions only (0: of all), or those of a tensor of positions.
    """

    labels: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None
    _: KW_ONLY
    output_logits: bool = True
    logits_to_keep: int | Tensor = 0


Inputs = TypeVar("Inputs", bound=TextInputs)


def prepared(inputs: Inputs, model: Qwen3_5MoeTextModel) -> tuple[Inputs, TokenLayout]:
    """The arguments of a call, with a new cache for use_cache=True without one, and the layout of their tokens."""
    if inputs.planned is not None and inputs.planned.holds(inputs):
        return inputs, inputs.planned.layout
    if inputs.use_cache and inputs.cache is None:
        tokens = check_tokens(inputs, model)[0]
        inputs = replace(inputs, cache=model.new_cache(tokens if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1))
    return inputs, check(inputs, model)


def body_arguments(kind: type[TextInputs], inputs: TextInputs, layout: TokenLayout) -> dict[str, Any]:
    """The arguments of a checked call that a model without its head takes, without those at their defaults; and the layout."""
    fields = kind.__dataclass_fields__
    values = {name: getattr(inputs, name) for name in fields if name not in _CHECKED}
    changed = {name: value for name, value in values.items() if value is not fields[name].default}
    return {**changed, "planned": Planned(inputs, layout)}


_CHECKED = (
    "use_cache", "return_dict", "cache_position", "max_length_q", "max_length_k", "token_type_ids", "planned",
)  # fmt: skip


def forced_routing(
    routing: Routing | Tensor | Intervention, layout: TokenLayout, model: Qwen3_5MoeTextModel
) -> ForcedRouting:
    """`routing=` checked against the model and in the layers' order. It names layers as the checkpoint does; in a model of
    some of those layers they are numbered anew."""
    layers, text = model.source_layers, model.config.text_config
    if isinstance(routing, ReadyMade):
        routing = routing.bind(layers=layers, num_experts=text.num_experts, top_k=text.num_experts_per_tok)
    if layers != tuple(range(len(layers))):
        if isinstance(routing, Routing):
            if missing := [layer for layer in routing.layers if layer not in layers]:
                raise ValueError(f"the routing holds layer {missing[-1]}, the model has the layers {list(layers)}")
            routing = replace(routing, layers=tuple(layers.index(layer) for layer in routing.layers))
        elif callable(routing) and not isinstance(routing, Tensor):
            routing = _renumbered(routing, layers)
    return ForcedRouting(
        routing, layers=text.num_hidden_layers, num_experts=text.num_experts, top_k=text.num_experts_per_tok,
        shape=layout.shape, arrange=layout.arrange,
    )


def _renumbered(intervention: Intervention, layers: tuple[int, ...]) -> Intervention:
    return lambda layer, logits: intervention(layers[layer], logits)
