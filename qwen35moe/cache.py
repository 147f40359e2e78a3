"""The memory of a batch of conversations, as a value.

Two kinds of layer, two kinds of memory: attention keeps the keys and values of every token, Gated DeltaNet the last inputs
of its convolution and one matrix per head. Row r lies in slots 0 ... lengths[r]; padding is never stored.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.config import TextConfig
from qwen35moe.replay import Replay, Segment

if TYPE_CHECKING:
    from qwen35moe.layout import TokenLayout


@dataclass
class AttentionMemory:
    """Keys and values [B, slots, G, K]. `used` slots are in use; behind them lies room to grow, filled with zeros."""

    keys: Tensor
    values: Tensor
    used: int = 0
    fixed: bool = False

    @property
    def key(self) -> Tensor:
        return self.keys[:, : self.used]

    @key.setter
    def key(self, value: Tensor) -> None:
        self.keys = self._replaced(self.keys, value)

    @property
    def value(self) -> Tensor:
        return self.values[:, : self.used]

    @value.setter
    def value(self, value: Tensor) -> None:
        self.values = self._replaced(self.values, value)

    def _replaced(self, buffer: Tensor, value: Tensor) -> Tensor:
        wanted = (buffer.shape[0], self.used, *buffer.shape[2:])
        if value.shape != wanted:
            raise ValueError(f"the cache holds {list(wanted)} here, cannot put {list(value.shape)} in its place")
        if self.fixed:
            buffer[:, : self.used] = value
            return buffer
        return torch.cat([value.to(buffer.dtype), buffer[:, self.used :]], dim=1)

    def extended(self, key: Tensor, value: Tensor, layout: TokenLayout) -> AttentionMemory:
        """With the layout's new tokens key, value [B, T, G, K] in their slots.

        Written in place where no gradient can flow, else into new tensors: a forward that is computed again for
        gradient checkpointing then finds the memory as it was.
        """
        functional = torch.is_grad_enabled() and (key.requires_grad or self.keys.requires_grad or value.requires_grad)
        used = self.used + layout.tokens
        memory = self if used <= self.keys.shape[1] and not functional else self._grown(used, functional)
        keys, values = memory.keys, memory.values
        if isinstance(layout.starts, int) and layout.lengths is None:
            slots = slice(layout.starts, layout.starts + layout.tokens)
            if functional:
                keys = torch.cat([keys[:, : slots.start], key], dim=1)
                values = torch.cat([values[:, : slots.start], value], dim=1)
            else:
                keys[:, slots], values[:, slots] = key, value
        else:
            row, slot, index = _places(layout, key)
            put = torch.Tensor.index_put if functional else torch.Tensor.index_put_
            keys, values = put(keys, (row, slot), key[index]), put(values, (row, slot), value[index])
        return AttentionMemory(keys, values, used, self.fixed)

    def _grown(self, needed: int, functional: bool) -> AttentionMemory:
        room = needed if functional else max(needed, 2 * self.keys.shape[1], 64)
        if self.fixed:
            room = needed = self.keys.shape[1]
        missing = (0, 0, 0, 0, 0, room - self.keys.shape[1])
        return replace(self, keys=F.pad(self.keys, missing), values=F.pad(self.values, missing))


def _places(layout: TokenLayout, key: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Row, slot and index into [B, T] of every token that is there."""
    rows, tokens, device = layout.rows, layout.tokens, key.device
    row = torch.arange(rows, device=device)[:, None].expand(rows, tokens)
    column = torch.arange(tokens, device=device).expand(rows, tokens)
    start = layout.starts[:, None].to(device) if isinstance(layout.starts, Tensor) else layout.starts
    valid = layout.valid
    if valid is None:
        return row, column + start, (row, column)
    index = (row[valid], column[valid])
    return index[0], (column + start)[valid], index


@dataclass
class DeltaNetMemory:
    """inputs [B, C, W-1], the last the convolution has seen; memory [B, H, K, V], float32 at least.

    segment: what the forward that made this state brought, when the cache records; replay: how to take it back. Fixed
    tensors are written in place when a new value is assigned.
    """

    inputs: Tensor
    memory: Tensor
    segment: Segment | None = None
    replay: Replay | None = None
    fixed: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        before = self.__dict__.get(name)
        if isinstance(before, Tensor) and isinstance(value, Tensor):
            if before.shape != value.shape:
                raise ValueError(f"the cache holds {name} {list(before.shape)}, cannot put {list(value.shape)} in its place")
            if self.fixed:
                before.copy_(value)
                return
        self.__dict__[name] = value


LayerMemory = AttentionMemory | DeltaNetMemory


@dataclass
class Snapshot:
    """A point to return to. Cheap: it shares the cache's tensors, and knows when they no longer hold what they held."""

    lengths: Tensor
    seen: int
    used: int
    common: int | None
    rope_delta: Tensor | None
    layers: list[LayerMemory]
    exposed: bool = False  # the cache was rewound to before this point: the next write makes it stale
    stale: bool = False


class Cache:
    """Keys, values, convolution inputs and memories of `batch_size` rows; belongs to the caller of the model.

    A forward updates the cache it was given. max_length=None grows (by doubling; gradients flow through it), a number
    is written in place and never reallocated. record=n keeps what `rollback` of the last n tokens needs. `cache[i]` is
    layer i's memory: `.key`, `.value`, or `.inputs`, `.memory`, to read and to write.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, *, max_length: int | None = None, record: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1 or record < 0 or (max_length is not None and max_length < 1):
            raise ValueError(f"a cache needs {batch_size=} >= 1, {max_length=} >= 1 or None, and {record=} >= 0")
        self.config, self.max_length, self.record = config, max_length, record
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.seen = 0  # positions of the caller's attention_mask so far, padding included
        self.rope_delta: Tensor | None = None  # [B]: how far positions run ahead of slots
        self._common: int | None = 0  # the length of every row, where the host knows it
        self._used = 0  # at least the longest row
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self.layers: list[LayerMemory] = [
            _empty_memory(config, kind, batch_size, max_length, dtype, device) for kind in config.layer_types
        ]

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and convolution inputs: the model's. Memories are float32 at least."""
        first = self.layers[0]
        return first.keys.dtype if isinstance(first, AttentionMemory) else first.inputs.dtype

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerMemory:
        return self.layers[layer]

    def __repr__(self) -> str:
        room = "growing" if self.max_length is None else f"of {self.max_length}"
        return f"Cache({self.batch_size} rows, {room}, lengths {self.lengths.tolist()}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow and recordings included."""
        return sum(t.nbytes for layer in self.layers for t in _tensors(layer)) + self.lengths.nbytes

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

    def commit(self, layout: TokenLayout, states: Sequence[LayerMemory]) -> None:
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

    def _committed(self, old: LayerMemory, new: LayerMemory) -> LayerMemory:
        if isinstance(new, AttentionMemory):
            new.used = self._used
            return new
        assert isinstance(old, DeltaNetMemory)
        replay = None
        if self.record and new.segment is not None:
            base = old.replay
            if base is None:
                base = Replay(_kept(old.inputs, self), _kept(old.memory, self), new.segment.columns(0, 0))
            replay = base.extended(new.segment, self.record)
        if not old.fixed:
            return DeltaNetMemory(new.inputs, new.memory, None, replay)
        old.inputs, old.memory, old.replay = new.inputs, new.memory, replay
        return old

    # ------------------------------------------------------------------------------------------------ going back

    def snapshot(self) -> Snapshot:
        """The present as a point to `restore`. Later writes behind it keep it good; writes over it are noticed."""
        layers = [_shared(layer, copy=self.max_length is not None) for layer in self.layers]
        point = Snapshot(self.lengths, self.seen, self._used, self._common, self.rope_delta, layers)
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
        layers = [_shared(layer, copy=self.max_length is not None) for layer in point.layers]
        for index, layer in enumerate(layers):
            old = self.layers[index]
            if isinstance(layer, DeltaNetMemory) and isinstance(old, DeltaNetMemory) and old.fixed:
                old.inputs, old.memory, old.replay = layer.inputs, layer.memory, layer.replay
            else:
                self.layers[index] = layer
        self.lengths, self.seen, self._used = point.lengths, point.seen, point.used
        self._common, self.rope_delta = point.common, point.rope_delta
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
        for layer in self.layers:
            if isinstance(layer, DeltaNetMemory) and layer.replay is not None:
                replay = layer.replay
                keep = replay.available() - count.to(replay.memory.device)
                layer.inputs, layer.memory = replay.state(keep)
                layer.replay = replay.kept(keep)
        self.lengths = self.lengths - count
        if isinstance(tokens, int):
            self.seen -= tokens
            self._common = None if self._common is None else self._common - tokens
        else:
            self._common = None
        self._used = int(self.lengths.max())
        for layer in self.layers:
            if isinstance(layer, AttentionMemory):
                layer.used = self._used
        self._expose()

    def _check_recorded(self, count: Tensor) -> None:
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, DeltaNetMemory):
                continue
            recorded = torch.zeros_like(count) if layer.replay is None else layer.replay.available().to(count.device)
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
        other.layers = [_mapped(layer, torch.Tensor.clone) for layer in self.layers]
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
            moved = _mapped(layer, lambda t: t.index_select(0, index.to(t.device)))
            if self.max_length is None:
                self.layers[position] = moved
            else:
                for old, new in zip(_tensors(layer), _tensors(moved), strict=True):
                    old.copy_(new)
        self.lengths = self.lengths[index]
        self.rope_delta = None if self.rope_delta is None else self.rope_delta[index]
        if self.max_length is not None:
            for snapshot in self._live_snapshots():
                snapshot.stale = True
        elif index.shape[0]:
            self._snapshots = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as one safetensors file; recordings and snapshots are not kept."""
        from qwen35moe.cache_file import save_cache

        save_cache(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], config: TextConfig, *, device: torch.device | str = "cpu") -> Cache:
        """Reads what `save` wrote, for a model of this configuration."""
        from qwen35moe.cache_file import load_cache

        return load_cache(path, config, device=device)


def _empty_memory(
    config: TextConfig, kind: str, batch: int, max_length: int | None, dtype: torch.dtype, device: torch.device | str
) -> LayerMemory:
    if kind == "full_attention":
        shape = (batch, max_length or 0, config.num_key_value_heads, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return AttentionMemory(keys, values, 0, max_length is not None)
    heads, width, out = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    inputs = torch.zeros(batch, config.conv_dim, config.linear_conv_kernel_dim - 1, dtype=dtype, device=device)
    wide = torch.promote_types(torch.float32, dtype)
    memory = torch.zeros(batch, heads, width, out, dtype=wide, device=device)
    return DeltaNetMemory(inputs, memory, fixed=max_length is not None)


def _tensors(layer: LayerMemory) -> list[Tensor]:
    if isinstance(layer, AttentionMemory):
        return [layer.keys, layer.values]
    found = [layer.inputs, layer.memory]
    if layer.replay is not None:
        found += [layer.replay.inputs, layer.replay.memory, *vars(layer.replay.since).values()]
    return found


def _mapped(layer: LayerMemory, fn) -> LayerMemory:  # noqa: ANN001
    if isinstance(layer, AttentionMemory):
        return AttentionMemory(fn(layer.keys), fn(layer.values), layer.used, layer.fixed)
    replay = layer.replay
    if replay is not None:
        since = Segment(**{name: fn(tensor) for name, tensor in vars(replay.since).items()})
        replay = Replay(fn(replay.inputs), fn(replay.memory), since)
    return DeltaNetMemory(fn(layer.inputs), fn(layer.memory), None, replay, layer.fixed)


def _shared(layer: LayerMemory, copy: bool) -> LayerMemory:
    """The layer's memory for a snapshot: shared, except that a static cache's matrices are copied."""
    if isinstance(layer, AttentionMemory):
        return replace(layer)
    inputs, memory = (layer.inputs.clone(), layer.memory.clone()) if copy else (layer.inputs, layer.memory)
    return DeltaNetMemory(inputs, memory, None, layer.replay)


def _kept(tensor: Tensor, cache: Cache) -> Tensor:
    """A state as the base of a recording: a static cache will write over its own."""
    return tensor if cache.max_length is None else tensor.clone()
