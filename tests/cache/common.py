"""The configuration of a small model, its tokens, and caches filled with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.cache import Cache
from tests.support.peer import FULL, LINEAR, odd_shape

BOUND = 1e-5
LAST_BITS = 1e-13  # of float64, relative: keys with other strides, or none, are other products to a BLAS
CASE = odd_shape(
    8, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, linear_num_key_heads=2, linear_num_value_heads=4,
    num_attention_heads=6, num_key_value_heads=3, linear_conv_kernel_dim=3, attention_bias=False,
)
CACHES = pytest.mark.parametrize("max_length", [None, 40], ids=["growing", "static"])


def tokens(batch: int, length: int, salt: int = 0) -> Tensor:
    return CASE.ids(batch, length, salt)


@torch.no_grad()
def filled(model: Any, length: int = 9, *, batch: int = 2, max_length: int | None = None, record: int = 0) -> Cache:
    return model(tokens(batch, length), cache=model.new_cache(batch, max_length, record=record)).cache


def contents(cache: Cache) -> list[Tensor]:
    return [getattr(layer, name).clone() for layer in cache.layers for name in layer.names]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@torch.no_grad()
def next_logits(model: Any, cache: Cache) -> Tensor:
    return model(tokens(cache.batch_size, 2, salt=9), cache=cache).logits
