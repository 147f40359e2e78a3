"""A `prepare_inputs_for_generation` that a subclass or a library put in the place of ours: the arguments of every forward go
through it, as in transformers. peft's prompt tuning adds its virtual tokens there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import short

Prepare = Callable[..., dict[str, Any]]
_NAME = "prepare_inputs_for_generation"
_NOT_OF_FORWARD = ("is_first_iteration", "next_sequence_length")


def replaced_prepare(model: Any) -> Prepare | None:
    """The model's prepare_inputs_for_generation if it is another one than that of our classes."""
    prepare = getattr(model, _NAME, None)
    own = str(getattr(getattr(prepare, "__func__", prepare), "__module__", "")).startswith("qwen35moe.models.")
    return None if prepare is None or own else prepare


def prepared_arguments(prepare: Prepare, arguments: dict[str, Any], cache: Any, virtual: int, first: bool) -> dict[str, Any]:
    """The arguments of a forward after `prepare`, the cache included.

    prepare(input_ids, past_key_values=None or the cache, attention_mask=, use_cache=True, is_first_iteration=, ...) gets the
    new tokens and a mask of the text alone. virtual: the number of tokens that the first call put in front of each row; a mask
    gets ones for them unless prepare has added them. ValueError if prepare returns no dict.
    """
    past = None if cache.seen == 0 else cache
    options = {"past_key_values": past, "use_cache": True, "is_first_iteration": first, **arguments}
    text = options["attention_mask"]
    result = prepare(options.pop("input_ids"), **options)
    if not hasattr(result, "keys"):
        raise ValueError(f"{_NAME} returned {short(result)}, expected a dict of the forward's arguments")
    result = {name: value for name, value in result.items() if value is not None and name not in _NOT_OF_FORWARD}
    mask = result.get("attention_mask")
    if virtual and isinstance(mask, Tensor) and text is not None and mask.shape == text.shape:
        result["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], virtual), mask], 1)
    result.setdefault("past_key_values", cache)
    return result


def check_cache(prepare: Prepare | None, cached: tuple[int, ...]) -> None:
    """ValueError where a cache already holds tokens: it cannot be known which of them prepare would have changed."""
    if prepare is not None and any(cached):
        raise ValueError(
            f"the cache already holds {max(cached)} tokens and the model's {_NAME} was replaced, by peft's prompt tuning for "
            "example, so that they may not be those of input_ids: give an empty cache, or leave it out"
        )
