"""`Cache`: the state of a batch of conversations between forward calls, as one value.

Attention layers keep keys and values of every token; Gated DeltaNet layers keep the last inputs of their convolution and one
matrix per head. Token t of row r is at position t, 0 <= t < lengths[r]; padding is never stored.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.cache.rollback import RollbackLog
from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate, KVCache, LayerState, empty_state
from qwen35moe.config import TextConfig

if TYPE_CHECKING:
    from qwen35moe.cache.layout import TokenLayout


@dataclass
class Snapshot:
    """A state to return to. Cheap: it shares tensors with the cache, and becomes stale when they are overwritten."""

    lengths: Tensor
    seen: int
    longest: int
    common_length: int | None
    rope_delta: Tensor | None
    rope_delta_since: Tensor | None
    layers: list[LayerState]
    rewound: bool = False  # the cache is at an earlier state: the next write makes this snapshot stale
    stale: bool = False


class Cache:
    """The state of every layer for `batch_size` rows. It belongs to the caller of the model; a forward updates it.

    max_length: None for a growing cache (by doubling; gradients flow through it), a number for a static one, which is
    written in place and never reallocated. record=n makes the last n tokens available to `rollback`. `cache[i]` is the
    state of layer i, to read and to assign: `.key` and `.value`, or `.conv_state` and `.recurrent_state`. devices: one per
    layer, for a model on several devices. config: the model's, or any kind of configuration that `Config.of` reads.
    """

    def __init__(
        self, config: Any, batch_size: int, *, max_length: int | None = None, record: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        config = TextConfig.of(config)
        if batch_size < 1 or record < 0 or (max_length is not None and max_length < 1):
            raise ValueError(f"a cache needs {batch_size=} >= 1, {max_length=} >= 1 or None, and {record=} >= 0")
        self.config, self.max_length, self.record = config, max_length, record
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.seen = 0  # columns of the caller's attention_mask so far, padding included
        self.rope_delta: Tensor | None = None  # [B]: rotary position of a token minus its position in the cache
        self._rope_delta_since: Tensor | None = None  # [B]: lengths when rope_delta last changed; its older values are lost
        self._common_length: int | None = 0  # the length of every row, where the host knows that they are equal
        self._longest = 0  # the length of the longest row, or more
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self.layers: list[LayerState] = [
            empty_state(config, kind, batch_size, max_length, dtype, layer_device)
            for kind, layer_device in zip(config.layer_types, devices or [device] * len(config.layer_types), strict=True)
        ]

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The model's, of keys, values and conv_state; a recurrent_state is float32 or wider."""
        return self.layers[0].tensors()[0].dtype

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    def __repr__(self) -> str:
        room = "growing" if self.max_length is None else f"of {self.max_length}"
        return f"Cache({self.batch_size} rows, {room}, lengths {self.lengths.tolist()}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow and recorded tokens included."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors()) + self.lengths.nbytes

    # -------------------------------------------------------------------------------------------------- a forward call

    def start(self) -> int | Tensor:
        """The position of each row's next token: an int where the host knows that all rows agree, else [B]."""
        return self._common_length if self._common_length is not None else self.lengths.clone()

    def check_room(self, layout: TokenLayout) -> None:
        """ValueError, before anything is computed, when the new tokens do not fit a static cache."""
        if self.max_length is None:
            return
        if layout.lengths is None:
            longest = layout.tokens + (self._longest if self._common_length is None else self._common_length)
            if longest > self.max_length and self._common_length is None:
                longest = int(self.lengths.max()) + layout.tokens
        else:
            longest = int((self.lengths + layout.lengths).max())
        if longest > self.max_length:
            raise ValueError(
                f"the longest row would hold {longest} tokens, the cache has room for {self.max_length}: "
                f"make one with new_cache({self.batch_size}, max_length={longest}) or more"
            )

    def commit(self, layout: TokenLayout, states: Sequence[KVCache | DeltaNetUpdate]) -> None:
        """Stores the layers' new states and advances the lengths. The cache has not changed until here."""
        for snapshot in self._live_snapshots():
            snapshot.stale = snapshot.stale or snapshot.rewound
        if layout.lengths is None:
            self.lengths = self.lengths + layout.tokens
            self._common_length = None if self._common_length is None else self._common_length + layout.tokens
            self._longest += layout.tokens
        else:
            self.lengths = self.lengths + layout.lengths
            self._common_length, self._longest = None, int(self.lengths.max())
        self.seen += layout.shape[1] if layout.shape[0] == self.batch_size else layout.tokens
        for index, new in enumerate(states):
            self.layers[index] = self._committed(self.layers[index], new)

    def _committed(self, old: LayerState, new: KVCache | DeltaNetUpdate) -> LayerState:
        if isinstance(new, KVCache):
            new.length = self._longest
            return new
        assert isinstance(old, DeltaNetState)
        log = self._log(old, new) if self.record else None
        if not old.static:
            return DeltaNetState(new.conv_state, new.recurrent_state, log)
        old.conv_state, old.recurrent_state, old.log = new.conv_state, new.recurrent_state, log
        return old

    def _log(self, old: DeltaNetState, new: DeltaNetUpdate) -> RollbackLog | None:
        """The old state's log with the tokens of the new state; it begins with the old state itself."""
        if new.segment is None:
            return None
        log = old.log
        if log is None:
            initial = (old.conv_state, old.recurrent_state)
            if old.static:  # it is about to be overwritten
                initial = (old.conv_state.clone(), old.recurrent_state.clone())
            log = RollbackLog(*initial, new.segment.columns(0, 0))
        return log.append(new.segment, self.record)

    @property
    def next_positions(self) -> Tensor:
        """[B]: the rotary position of each row's next token."""
        return self.lengths if self.rope_delta is None else self.lengths + self.rope_delta

    def set_next_positions(self, positions: Tensor) -> None:
        """Sets the rotary position [B] of each row's next token: an image takes fewer positions than tokens."""
        new = positions.to(self.lengths.device) - self.lengths
        old = torch.zeros_like(new) if self.rope_delta is None else self.rope_delta
        since = torch.zeros_like(new) if self._rope_delta_since is None else self._rope_delta_since
        self.rope_delta, self._rope_delta_since = new, torch.where(new != old, self.lengths, since)

    # ------------------------------------------------------------------------------------------ earlier states

    def snapshot(self) -> Snapshot:
        """The present state, for `restore`. It stays valid while later tokens are appended; once the cache has gone back to
        an earlier state and been written, it is stale."""
        layers = [layer.snapshot() for layer in self.layers]
        snapshot = Snapshot(
            self.lengths, self.seen, self._longest, self._common_length, self.rope_delta, self._rope_delta_since, layers,
        )
        self._snapshots = [ref for ref in self._snapshots if ref() is not None] + [weakref.ref(snapshot)]
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot of this cache. ValueError when its positions have been overwritten since."""
        if snapshot.stale:
            raise ValueError(
                "this snapshot is stale: the cache returned to an earlier state and was written. clone() keeps a state for good"
            )
        if all(ref() is not snapshot for ref in self._snapshots):
            raise ValueError("this snapshot was taken of another cache: restore it there, or use clone()")
        for index, (old, new) in enumerate(zip(self.layers, snapshot.layers, strict=True)):
            if isinstance(old, DeltaNetState) and isinstance(new, DeltaNetState) and old.static:
                old.conv_state, old.recurrent_state, old.log = new.conv_state, new.recurrent_state, new.log
            else:
                self.layers[index] = new.snapshot()
        self.lengths, self.seen, self._longest = snapshot.lengths, snapshot.seen, snapshot.longest
        self._common_length = snapshot.common_length
        self.rope_delta, self._rope_delta_since = snapshot.rope_delta, snapshot.rope_delta_since
        self._mark_rewound()

    def _mark_rewound(self) -> None:
        for other in self._live_snapshots():
            other.rewound = self.lengths.shape != other.lengths.shape or bool((self.lengths < other.lengths).any())

    def _live_snapshots(self) -> list[Snapshot]:
        return [snapshot for ref in self._snapshots if (snapshot := ref()) is not None]

    def rollback(self, tokens: int | Tensor) -> None:
        """Removes the last `tokens` tokens of every row (int) or of each row (tensor [B]).

        Attention layers can roll back any number, Gated DeltaNet layers the last `record` tokens; more raises ValueError. A
        recurrent state is computed again from recorded inputs, so it equals the earlier one within rounding.
        """
        count = self._checked_count(tokens)
        if not bool(count.any()):
            return
        for layer in self.layers:
            if isinstance(layer, DeltaNetState) and layer.log is not None:
                log = layer.log
                keep = log.available() - count.to(log.recurrent_state.device)
                layer.conv_state, layer.recurrent_state = log.state(keep)
                layer.log = log.truncate(keep)
        self.lengths = self.lengths - count
        if isinstance(tokens, int):
            self.seen -= tokens
            self._common_length = None if self._common_length is None else self._common_length - tokens
        else:
            self._common_length = None
        self._longest = int(self.lengths.max())
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.length = self._longest
        self._mark_rewound()

    def _checked_count(self, tokens: int | Tensor) -> Tensor:
        """[B]: how many tokens `rollback` removes from each row; ValueError where it cannot."""
        count = torch.as_tensor(tokens, device=self.lengths.device)
        if count.dim() and count.shape != self.lengths.shape:
            raise ValueError(f"cannot roll back {list(count.shape)} rows: the cache holds {self.batch_size}")
        count = count.expand(self.batch_size)
        if count.is_floating_point() or bool((count < 0).any()):
            raise ValueError(f"cannot roll back {count.tolist()} tokens: give whole numbers >= 0")
        if bool((count > self.lengths).any()):
            raise ValueError(f"cannot roll back {count.tolist()} tokens: the rows hold {self.lengths.tolist()}")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, DeltaNetState):
                continue
            recorded = torch.zeros_like(count) if layer.log is None else layer.log.available().to(count.device)
            if bool((count > recorded).any()):
                raise ValueError(
                    f"cannot roll back {count.tolist()} tokens: layer {index} has recorded the last {recorded.tolist()}. "
                    f"Make the cache with record={int(count.max())} or more, or keep a snapshot()"
                )
        since = self._rope_delta_since
        if since is not None and bool((self.lengths - count < since).any()):
            raise ValueError(
                f"cannot roll back {count.tolist()} tokens: images or videos are among the first {since.tolist()} of "
                f"{self.lengths.tolist()} tokens, and the rotary offset before them is not kept. Keep a snapshot() instead"
            )
        return count

    # ---------------------------------------------------------------------------------------------- as a value

    def clone(self) -> Cache:
        """A copy that shares nothing with this one."""
        other = Cache.__new__(Cache)
        other.__dict__.update(self.__dict__)
        other.lengths = self.lengths.clone()
        other.rope_delta = None if self.rope_delta is None else self.rope_delta.clone()
        other.layers = [layer.map(torch.Tensor.clone) for layer in self.layers]
        other._snapshots = []
        return other

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row r becomes a copy of the old row rows[r]: for beam search. A growing cache may also drop or repeat rows."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        if index.dim() != 1 or bool(((index < 0) | (index >= self.batch_size)).any()):
            raise ValueError(f"rows {index.tolist()} are not a list of rows 0 ... {self.batch_size - 1}")
        if self.max_length is not None and index.shape[0] != self.batch_size:
            raise ValueError(f"a static cache keeps its {self.batch_size} rows, cannot hold {index.shape[0]}")
        for number, layer in enumerate(self.layers):
            reordered = layer.map(lambda t: t.index_select(0, index.to(t.device)))
            if self.max_length is None:
                self.layers[number] = reordered
            else:
                for old, new in zip(layer.tensors(), reordered.tensors(), strict=True):
                    old.copy_(new)
        self.lengths = self.lengths[index]
        self.rope_delta = None if self.rope_delta is None else self.rope_delta[index]
        self._rope_delta_since = None if self._rope_delta_since is None else self._rope_delta_since[index]
        if self.max_length is not None:
            for snapshot in self._live_snapshots():
                snapshot.stale = True
        elif index.shape[0]:
            self._snapshots = []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as one safetensors file, without recorded tokens and snapshots."""
        from qwen35moe.cache.file import save_cache

        save_cache(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str], config: TextConfig, *, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> Cache:
        """Reads a file written by `save`, for a model of this configuration; devices: one per layer, as for a new cache."""
        from qwen35moe.cache.file import load_cache

        return load_cache(path, config, device=device, devices=devices)

