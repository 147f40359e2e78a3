"""`Cache`: the state of a batch of conversations between forward calls, as one value.

Attention layers keep keys and values of every token; Gated DeltaNet layers keep the last inputs of their convolution and one
matrix per head. Token t of row r is at position t, 0 <= t < lengths[r]; padding is never stored.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.cache.checks import check_new_cache, row_numbers
from qwen35moe.cache.ids import check_prompt, empty_ids, with_tokens
from qwen35moe.cache.lengths import RowCounts
from qwen35moe.cache.modes import copied, in_inference_mode, ordinary, ordinary_tensors
from qwen35moe.cache.rollback import checked_count, earlier_state, extended_log
from qwen35moe.cache.snapshot import Snapshot, rows, share_tensors
from qwen35moe.cache.states import STATIC_GRADIENT, DeltaNetState, DeltaNetUpdate, KVCache, LayerState, empty_state
from qwen35moe.cache.static import commit_step
from qwen35moe.cache.view import LayerView, ReadTensors
from qwen35moe.config import TextConfig

if TYPE_CHECKING:
    from qwen35moe.cache.layout import TokenLayout


class Cache(RowCounts):
    """The state of every layer for `batch_size` rows. It belongs to the caller of the model; a forward updates it.

    max_length: None for a growing cache (by doubling; gradients flow through it), a number for a static one, which is
    written in place and never reallocated. record=n makes the last n tokens available to `rollback`. `cache[i]` is the
    state of layer i, to read and to edit: `.key` and `.value`, or `.conv_state` and `.recurrent_state`, see `LayerView`.
    devices: one per layer, for a model on several devices. dtype: of keys, values and conv_state, whatever autocast does; a
    recurrent_state is float32 or wider. The cache keeps the ids of its tokens, see `check_prompt`. config: the model's, or
    any kind of configuration that `Config.of` reads.
    """

    def __init__(
        self, config: Any, batch_size: int, *, max_length: int | None = None, record: int = 0,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        config = TextConfig.of(config)
        check_new_cache(batch_size, max_length, record)
        self.config, self.max_length, self.record, self.dtype = config, max_length, record, dtype
        self.seen = 0  # columns of the caller's attention_mask so far, padding included
        self._snapshots: list[weakref.ref[Snapshot]] = []
        self._read = ReadTensors()
        self._inference = False  # whether tensors may be inference tensors
        super().__init__(batch_size, device)
        with ordinary_tensors():
            self._ids = empty_ids(batch_size, max_length, device)  # [B, positions]
            self._layers: list[LayerState] = [
                empty_state(config, kind, batch_size, max_length, dtype, layer_device)
                for kind, layer_device in zip(config.layer_types, devices or [device] * len(config.layer_types), strict=True)
            ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`seen`, for decoding loops and libraries that call transformers' method: columns so far, padding included."""
        return self.seen

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> LayerView:
        return LayerView(self, range(len(self._layers))[operator.index(layer)])

    @property
    def layers(self) -> list[LayerView]:
        """`cache[i]` of every layer."""
        return list(self)

    def __iter__(self) -> Iterator[LayerView]:
        return (LayerView(self, layer) for layer in range(len(self._layers)))

    def __repr__(self) -> str:
        room = "growing" if self.max_length is None else f"of {self.max_length}"
        return f"Cache({rows(self._lengths, room)}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of the layers' states, room to grow and recorded tokens included; the ids, 4 bytes a token, are not counted."""
        return sum(t.nbytes for layer in self._layers for t in layer.tensors()) + self._lengths.nbytes

    # -------------------------------------------------------------------------------------------------- a forward call

    def check_room(self, layout: TokenLayout) -> None:
        """ValueError, before anything is computed, when the new tokens do not fit a static cache, or the cache is on another
        device."""
        if self._lengths.device != layout.position_ids.device:
            device = layout.position_ids.device
            raise ValueError(f"the cache is on {self._lengths.device}, the input on {device}: make one with model.new_cache")
        self._prepare()
        if self.max_length is not None:
            self._check_length(layout, self.max_length)
        for snapshot in self._live_snapshots():  # a forward writes before it commits
            snapshot.stale = snapshot.stale or (snapshot.rewound and not snapshot.apart)

    def commit(self, layout: TokenLayout, states: Sequence[KVCache | DeltaNetUpdate], ids: Tensor | None = None) -> None:
        """Stores the layers' new states and advances the lengths. The cache has not changed until here. ids [B, T]: of the
        new tokens, in the caller's order; None where they came as embeddings."""
        if self.max_length is not None:
            for state in states:
                if isinstance(state, DeltaNetUpdate) and state.recurrent_state.requires_grad:
                    raise ValueError(STATIC_GRADIENT)
        if layout.step is not None:
            commit_step(self, layout.step, states, ids)
            return
        if self._read.copies:
            self._settle()
        self._inference = self._inference or in_inference_mode()
        self._advance(layout)
        self.seen += layout.shape[1] if layout.shape[0] == self.batch_size else layout.tokens
        self._ids = with_tokens(self._ids, layout, ids, self.max_length or self._longest)
        for index, new in enumerate(states):
            self.replace_state(index, self._committed(index, self._layers[index], new))
        self._refresh()

    def _committed(self, index: int, old: LayerState, new: KVCache | DeltaNetUpdate) -> LayerState:
        if isinstance(new, KVCache):
            new.length = self._longest
            return new
        assert isinstance(old, DeltaNetState)
        conv_state = new.conv_state.to(old.conv_state.dtype)  # autocast computes in another one
        if self._frozen is not None:
            frozen = self._frozen.to(conv_state.device)[:, None, None]
            conv_state = torch.where(frozen, old.conv_state, conv_state)
            new = DeltaNetUpdate(conv_state, torch.where(frozen[..., None], old.recurrent_state, new.recurrent_state))
        log = None
        if self.record:
            written = old.static or any(layer == index for layer, _ in self._read.current)  # or may be, by the user
            log = extended_log(old, new, self.record, copy=written)
        if not old.static:
            return DeltaNetState(conv_state, new.recurrent_state.to(old.recurrent_state.dtype), log)
        old.conv_state, old.recurrent_state, old.log = conv_state, new.recurrent_state, log
        return old

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """ValueError where a prompt contradicts the cache. input_ids [B, T] are whole rows, cached tokens included, with
        padding on any side where attention_mask [B, T] is 0: each row must begin with the ids that the cache holds.

        Tokens that came as embeddings fit every prompt.
        """
        check_prompt(self._ids, self._read_lengths(), input_ids, attention_mask)

    # --------------------------------------------------------------------------------------------------- edits by hand

    def replace_state(self, layer: int, new: LayerState) -> None:
        """Stores a layer's state. A later edit of a tensor that was read from the old state raises: it would be lost."""
        old, self._layers[layer] = self._layers[layer], new
        if self._read.current and old is not new:
            self._read.replace(layer, old, new)

    def unshare(self, layer: int) -> None:
        """Snapshots get copies of the layer's tensors, before these are edited."""
        snapshots = self._live_snapshots()
        if not snapshots:
            return
        own = {id(self._layers[layer].stored(name)) for name in self._layers[layer].names}
        for snapshot in snapshots:
            state = snapshot.layers[layer]
            if any(id(tensor) in own for tensor in state.tensors()):
                snapshot.layers[layer] = state.map(lambda tensor: copied(tensor) if id(tensor) in own else tensor)

    def _settle(self) -> None:
        """Looks at the tensors that were read: a layer that was edited loses its log, which leads to the unedited state."""
        for layer in self._read.edited(self._layers):
            state = self._layers[layer]
            assert isinstance(state, DeltaNetState)
            state.log = None

    def _refresh(self) -> None:
        """After the cache itself has written tensors in place, these are compared with new copies."""
        for layer, name in self._read.copies:
            self._read.copies[layer, name] = self._layers[layer].stored(name).detach().clone()

    def _prepare(self) -> None:
        """Before every use of the states: edits that have no effect are refused, and outside of inference_mode inference
        tensors are replaced, because they cannot be written or differentiated there."""
        if self._read.replaced:
            self._read.check()
        if self._read.copies:
            self._settle()
        if self._inference and not in_inference_mode():
            self._inference = False
            self._ids = ordinary(self._ids)
            self._map_counts(ordinary)
            for layer, state in enumerate(self._layers):
                self.replace_state(layer, state.map(ordinary))

    # ------------------------------------------------------------------------------------------ earlier states

    def snapshot(self) -> Snapshot:
        """The present state, for `restore`. It stays valid while later tokens are appended; once the cache has gone back to
        an earlier state and been written, it is stale."""
        self._prepare()
        read = {layer for layer, _ in self._read.current}  # their tensors may be edited later
        layers = [state.map(copied) if index in read else state.snapshot() for index, state in enumerate(self._layers)]
        snapshot = Snapshot(
            self._lengths.clone(), self._ids, self.seen, self._longest, self._shorter, self._common_length, self._rope_delta,
            self._rope_delta_since, layers,
        )
        self._snapshots = [ref for ref in self._snapshots if ref() is not None] + [weakref.ref(snapshot)]
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot of this cache. ValueError when its positions have been overwritten since."""
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"restore takes a Snapshot of this cache, not a {type(snapshot).__name__}")
        if snapshot.stale:
            raise ValueError(
                "this snapshot is stale: the cache returned to an earlier state and was written. clone() keeps a state for good"
            )
        if all(ref() is not snapshot for ref in self._snapshots):
            raise ValueError("this snapshot was taken of another cache: restore it there, or use clone()")
        self._prepare()
        for index, (old, new) in enumerate(zip(self._layers, snapshot.layers, strict=True)):
            if not old.static:
                self.replace_state(index, new.snapshot())
            elif isinstance(old, KVCache) and isinstance(new, KVCache):
                if new.key_buffer is not old.key_buffer:  # the snapshot has its own values, to be written over edited ones
                    self.unshare(index)
                old.overwrite(new)
            elif isinstance(old, DeltaNetState) and isinstance(new, DeltaNetState):
                old.overwrite(new)
            if isinstance(state := self._layers[index], KVCache):
                state.behind = True
        for other in self._live_snapshots():
            other.apart = other.apart and not share_tensors(other, snapshot)
        self._lengths, self._ids, self.seen, self._longest = snapshot.lengths, snapshot.ids, snapshot.seen, snapshot.longest
        self._common_length, self._shorter = snapshot.common_length, snapshot.shorter
        self._rope_delta, self._rope_delta_since = snapshot.rope_delta, snapshot.rope_delta_since
        self._inference = True  # it may have been taken in inference_mode
        self._mark_rewound()
        self._refresh()

    def _mark_rewound(self) -> None:
        unknown: list[Snapshot] = []
        own = self.host_lengths
        for other in self._live_snapshots():
            if self._lengths is other.lengths:
                other.rewound = False
            elif self._lengths.shape != other.lengths.shape:
                other.rewound = True
            elif own is not None and (theirs := other.host_lengths) is not None:
                other.rewound = any(a < b for a, b in zip(own, theirs, strict=True))
            else:
                unknown.append(other)
        if unknown:
            behind = torch.stack([(self._lengths < other.lengths).any() for other in unknown]).tolist()
            for other, rewound in zip(unknown, behind, strict=True):
                other.rewound = rewound

    def _live_snapshots(self) -> list[Snapshot]:
        snapshots = [ref() for ref in self._snapshots]  # torch.compile cannot trace an assignment inside a comprehension
        return [snapshot for snapshot in snapshots if snapshot is not None]

    def rollback(self, tokens: int | Tensor) -> None:
        """Removes the last `tokens` tokens of every row (int) or of each row (tensor [B]).

        Attention layers can roll back any number, Gated DeltaNet layers the last `record` tokens; more raises ValueError. A
        recurrent state is computed again from recorded inputs, so it equals the earlier one within rounding.
        """
        self._prepare()
        count, counts = checked_count(self, tokens)
        if counts is not None and not any(counts):
            return
        for index, layer in enumerate(self._layers):
            if isinstance(layer, DeltaNetState) and layer.log is not None:
                earlier = earlier_state(layer.log, count, counts, layer.conv_state.dtype)
                if layer.static:
                    layer.overwrite(earlier)
                else:
                    self.replace_state(index, earlier)
        self._remove(tokens, count, counts)
        for layer in self._layers:
            if isinstance(layer, KVCache):
                layer.length, layer.behind = self._longest, True
        self._inference = self._inference or in_inference_mode()
        self._mark_rewound()
        self._refresh()

    # ---------------------------------------------------------------------------------------------- as a value

    def clone(self) -> Cache:
        """A copy that shares nothing with this one. It has no snapshots of its own; gradients flow into it."""
        return self._mapped(copied)

    def detach_(self) -> Cache:
        """Cuts the states off the autograd graph, in this cache: for backpropagation through a part of the tokens."""
        self._prepare()
        for layer, state in enumerate(self._layers):
            if any(tensor.requires_grad for tensor in state.tensors()):
                self.replace_state(layer, state.map(torch.Tensor.detach))
        return self

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Cache:
        """Another cache, with `function` applied to every tensor."""
        self._prepare()
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._map_counts(function)
        other._ids = function(self._ids)
        other._layers = [layer.map(function) for layer in self._layers]
        other._snapshots, other._read = [], ReadTensors()
        return other

    def __copy__(self) -> Cache:
        return self.clone()  # two caches with the same tensors would overwrite each other's tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        memo[id(self)] = other = self.clone()
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and torch.save: without snapshots, which belong to this cache, and off the autograd graph."""
        return self._mapped(torch.Tensor.detach).__dict__

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row r becomes a copy of the old row rows[r]: for beam search. A growing cache may also drop or repeat rows."""
        index, numbers = row_numbers(rows, self.batch_size, self._lengths.device)
        if self.max_length is not None and index.shape[0] != self.batch_size:
            raise ValueError(f"a static cache keeps its {self.batch_size} rows, cannot hold {index.shape[0]}")
        self._prepare()
        self._ids = self._ids[index] if self.max_length is None else self._ids.copy_(self._ids[index])
        for number, layer in enumerate(self._layers):
            reordered = layer.map(lambda t: t.index_select(0, index.to(t.device)))
            if self.max_length is None:
                self.replace_state(number, reordered)
            else:
                for old, new in zip(layer.tensors(), reordered.tensors(), strict=True):
                    old.copy_(new)
        self._map_counts(lambda counts: counts[index])
        self._reordered(numbers)
        self._inference = self._inference or in_inference_mode()
        for snapshot in self._live_snapshots():
            if self.max_length is None:
                snapshot.apart = True  # the cache has new tensors
            else:
                snapshot.stale = True
        self._refresh()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as one safetensors file, without recorded tokens and snapshots."""
        from qwen35moe.cache.file import save_cache

        self._prepare()
        save_cache(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str], config: Any, *, device: torch.device | str = "cpu",
        devices: Sequence[torch.device] | None = None,
    ) -> Cache:
        """Reads a file written by `save`, for a model of this configuration; devices: one per layer, as for a new cache."""
        from qwen35moe.cache.file import load_cache

        return load_cache(path, config, device=device, devices=devices)
