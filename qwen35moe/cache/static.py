"""One decoded token per row of a static cache, by the same operations on the same device memory at every step.

No number of the host that changes from step to step enters an operation, so that a step can be captured once and replayed:

    position of row r    lengths[r], on the device;  lengths += active
    keys and values      written at that position; attention reads the first `bucket(...)` positions and masks those behind
    DeltaNet states      written in place where `active`

The numbers of a cache on the host (its columns, the length of its longest row) follow in `advance` and `settle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe.cache.ids import UNKNOWN
from qwen35moe.cache.layout import FixedStep
from qwen35moe.cache.modes import ordinary_tensors
from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate, KVCache, zero_behind

if TYPE_CHECKING:
    from qwen35moe.cache.value import Cache

SMALLEST = 256  # positions of the smallest bucket


def bucket(positions: int, room: int) -> int:
    """How many positions a step reads that needs the first `positions`: 256, 512, 1024, ..., at most `room`."""
    size = SMALLEST
    while size < positions:
        size *= 2
    return min(size, room)


class Counters:
    """The lengths [B] and rotary offsets [B] of a static cache's rows in memory that stays where it is."""

    def __init__(self, cache: Cache) -> None:
        with ordinary_tensors():
            self.lengths = cache._lengths.clone()
            self.delta = torch.zeros_like(self.lengths)
            self.rows = torch.arange(cache.batch_size, device=self.lengths.device)
        self._source: Tensor | None = None  # of `delta`

    def adopt(self, cache: Cache) -> bool:
        """Makes them the cache's own, before a step; True where another operation had given the cache other ones, or may have
        replaced its tensors."""
        cache._prepare()
        for snapshot in cache._live_snapshots():  # a step writes before it commits
            snapshot.stale = snapshot.stale or (snapshot.rewound and not snapshot.apart)
        changed = cache._lengths is not self.lengths
        if changed:
            self.lengths.copy_(cache._lengths)
            cache._lengths = self.lengths
            for layer in cache._layers:
                if isinstance(layer, KVCache) and layer.behind:  # a mask hides finite values only
                    zero_behind(layer.key_buffer, self.lengths, functional=False)
                    zero_behind(layer.value_buffer, self.lengths, functional=False)
                    layer.behind = False
        if cache._rope_delta is not self._source:
            self._source = cache._rope_delta
            self.delta.zero_() if self._source is None else self.delta.copy_(self._source)
        return changed


def commit_step(cache: Cache, step: FixedStep, states: Sequence[KVCache | DeltaNetUpdate], ids: Tensor | None) -> None:
    """Stores the states after one token per row, whose keys and values have been written, and advances the active rows. ids
    [B, 1] or None, see `Cache.commit`."""
    for old, new in zip(cache._layers, states, strict=True):
        if isinstance(old, DeltaNetState):
            assert isinstance(new, DeltaNetUpdate)
            old.write_rows(new, step.active)
    new_ids = cache._ids.new_full((cache.batch_size,), UNKNOWN) if ids is None else ids[:, 0].to(cache._ids.dtype)
    cache._ids.index_put_((step.rows, cache._lengths), new_ids)
    cache._lengths.add_(step.active)


def advance(cache: Cache, *, frozen: bool) -> None:
    """Counts one step on the host. frozen: whether some row may not have taken its token."""
    cache.seen += 1
    cache._longest += 1  # or more than the longest row
    cache._shorter = None if frozen else cache._shorter
    cache._common_length = None if frozen or cache._common_length is None else cache._common_length + 1
    for layer in cache._layers:
        if isinstance(layer, KVCache):
            layer.length = cache._longest
            layer.behind = layer.behind or frozen


def settle(cache: Cache) -> None:
    """Reads the lengths from the device after steps in which rows may have been frozen."""
    cache.settle(cache._lengths.tolist(), cache.seen)
