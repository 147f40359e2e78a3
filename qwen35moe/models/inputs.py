"""The arguments of a forward call, named and described once, and read and checked once.

`TextInputs` and `CausalLMInputs` hold the arguments. `check` compares them with the model and with each other and returns
the `TokenLayout` of their tokens, or raises ValueError before anything is computed.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.plan import document_starts, plan_layout
from qwen35moe.ops.losses import IGNORE
from qwen35moe.routing import ForcedRouting, Intervention, ReadyMade, Routing

if TYPE_CHECKING:
    from qwen35moe.models.text import Qwen3_5MoeTextModel


@dataclass(frozen=True, eq=False)
class TextInputs:
    """input_ids [B, T], or inputs_embeds [B, T, D] instead.
    attention_mask [B, past + T]: ones for tokens, zeros for padding, over what the cache has seen and the new tokens.
    position_ids [B, T] or [3, B, T]: by default counted from each row's first token.
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


def check(inputs: TextInputs, model: Qwen3_5MoeTextModel) -> TokenLayout:
    """The layout of a call's tokens. ValueError where its arguments contradict the model or each other."""
    batch, tokens = _check_tokens(inputs, model)
    if model.dense:
        _check_dense(inputs)
    if isinstance(inputs, CausalLMInputs):
        _check_head(inputs, batch, tokens, model.config.text_config.vocab_size)
    cache = inputs.cache
    if cache is not None:
        _check_cache(cache, batch, model)
    mask, position_ids, bounds = inputs.attention_mask, inputs.position_ids, inputs.cu_seqlens
    if mask is not None:
        mask = _new_mask(mask, batch, tokens, cache)
    if position_ids is not None:
        position_ids = _checked_positions(position_ids, batch, tokens)
    if bounds is not None:
        bounds = _checked_bounds(bounds, position_ids, batch, tokens, mask)
    device = model.device
    layout = plan_layout(batch, tokens, device, mask=mask, position_ids=position_ids, cu_seqlens=bounds, cache=cache)
    if cache is not None:
        cache.check_room(layout)
        if cache.max_length is not None and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            raise ValueError("a static cache is written in place and carries no gradient: use no_grad(), or a growing one")
    return layout


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


# ------------------------------------------------------------------------------------------------------- single arguments


def _check_tokens(inputs: TextInputs, model: Qwen3_5MoeTextModel) -> tuple[int, int]:
    """(B, T) of input_ids or inputs_embeds."""
    input_ids, embeds, text = inputs.input_ids, inputs.inputs_embeds, model.config.text_config
    if (input_ids is None) == (embeds is None):
        raise ValueError(f"give either input_ids or inputs_embeds, got {'neither' if input_ids is None else 'both'}")
    if embeds is not None:
        if embeds.dim() != 3 or embeds.shape[-1] != text.hidden_size:
            raise ValueError(f"inputs_embeds {list(embeds.shape)} must be [B, T, {text.hidden_size}]")
        if embeds.dtype != model.dtype:
            raise ValueError(f"inputs_embeds are {embeds.dtype}, the model is {model.dtype}: convert one of them")
        shape = embeds.shape[:2]
    else:
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids are integers [B, T], got {list(input_ids.shape)} {input_ids.dtype}")
        shape = input_ids.shape
    if shape[0] < 1 or shape[1] < 1:
        raise ValueError(f"the input {list(shape)} holds no token: a prompt needs at least one")
    if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= text.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary 0 ... {text.vocab_size - 1}")
    return int(shape[0]), int(shape[1])


def _check_dense(inputs: TextInputs) -> None:
    asks = {
        "output_router_logits=True": inputs.output_router_logits, "output_routing=True": inputs.output_routing,
        "routing=": inputs.routing is not None,
    }
    for argument, present in asks.items():
        if present:
            raise ValueError(f"{argument} needs routers, and this configuration is dense")


def _check_head(inputs: CausalLMInputs, batch: int, tokens: int, vocabulary: int) -> None:
    """labels and logits_to_keep. Values on the CPU are looked at too."""
    labels, keep = inputs.labels, inputs.logits_to_keep
    if labels is None and not inputs.output_logits:
        raise ValueError("output_logits=False computes the loss alone and needs labels")
    if labels is not None:
        if labels.shape != (batch, tokens) or labels.is_floating_point():
            raise ValueError(f"labels {list(labels.shape)} {labels.dtype} must be integers {[batch, tokens]}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))]
            if wrong.numel():
                raise ValueError(f"label {int(wrong[0])} is neither {IGNORE} nor in the vocabulary 0 ... {vocabulary - 1}")
    if not isinstance(keep, Tensor):
        if keep < 0:
            raise ValueError(f"logits_to_keep={keep} must be a number of positions >= 0")
        return
    if keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
        raise ValueError(f"logits_to_keep is a number or integers [positions], got {list(keep.shape)} {keep.dtype}")
    if keep.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = keep[(keep < -tokens) | (keep >= tokens)]
        if outside.numel():
            raise ValueError(f"logits_to_keep names position {int(outside[0])}, the input has {tokens}")


def _check_cache(cache: Cache, batch: int, model: Qwen3_5MoeTextModel) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(f"the cache is a {type(cache).__name__}, this model needs its own: model.new_cache({batch})")
    if len(cache.layers) != len(model.layers):
        raise ValueError(f"the cache holds {len(cache)} layers, the model has {len(model.layers)}: use model.new_cache")
    dtype = model.embed_tokens.weight.dtype
    if cache.dtype != dtype:
        raise ValueError(f"the cache holds {cache.dtype}, the model is {dtype}: make one with model.new_cache")


def _new_mask(mask: Tensor, batch: int, tokens: int, cache: Cache | None) -> Tensor | None:
    """The mask of the new tokens as booleans; None when none of them is padding."""
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions {list(mask.shape)}: only a 2-D mask [{batch}, tokens] of ones and "
            "zeros applies to the convolution and the delta rule too. Packed documents are separated by cu_seqlens"
        )
    past = 0 if cache is None else cache.seen
    if mask.shape != (batch, past + tokens):
        raise ValueError(
            f"attention_mask {list(mask.shape)} does not cover [{batch}, {past + tokens}]: {past} positions in the cache and "
            f"{tokens} new ones"
        )
    if mask.dtype != torch.bool and not torch.compiler.is_compiling():
        other = mask[(mask != 0) & (mask != 1)]
        if other.numel():
            raise ValueError(f"attention_mask holds {other[0].item()}: give ones for tokens and zeros for padding")
    mask = mask.bool()
    if mask.device.type == "cpu" and cache is not None and past:
        before = mask[:, :past].sum(1)
        if not torch.equal(before, cache.lengths.cpu()):
            raise ValueError(
                f"attention_mask says the rows hold {before.tolist()} tokens so far, the cache holds {cache.lengths.tolist()}"
            )
    new = mask[:, past:]
    if torch.compiler.is_compiling():
        return new
    return None if bool(new.all()) else new


def _checked_positions(position_ids: Tensor, batch: int, tokens: int) -> Tensor:
    """[B, T] or [3, B, T], with one row for all expanded to every row."""
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids are {position_ids.dtype}: give integers")
    shape = tuple(position_ids.shape)
    if shape[-2:] not in ((batch, tokens), (1, tokens)) or position_ids.dim() not in (2, 3) or (
        position_ids.dim() == 3 and shape[0] not in (3, 4)
    ):
        raise ValueError(
            f"position_ids {list(shape)} do not fit the input [{batch}, {tokens}]: give [{batch}, {tokens}], or "
            f"[3, {batch}, {tokens}] for time, height and width"
        )
    # transformers' [4, B, T] has the text positions in front of the three axes
    return position_ids[-3:].expand(3, batch, tokens) if position_ids.dim() == 3 else position_ids.expand(batch, tokens)


def _checked_bounds(
    cu_seqlens: Tensor, position_ids: Tensor | None, batch: int, tokens: int, mask: Tensor | None
) -> Tensor:
    if mask is not None:
        raise ValueError("cu_seqlens and an attention_mask with padding contradict each other: leave the padding out")
    if batch != 1:
        raise ValueError(f"cu_seqlens describe one packed row [1, T], the input has {batch} rows: flatten them into one")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is a vector of integers 0 ... {tokens}, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if torch.compiler.is_compiling():
        return cu_seqlens.long()
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens {bounds[:8]} ... must rise from 0 to the number of tokens, {tokens}")
    starts = document_starts(position_ids, None) if position_ids is not None and position_ids.dim() == 2 else None
    inside = [] if starts is None else sorted(set(starts[0].nonzero()[:, 0].tolist()) - set(bounds))
    if inside:
        raise ValueError(f"position_ids start again at token {inside[0]}, where cu_seqlens {bounds[:8]} begin no document")
    return cu_seqlens.long()
