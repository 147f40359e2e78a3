"""Checks of a call's arguments, against the model and against each other. Everything wrong is a ValueError that is raised
before anything is computed; in a compiled graph an assertion when the graph runs, where values decide.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.backends.values import on_host, unbatched, values_known
from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.cache.states import check_sizes
from qwen35moe.compat import short
from qwen35moe.models.packing import (
    bound_starts,
    checked_bounds,
    mask_starts,
    number_starts,
    packed_starts,
    readable,
    require,
    shown_bounds,
    text_positions,
)
from qwen35moe.models.plan import plan_layout
from qwen35moe.ops.losses import IGNORE

if TYPE_CHECKING:
    from qwen35moe.models.inputs import CausalLMInputs, TextInputs
    from qwen35moe.models.text import Qwen3_5MoeTextModel


def check(inputs: TextInputs, model: Qwen3_5MoeTextModel) -> TokenLayout:
    """The layout of a call's tokens. ValueError where its arguments contradict the model or each other."""
    batch, tokens = check_tokens(inputs, model)
    if model.dense:
        _check_dense(inputs)
    if hasattr(inputs, "labels"):
        _check_head(inputs, batch, tokens, model.config.text_config.vocab_size)  # pyright: ignore[reportArgumentType]
    _check_types(inputs)
    cache = inputs.cache
    if cache is not None:
        _check_cache(cache, batch, model)
    inputs = _on_host(inputs, tokens)
    if inputs.cache_position is not None:
        _check_cache_position(inputs.cache_position, tokens, cache)
    mask, starts, bounds, position_ids = None, {}, inputs.cu_seqlens, inputs.position_ids
    if inputs.attention_mask is not None:
        mask, starts = _new_mask(inputs.attention_mask, batch, tokens, cache)
    if position_ids is not None:
        position_ids = _checked_positions(position_ids, batch, tokens)
    if bounds is not None:
        if mask is not None:
            raise ValueError("cu_seqlens and an attention_mask with padding contradict each other: leave the padding out")
        bounds = checked_bounds(bounds, batch, tokens, max(inputs.max_length_q or 0, inputs.max_length_k or 0) or None)
    if inputs.seq_idx is not None:
        starts["seq_idx"] = _seq_idx_starts(inputs.seq_idx, batch, tokens, mask)
    if bounds is not None and (starts or position_ids is not None):
        starts[shown_bounds(bounds)] = bound_starts(bounds, tokens)
    documents = packed_starts(starts, position_ids, mask) if starts or position_ids is not None else None
    if cache is not None:
        _check_continuation(cache, documents, position_ids, mask, bounds)
    if position_ids is not None and position_ids.dim() == 3:
        position_ids = position_ids[-3:]
    device = model.device
    layout = plan_layout(
        batch, tokens, device, mask=mask, position_ids=position_ids, cu_seqlens=bounds, starts=documents, cache=cache
    )
    if cache is not None:
        cache.check_room(layout)
        if cache.max_length is not None and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            raise ValueError("a static cache is written in place and carries no gradient: use no_grad(), or a growing one")
    return layout


_LAID_OUT = ("attention_mask", "position_ids", "seq_idx", "cu_seqlens", "cache_position")


def _on_host(inputs: TextInputs, tokens: int) -> TextInputs:
    """The arguments with those that decide the layout in CPU memory: read from a GPU in one transfer, the lengths of the cache
    with them where the host does not have them. So their errors are the same on every device.

    A step of one token behind others reads nothing: the sizes of its layout are known, and its values are asserted on the GPU.
    """
    cache, arguments = inputs.cache, {name: getattr(inputs, name) for name in _LAID_OUT}
    if cache is not None and cache.seen > 0 and tokens == 1 and inputs.cu_seqlens is None:
        return inputs
    mask = arguments["attention_mask"]
    if mask is not None and mask.dim() != 2:
        del arguments["attention_mask"]  # [B, 1, T, T]: `mask_starts` reads its result
    tensors = {name: x for name, x in arguments.items() if x is not None and not x.is_cpu and values_known(x)}
    if set(tensors) <= {"cache_position"}:
        return inputs  # an assertion does
    lengths = [] if cache is None or cache.host_lengths is not None or not values_known(cache._lengths) else [cache._lengths]
    copies = on_host([*tensors.values(), *lengths])
    if cache is not None and lengths:
        cache.set_host_lengths(copies[-1].tolist())
    return replace(inputs, **dict(zip(tensors, copies, strict=False)))


# ------------------------------------------------------------------------------------------------------- single arguments


def check_tokens(inputs: TextInputs, model: Qwen3_5MoeTextModel) -> tuple[int, int]:
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
    if input_ids is not None and values_known(ids := unbatched(input_ids)) and ids.is_cpu:
        low, high = int(ids.min()), int(ids.max())
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
    if inputs.num_items_in_batch is not None:
        _check_num_items(inputs.num_items_in_batch)
    if labels is None and not inputs.output_logits:
        raise ValueError("output_logits=False computes the loss alone and needs labels")
    if labels is not None:
        if labels.shape != (batch, tokens) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels {list(labels.shape)} {labels.dtype} must be integers {[batch, tokens]}")
        if values_known(labels := unbatched(labels)) and labels.is_cpu:
            wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocabulary))]
            if wrong.numel():
                raise ValueError(f"label {int(wrong[0])} is neither {IGNORE} nor in the vocabulary 0 ... {vocabulary - 1}")
    if not isinstance(keep, Tensor):
        if isinstance(keep, bool) or not hasattr(keep, "__index__"):
            raise ValueError(f"logits_to_keep is a number or integers [positions], got a {type(keep).__name__}")
        if keep < 0:
            raise ValueError(f"logits_to_keep={keep} must be a number of positions >= 0")
        return
    if keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
        raise ValueError(f"logits_to_keep is a number or integers [positions], got {list(keep.shape)} {keep.dtype}")
    if values_known(keep := unbatched(keep)) and keep.is_cpu:
        outside = keep[(keep < -tokens) | (keep >= tokens)]
        if outside.numel():
            raise ValueError(f"logits_to_keep names position {int(outside[0])}, the input has {tokens}")


def _check_num_items(number: Any) -> None:
    """num_items_in_batch: one number >= 0. 0, of a batch without labels, gives the NaN of such a mean."""
    if isinstance(number, Tensor):
        right = number.numel() == 1 and not number.is_complex() and number.dtype != torch.bool
        right = right and (not values_known(number) or not number.is_cpu or 0 <= float(number) < math.inf)
    else:
        right = isinstance(number, numbers.Real) and not isinstance(number, bool) and 0 <= float(number) < math.inf
    if not right:
        raise ValueError(f"num_items_in_batch={short(number)} must be one number of labels >= 0")


def _check_cache(cache: Cache, batch: int, model: Qwen3_5MoeTextModel) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}, this model needs its own: pass use_cache=True and take "
            f"output.past_key_values, or pass model.new_cache({batch})"
        )
    if len(cache) != len(model.layers):
        raise ValueError(f"the cache holds {len(cache)} layers, the model has {len(model.layers)}: use model.new_cache")
    check_sizes(cache.config, model.config.text_config)
    dtype = model.dtype
    if cache.dtype != dtype:
        raise ValueError(f"the cache holds {cache.dtype}, the model is {dtype}: make one with model.new_cache")


def _new_mask(
    mask: Tensor, batch: int, tokens: int, cache: Cache | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The mask of the new tokens as booleans, None when none is padding; and where the documents begin that it names."""
    if mask.dim() != 2:
        starts = None if cache is not None or not values_known(mask) else mask_starts(mask, batch, tokens)
        if starts is not None:
            return None, {"attention_mask": starts}
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions {list(mask.shape)}: only a 2-D mask [{batch}, tokens] of ones and "
            "zeros applies to the convolution and the delta rule too (a 4-D mask may separate packed documents, without "
            "padding and without a cache). Packed documents are separated by cu_seqlens"
        )
    past = 0 if cache is None else cache.seen
    if mask.shape != (batch, past + tokens):
        raise ValueError(
            f"attention_mask {list(mask.shape)} does not cover [{batch}, {past + tokens}]: {past} positions in the cache and "
            f"{tokens} new ones"
        )
    starts = {}
    if mask.dtype != torch.bool:
        mask = mask.long() if mask.dtype in (torch.uint16, torch.uint32, torch.uint64) else mask
        zero_or_one = ((mask == 0) | (mask == 1)).all()
        if not readable(zero_or_one):
            require(zero_or_one, "attention_mask holds ones for tokens and zeros for padding")
        elif not bool(zero_or_one):
            starts["attention_mask"] = _numbered(mask, cache)
    mask = mask.bool()
    if cache is not None and past:
        _check_past(mask[:, :past].sum(1), cache)
    new = mask[:, past:]
    full = unbatched(new)
    return None if readable(full) and bool(full.all()) else new, starts


def _check_past(before: Tensor, cache: Cache) -> None:
    """ValueError unless the rows of the mask hold as many past tokens `before` [B] as the cache."""
    held = cache.host_lengths
    if not readable(before) or (held is None and not readable(cache.lengths)):
        equal = before.to(cache._lengths.device, non_blocking=True) == cache._lengths
        require(equal.all(), "attention_mask does not hold as many past tokens as the cache")
    elif before.tolist() != (held := cache.lengths.tolist() if held is None else list(held)):
        raise ValueError(f"attention_mask has {before.tolist()} tokens before the new ones, the cache holds {held}")


def _numbered(mask: Tensor, cache: Cache | None) -> Tensor:
    """Where the documents of a mask 1 1 1 2 2 0 begin, [B, T]; ValueError where the mask is none."""
    other = mask[(mask != 0) & (mask != 1)]
    valid = mask > 0
    wide = mask.double()
    whole = bool((torch.isfinite(wide) & (wide == wide.round()) & (wide >= 0)).all())
    first = torch.where(valid, mask, mask.new_full((), 1)).amin(1) if whole else None
    if first is None or bool((first != 1).any()) or cache is not None:
        reason = "" if first is None or cache is None else "; a row of a cache holds one document: give cu_seqlens instead"
        raise ValueError(
            f"attention_mask holds {other[0].item()}: give ones for tokens and zeros for padding, or without a cache the "
            f"numbers 1, 2, ... of the documents packed in each row{reason}"
        )
    return number_starts(mask.long(), valid, "attention_mask")


def _seq_idx_starts(seq_idx: Tensor, batch: int, tokens: int, mask: Tensor | None) -> Tensor:
    if seq_idx.shape not in ((batch, tokens), (1, tokens)) or seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx {list(seq_idx.shape)} {seq_idx.dtype} must be integers [{batch}, {tokens}]")
    return number_starts(seq_idx.expand(batch, tokens), mask, "seq_idx")


def _check_types(inputs: TextInputs) -> None:
    """Types of tokens that a text model does not have: zeros are accepted."""
    for name in ("token_type_ids", "mm_token_type_ids"):
        types = getattr(inputs, name)
        if types is None or (name == "mm_token_type_ids" and hasattr(inputs, "pixel_values")):
            continue
        way_out = (
            "the input holds images or videos, which Qwen3_5MoeForConditionalGeneration reads and this class does not"
            if name == "mm_token_type_ids" else "the model has one type of token: leave them out"
        )
        require((types == 0).all(), f"{name} are not all zero: {way_out}")


def _check_cache_position(cache_position: Tensor, tokens: int, cache: Cache | None) -> None:
    past = 0 if cache is None else cache.seen
    if cache_position.shape != (tokens,) or cache_position.is_floating_point():
        raise ValueError(f"cache_position {list(cache_position.shape)} {cache_position.dtype} must be integers [{tokens}]")
    expected = torch.arange(past, past + tokens, device=cache_position.device)
    if not readable(cache_position):
        require((cache_position == expected).all(), "cache_position does not continue what the cache has seen")
    elif not torch.equal(cache_position, expected):
        raise ValueError(
            f"cache_position runs from {int(cache_position[0])} to {int(cache_position[-1])}, the {tokens} new tokens are at "
            f"{past} ... {past + tokens - 1}: the cache has seen {past}. cache.rollback and restore return to an earlier state"
        )


def _check_continuation(
    cache: Cache, documents: Tensor | None, position_ids: Tensor | None, mask: Tensor | None, bounds: Tensor | None
) -> None:
    """ValueError where the positions of the new tokens begin a document inside a row of the cache."""
    if documents is not None and bounds is None:
        row, token = documents.nonzero()[0].tolist()
        raise ValueError(
            f"a document begins at token {token} of row {row}, and a row of a cache holds one document: give cu_seqlens, and a "
            "cache with one row for each document"
        )
    if position_ids is None or cache.seen == 0:
        return
    positions = text_positions(position_ids).long()
    if bounds is not None:
        first = positions[..., 0, bounds[:-1].clamp(max=positions.shape[-1] - 1)]
        new = bounds.diff() > 0
    elif mask is None:
        first, new = positions[..., 0], torch.ones((), dtype=torch.bool, device=positions.device)
    else:
        column = mask.to(torch.int8).argmax(1)
        first, new = positions.gather(-1, column.expand(*positions.shape[:-1])[..., None])[..., 0], mask.any(1)
    if first.dim() == 2:  # three axes, equal where a document begins
        new = new & (first[0] == first[1]) & (first[0] == first[2])
        first = first[0]
    lengths, following = cache.lengths, cache.next_positions
    if first.shape != lengths.shape:
        return  # plan_layout refuses another number of rows
    if first.is_cpu and not lengths.is_cpu and cache.rope_delta is None and cache.host_lengths is not None:
        lengths = following = torch.tensor(cache.host_lengths, device="cpu")
    first, new = (x.to(lengths.device, non_blocking=True) for x in (first, new))
    # Positions of a row rise, so the last one held is at least the number of tokens less one; behind images it is less.
    at_least = torch.minimum(lengths, following)
    again = new & (lengths > 0) & (first < (at_least if positions.dim() == 2 else 1))
    if not readable(again):
        require(~again.any(), "position_ids start again in a row whose document the cache holds")
    elif bool(again.any()):
        row = int(again.nonzero()[0, 0])
        raise ValueError(
            f"position_ids start again at {int(first[row])} in row {row}, of which the cache holds {int(lengths[row])} tokens: "
            "a new document needs a new cache (model.new_cache), and the same one goes on at its next position"
        )


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
    return position_ids.expand(*shape[:-2], batch, tokens)
