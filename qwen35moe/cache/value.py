"""The memory of a batch of conversations, as a value.

Two kinds of layer, two kinds of memory: attention keeps the keys and values of every token, Gated DeltaNet the last inputs
of its convolution and one matrix per head. Row r lies in slots 0 ... lengths[r]; padding is never stored.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe.cache.rollback import RollbackLog
from qwen35moe.cache.states import (
    DeltaNetState,
    KVCache,
    LayerState,
    empty_state,
    map_state,
    snapshot_state,
    state_tensors,
)
from qwen35moe.config import TextConfig

if TYPE_CHECKING:
    from qwen35moe.cache.layout import TokenLayout


@dataclass
class Snapshot:
    """A point to return to. Cheap: it shares the cache's tensors, and knows when they no longer hold what they held."""

    lengths: Tensor
    seen: int
    used: int
    common: int | None
    rope_delta: Tensor | None
    seen_pictures: Tensor | None
    layers: list[LayerState]
    exposed: bool = False  # the cache was rewound to before this point: the next write makes it stale
    stale: bool = False


class Cache:
    """Keys, values, convolution inputs and memories of `batch_size` rows; belongs to the caller of the model.

    A forward updates the cache it was given. max_length=None grows (by doubling; gradients flow through it), a number
    is written in place and never reallocated. record=n keeps what `rollback` of the last n tokens needs. `cache[i]` is
    layer i's memory: `.key`, `.value`, or `.inputs`, `.memory`, to read and to write. devices: one per layer, for a model
    that lies on several.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, *, max_length: int | None = None, record: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        if batch_size < 1 or record < 0 or (max_length is not None and max_length < 1):
            raise ValueError(f"a cache needs {batch_size=} >= 1, {max_length=} >= 1 or None, and {record=} >= 0")
        self.config, self.max_length, self.record = config, max_length, record
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.seen = 0  # positions of the caller's attention_mask so far, padding included
        self.rope_delta: Tensor | None = None  # [B]: how far positions run ahead of slots
        self._seen_pictures: Tensor | None = None  # lengths when rope_delta changed: a rollback to before cannot know it
        self._common: int | None = 0  # the length of every row, where the host knows it
        self._used = 0  # at least the longest row
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self.layers: list[LayerState] = [
            empty_state(config, kind, batch_size, max_length, dtype, where)
            for kind, where in zip(config.layer_types, devices or [device] * len(config.layer_types), strict=True)
        ]

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and convolution inputs: the model's. Memories are float32 at least."""
        first = self.layers[0]
        return first.keys.dtype if isinstance(first, KVCache) else first.conv_state.dtype

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    def __repr__(self) -> str:
        room = "growing" if self.max_length is None else f"of {self.max_length}"
        return f"Cache({self.batch_size} rows, {room}, lengths {self.lengths.tolist()}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow and recordings included."""
        return sum(t.nbytes for layer in self.layers for t in state_tensors(layer)) + self.lengths.nbytes

    # ------------------------------------------------------------------------------------------- what a forward does

    def start(self) -> int | Tensor:
        """The slot of each row's next token: an int where the host knows that all rows agree, else [B]."""
        return self._common if self._common is not None else self.lengths.clone()

    def check_room(self, layout: TokenLayout) -> None:
        """ValueError, before anything is computed, when the new tokens do not fit a static cache."""
        if self.max_length is None:
            return
        if layout.lengths is None:
            longest = self._used + layout.tokens if self._common is None else self._common + layout.tokens
            if longest > self.max_length and self._common is None:
                longest = int(self.lengths.max()) + layout.tokens
        else:
            longest = int((self.lengths + layout.lengths).max())
        if longest > self.max_length:
            raise ValueError(
                f"the longest row would hold {longest} tokens, the cache has room for {self.max_length}: "
                f"make one with new_cache({self.batch_size}, max_length={longest}) or more"
            )

    def commit(self, layout: TokenLayout, states: Sequence[LayerState]) -> None:
        """Takes the layers' new states and moves the clock. Nothing of the cache has changed before."""
        for snapshot in self._live_snapshots():
            snapshot.stale = snapshot.stale or snapshot.exposed
        if layout.lengths is None:
            self.lengths = self.lengths + layout.tokens
            self._common = None if self._common is None else self._common + layout.tokens
            self._used += layout.tokens
        else:
            self.lengths = self.lengths + layout.lengths
            self._common, self._used = None, int(self.lengths.max())
        self.seen += layout.shape[1] if layout.shape[0] == self.batch_size else layout.tokens
        for index, new in enumerate(states):
            self.layers[index] = self._committed(self.layers[index], new)

    def _committed(self, old: LayerState, new: LayerState) -> LayerState:
        if isinstance(new, KVCache):
            new.used = self._used
            return new
        assert isinstance(old, DeltaNetState)
        log = None
        if self.record and new.segment is not None:
            base = old.log
            if base is None:
                base = RollbackLog(_kept(old.conv_state, self), _kept(old.recurrent_state, self), new.segment.columns(0, 0))
            log = base.extended(new.segment, self.record)
        if not old.fixed:
            return DeltaNetState(new.conv_state, new.recurrent_state, None, log)
        old.conv_state, old.recurrent_state, old.log = new.conv_state, new.recurrent_state, log
        return old

    @property
    def next_positions(self) -> Tensor:
        """[B]: the rotary position of each row's next token."""
        return self.lengths if self.rope_delta is None else self.lengths + self.rope_delta

    def moved_on(self, positions: Tensor) -> None:
        """Takes the next position [B] of each row, where pictures have let it run away from the number of tokens."""
        new = positions.to(self.lengths.device) - self.lengths
        old = torch.zeros_like(new) if self.rope_delta is None else self.rope_delta
        seen = torch.zeros_like(new) if self._seen_pictures is None else self._seen_pictures
        self.rope_delta, self._seen_pictures = new, torch.where(new != old, self.lengths, seen)

    # ------------------------------------------------------------------------------------------------ going back

    def snapshot(self) -> Snapshot:
        """The present as a point to `restore`. Later writes behind it keep it good; writes over it are noticed."""
        layers = [snapshot_state(layer, copy=self.max_length is not None) for layer in self.layers]
        point = Snapshot(self.lengths, self.seen, self._used, self._common, self.rope_delta, self._seen_pictures, layers)
        self._snapshots = [ref for ref in self._snapshots if ref() is not None] + [weakref.ref(point)]
        return point

    def restore(self, point: Snapshot) -> None:
        """Back to a snapshot of this cache. ValueError when its slots have been written over since."""
        if point.stale:
            raise ValueError(
                "this snapshot is stale: the cache was rewound to before it and written on. A clone() keeps a state for good"
            )
        if all(ref() is not point for ref in self._snapshots):
            raise ValueError("this snapshot was taken of another cache: restore it there, or use clone()")
        layers = [snapshot_state(layer, copy=self.max_length is not None) for layer in point.layers]
        for index, layer in enumerate(layers):
            old = self.layers[index]
            if isinstance(layer, DeltaNetState) and isinstance(old, DeltaNetState) and old.fixed:
                old.conv_state, old.recurrent_state, old.log = layer.conv_state, layer.recurrent_state, layer.log
            else:
                self.layers[index] = layer
        self.lengths, self.seen, self._used = point.lengths, point.seen, point.used
        self._common, self.rope_delta, self._seen_pictures = point.common, point.rope_delta, point.seen_pictures
        self._expose()

    def _expose(self) -> None:
        for other in self._live_snapshots():
            other.exposed = self.lengths.shape != other.lengths.shape or bool((self.lengths < other.lengths).any())

    def _live_snapshots(self) -> list[Snapshot]:
        return [point for ref in self._snapshots if (point := ref()) is not None]

    def rollback(self, tokens: int | Tensor) -> None:
        """Takes back the last `tokens` of every row (int) or of each row (tensor [B]): as if never seen.

        Exact for keys and values always, for Gated DeltaNet up to the last `record` tokens; more raises. The memory is
        computed again from its recorded inputs, so it equals the one before within rounding.
        """
        count = torch.as_tensor(tokens, device=self.lengths.device)
        if count.dim() and count.shape != self.lengths.shape:
            raise ValueError(f"cannot roll back {list(count.shape)} rows: the cache holds {self.batch_size}")
        count = count.expand(self.batch_size)
        if count.is_floating_point() or bool((count < 0).any()):
            raise ValueError(f"cannot roll back {count.tolist()} tokens: give whole numbers >= 0")
        if bool((count > self.lengths).any()):
            raise ValueError(f"cannot roll back {count.tolist()} tokens: the rows hold {self.lengths.tolist()}")
        if not bool(count.any()):
            return
        self._check_recorded(count)
        if self._seen_pictures is not None and bool((self.lengths - count < self._seen_pictures).any()):
            raise ValueError(
                f"cannot roll back {count.tolist()} tokens: pictures were seen up to {self._seen_pictures.tolist()} of "
                f"{self.lengths.tolist()} tokens, and the rotary offset before them is not kept. Keep a snapshot() instead"
            )
        for layer in self.layers:
            if isinstance(layer, DeltaNetState) and layer.log is not None:
                log = layer.log
                keep = log.available() - count.to(log.recurrent_state.device)
                layer.conv_state, layer.recurrent_state = log.state(keep)
                layer.log = log.kept(keep)
        self.lengths = self.lengths - count
        if isinstance(tokens, int):
            self.seen -= tokens
            self._common = None if self._common is None else self._common - tokens
        else:
            self._common = None
        self._used = int(self.lengths.max())
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.used = self._used
        self._expose()

    def _check_recorded(self, count: Tensor) -> None:
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, DeltaNetState):
                continue
            recorded = torch.zeros_like(count) if layer.log is None else layer.log.available().to(count.device)
            if bool((count > recorded).any()):
                raise ValueError(
                    f"cannot roll back {count.tolist()} tokens: layer {index} has recorded the last {recorded.tolist()}. "
                    f"Make the cache with record={int(count.max())} or more, or keep a snapshot()"
                )

    # ---------------------------------------------------------------------------------------------- as a value

    def clone(self) -> Cache:
        """A copy that shares nothing with this one."""
        other = Cache.__new__(Cache)
        other.__dict__.update(self.__dict__)
        other.lengths = self.lengths.clone()
        other.rope_delta = None if self.rope_delta is None else self.rope_delta.clone()
        other.layers = [map_state(layer, torch.Tensor.clone) for layer in self.layers]
        other._snapshots = []
        return other

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row r becomes what row rows[r] was: for beams, for dropping rows, for repeating them (growing caches)."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        if index.dim() != 1 or bool(((index < 0) | (index >= self.batch_size)).any()):
            raise ValueError(f"rows {index.tolist()} are not a list of rows 0 ... {self.batch_size - 1}")
        if self.max_length is not None and index.shape[0] != self.batch_size:
            raise ValueError(f"a static cache keeps its {self.batch_size} rows, cannot hold {index.shape[0]}")
        for position, layer in enumerate(self.layers):
            moved = map_state(layer, lambda t: t.index_select(0, index.to(t.device)))
            if self.max_length is None:
                self.layers[position] = moved
            else:
                for old, new in zip(state_tensors(layer), state_tensors(moved), strict=True):
                    old.copy_(new)
        self.lengths = self.lengths[index]
        self.rope_delta = None if self.rope_delta is None else self.rope_delta[index]
        self._seen_pictures = None if self._seen_pictures is None else self._seen_pictures[index]
        if self.max_length is not None:
            for snapshot in self._live_snapshots():
                snapshot.stale = True
        elif index.shape[0]:
            self._snapshots = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as one safetensors file; recordings and snapshots are not kept."""
        from qwen35moe.cache.file import save_cache

        save_cache(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str], config: TextConfig, *, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> Cache:
        """Reads what `save` wrote, for a model of this configuration; devices as for a new one."""
        from qwen35moe.cache.file import load_cache

        return load_cache(path, config, device=device, devices=devices)


def _kept(tensor: Tensor, cache: Cache) -> Tensor:
    """A state as the base of a recording: a static cache will write over its own."""
    return tensor if cache.max_length is None else tensor.clone()
