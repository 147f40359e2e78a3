"""Measures how far a float64 computation moves when every operation of it is rounded to float32.

Two correct float32 programs differ by their roundings, and differ most in values that remain after larger terms cancel. That
sensitivity belongs to the value, not to a processor: `Rounded` rounds each result of a float64
computation, forward and backward, at random up or down to a number of float32 (Monte Carlo arithmetic), with a generator of
its own, so that the spread is the same on every machine. A float32 program is right if its error is a small multiple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

UNIT = torch.finfo(torch.float32).eps  # between two neighbours, relative to a number: at most
TINY = torch.finfo(torch.float32).tiny  # fast exponentials give zero below it: e^-87.3


class Rounded(TorchDispatchMode):
    """Moves the results of float64 operations up or down by up to half a unit of float32's last place. Values below float32's
    smallest normal number become noise of that size."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        exact = func.is_view or func._schema.is_mutable or func.overloadpacket in EXACT
        return out if exact else tree_map(self.rounded, out)

    def rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.numel() == 0:
            return value
        up = torch.rand(value.shape, generator=self.generator, dtype=torch.float64) - 0.5
        return value.add_(up * (UNIT * value.abs()).clamp_min_(TINY) * (value != 0))


aten = torch.ops.aten
# These move numbers or choose among them; the next rounding of the same number is not another error.
EXACT = {aten.clone, aten._to_copy, aten.copy, aten.cat, aten.stack, aten.index_select, aten.gather, aten.index, aten.neg,
         aten.embedding, aten.constant_pad_nd, aten.tril, aten.triu, aten.masked_fill, aten.where, aten.zeros, aten.ones,
         aten.zeros_like, aten.ones_like, aten.full, aten.full_like, aten.arange, aten.empty, aten.empty_like, aten.new_zeros,
         aten.new_empty, aten.eye, aten.scalar_tensor, aten.lift_fresh, aten.topk, aten.sort, aten.max, aten.amax, aten.flip,
         aten.roll, aten.repeat, aten.new_ones, aten.new_full, aten.detach, aten.slice_backward,
         aten.select_backward}  # fmt: skip


def spread(compute: Callable[[], dict[str, Tensor]], exact: dict[str, Tensor], draws: int = 4) -> dict[str, float]:
    """By name: the largest distance of `compute()` with its operations rounded from `exact`, over some draws."""
    largest = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with Rounded(seed):
            values = compute()
        for name, value in exact.items():
            largest[name] = max(largest[name], (values[name] - value).abs().max().item())
    return largest
