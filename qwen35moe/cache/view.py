"""`LayerView`: a layer's state as `cache[i]` shows it, to read and to edit, and the record of the tensors that were read.

A cache has further tensors that depend on a layer's state: the recorded tokens of a rollback, the states of snapshots. An
edit in place leaves no trace, so the cache takes precautions when a tensor is read: snapshots that share it get copies, and
the rollback log later compares it with a copy.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.cache.modes import copied, ordinary_tensors
from qwen35moe.cache.states import STATIC_GRADIENT, DeltaNetState, LayerState, check_shape

if TYPE_CHECKING:
    from qwen35moe.cache.value import Cache


class LayerView:
    """The state of one layer: `.key` and `.value` [B, length, G, K], or `.conv_state` [B, C, W-1] and `.recurrent_state`
    [B, H, K, V].

    To read, to assign (`cache[0].recurrent_state = x`) and to write in place (`cache[0].recurrent_state.mul_(0.5)`): the
    next forward continues from the new value, and so do snapshots and clones made afterwards; earlier snapshots keep the value
    of their time. Tokens before an edit cannot be rolled back. The view stays that of its layer as the cache goes on; a
    tensor that was read from it may be replaced by later tokens, and editing it then is an error of the next call.
    """

    __slots__ = ("_cache", "_layer")
    _cache: Cache
    _layer: int

    if TYPE_CHECKING:
        key: Tensor
        value: Tensor
        conv_state: Tensor
        recurrent_state: Tensor

    def __init__(self, cache: Cache, layer: int) -> None:
        object.__setattr__(self, "_cache", cache)
        object.__setattr__(self, "_layer", layer)

    @property
    def state(self) -> LayerState:
        """The `KVCache` or `DeltaNetState` of the moment, without the precautions: for reading."""
        return self._cache._layers[self._layer]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        state = self.state
        if name in state.names:
            return self._read_tensor(name)
        for own in state.names:
            if name == state.place(own):  # the buffer of keys or values
                self._read_tensor(own)
                return self.state.stored(own)
        if name in ("key", "value", "conv_state", "recurrent_state"):
            kind = "a Gated DeltaNet" if "conv_state" in state.names else "an attention"
            own = " and ".join(state.names)
            raise AttributeError(f"layer {self._layer} is {kind} layer: its state has {own}, not {name}")
        return getattr(state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_cache", "_layer"):  # when it is unpickled
            object.__setattr__(self, name, value)
        elif name in self.state.names:
            self._assign(name, value)
        else:
            getattr(self, name)  # AttributeError for a name that the state does not have
            own = " and ".join(self.state.names)
            raise ValueError(f"cache[{self._layer}].{name} cannot be assigned, only {own}")

    def _read_tensor(self, name: str) -> Tensor:
        """A tensor for the cache's user, who may edit it: snapshots get copies, and so does the check of the log."""
        cache, layer, state = self._cache, self._layer, self.state
        cache._read_lengths()  # keys are as many as the longest row has
        tensor = state.stored(name)
        # An inference tensor cannot be written outside of inference_mode, and one on the graph may be needed by a backward.
        if tensor.is_inference() or (tensor.requires_grad and (layer, name) not in cache._read.current):
            state.__dict__[state.place(name)] = copied(tensor)
        cache.unshare(layer)
        recorded = isinstance(state, DeltaNetState) and state.log is not None and (layer, name) not in cache._read.copies
        cache._read.note(layer, name, state.stored(name).detach().clone() if recorded else None)
        return getattr(state, name)

    def _assign(self, name: str, value: Tensor) -> None:
        """Replaces a tensor; a static one is written in place. Earlier tokens cannot be rolled back."""
        cache, layer, state = self._cache, self._layer, self.state
        cache._read_lengths()  # keys are as many as the longest row has
        if not isinstance(value, Tensor):
            raise ValueError(f"cache[{layer}].{name} is a tensor, the new value is a {type(value).__name__}")
        check_shape(name, tuple(getattr(state, name).shape), value)
        if not value.is_floating_point():
            raise ValueError(f"cache[{layer}].{name} holds floating-point numbers, the new value is {value.dtype}")
        if state.static:
            if torch.is_grad_enabled() and value.requires_grad:
                raise ValueError(STATIC_GRADIENT)
            cache.unshare(layer)
            with torch.no_grad():
                setattr(state, name, value)
        else:
            old, state = state, copy.copy(state)
            if isinstance(state, DeltaNetState):
                value = copied(value).to(old.stored(name).device, old.stored(name).dtype)
            with ordinary_tensors():
                setattr(state, name, value)
            cache.replace_state(layer, state)
        if isinstance(state, DeltaNetState):
            state.log = None
        for own in state.names:
            cache._read.copies.pop((layer, own), None)

    def __repr__(self) -> str:
        return f"<layer {self._layer}: {self.state!r}>"


class ReadTensors:
    """The tensors of a cache that were read through its views, and may have been edited since."""

    def __init__(self) -> None:
        self.current: set[tuple[int, str]] = set()  # (layer, name) whose present tensor was read
        self.copies: dict[tuple[int, str], Tensor] = {}  # their values then, for layers with recorded tokens
        self.replaced: list[tuple[weakref.ref[Tensor], int, str]] = []  # read and replaced since: tensor, version, name

    def note(self, layer: int, name: str, copy: Tensor | None) -> None:
        """A tensor is read."""
        self.current.add((layer, name))
        if copy is not None:
            self.copies.setdefault((layer, name), copy)

    def replace(self, layer: int, old: LayerState, new: LayerState) -> None:
        """A layer's state becomes another one."""
        for name in old.names:
            tensor = old.stored(name)
            if tensor is new.stored(name):
                continue
            if (layer, name) in self.current:
                self.current.discard((layer, name))
                self.replaced.append((weakref.ref(tensor), tensor._version, f"cache[{layer}].{name}"))
            self.copies.pop((layer, name), None)

    def check(self) -> None:
        """ValueError where a tensor was edited after the cache had replaced it: the edit would have no effect."""
        alive = [entry for entry in self.replaced if entry[0]() is not None]
        edited = [entry for entry in alive if (tensor := entry[0]()) is not None and tensor._version != entry[1]]
        self.replaced = [entry for entry in alive if entry not in edited]  # raised once
        if edited:
            name = edited[0][2]
            raise ValueError(
                f"a tensor that was read as {name} has been edited, but the cache has replaced it since: the edit has no "
                f"effect. Read {name} again to edit it; clone() what was read to compute with it in place"
            )

    def edited(self, layers: list[LayerState]) -> Iterator[int]:
        """The layers whose present tensors differ from their copies, which are renewed."""
        for (layer, name), before in list(self.copies.items()):
            if not _identical(layers[layer].stored(name), before):
                yield layer
                self.copies[layer, name] = layers[layer].stored(name).detach().clone()


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are equal; nan equals nan."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(bits), b.contiguous().view(bits))
