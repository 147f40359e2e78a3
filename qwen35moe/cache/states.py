"""The state of one layer: `KVCache` of an attention layer, `DeltaNetState` of a Gated DeltaNet layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.cache.layout import write_rows
from qwen35moe.cache.modes import ordinary_tensors
from qwen35moe.config import TextConfig

if TYPE_CHECKING:
    from qwen35moe.cache.layout import FixedStep, TokenLayout
    from qwen35moe.cache.rollback import RollbackLog, Segment

STATIC_GRADIENT = "a static cache is written in place and carries no gradient: use no_grad(), or a growing one"


@dataclass(repr=False)
class KVCache:
    """Keys and values of every token: `key` and `value` [B, length, G, K].

    They are the first `length` positions of the buffers; the positions behind them are room to grow. A static state is
    written in place and never reallocated. behind: whether positions behind the tokens of a row may hold values of tokens
    that were rolled back, which a mask hides only where they are finite.
    """

    names: ClassVar[tuple[str, str]] = ("key", "value")

    key_buffer: Tensor
    value_buffer: Tensor
    length: int = 0
    static: bool = False
    behind: bool = False

    @property
    def key(self) -> Tensor:
        return self.key_buffer[:, : self.length]

    @key.setter
    def key(self, key: Tensor) -> None:
        self.key_buffer = self._assigned("key", self.key_buffer, key)

    @property
    def value(self) -> Tensor:
        return self.value_buffer[:, : self.length]

    @value.setter
    def value(self, value: Tensor) -> None:
        self.value_buffer = self._assigned("value", self.value_buffer, value)

    def _assigned(self, name: str, buffer: Tensor, new: Tensor) -> Tensor:
        """The buffer with `new` in the used positions."""
        check_shape(name, (buffer.shape[0], self.length, *buffer.shape[2:]), new)
        if self.static:
            buffer[:, : self.length] = new
            return buffer
        with torch.set_grad_enabled(new.requires_grad or buffer.requires_grad):
            return torch.cat([new.to(buffer.device, buffer.dtype), buffer[:, self.length :]], dim=1)

    def append(self, key: Tensor, value: Tensor, layout: TokenLayout) -> KVCache:
        """The state after the layout's new tokens key, value [B, T, G, K]; this one keeps its length.

        The buffers are written in place where no gradient can flow, else new ones are made: under activation checkpointing
        the recomputation must find the state as it was, and so must the backward of a forward before.
        """
        functional = self.key_buffer.requires_grad or self.value_buffer.requires_grad or (
            torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        )
        if functional and self.static:
            raise ValueError(STATIC_GRADIENT)
        # A cache keeps its dtype: under autocast, and for a projection in another one.
        key, value = key.to(self.key_buffer.dtype), value.to(self.value_buffer.dtype)
        if layout.step is not None:
            return self._append_step(key, value, layout, layout.step)
        length = self.length + layout.tokens
        keys, values = self._buffers_for(length, functional)
        if isinstance(layout.starts, int) and layout.lengths is None:
            new = slice(layout.starts, layout.starts + layout.tokens)
            if functional:
                keys = torch.cat([keys[:, : new.start], key], dim=1)
                values = torch.cat([values[:, : new.start], value], dim=1)
            else:
                keys[:, new], values[:, new] = key, value
        else:
            if self.behind:
                keys, values = (zero_behind(x, layout.starts, functional) for x in (keys, values))
            keys, values = write_rows(keys, key, layout, functional), write_rows(values, value, layout, functional)
            return KVCache(keys, values, length, self.static)
        return KVCache(keys, values, length, self.static, self.behind)

    def _append_step(self, key: Tensor, value: Tensor, layout: TokenLayout, step: FixedStep) -> KVCache:
        """The first `step.positions` positions, after one token per row was written in place at its position `starts` [B]. A
        frozen row's token lies behind its tokens, where no query of its row attends to it."""
        assert isinstance(layout.starts, Tensor)
        index = (step.rows, layout.starts)
        self.key_buffer.index_put_(index, key[:, 0])
        self.value_buffer.index_put_(index, value[:, 0])
        return KVCache(self.key_buffer, self.value_buffer, step.positions, self.static)

    def _buffers_for(self, length: int, functional: bool) -> tuple[Tensor, Tensor]:
        """Both buffers, larger ones where these are too short: at least twice as long, so that growth is rare."""
        room = self.key_buffer.shape[1]
        if self.static or (length <= room and not functional):
            return self.key_buffer, self.value_buffer
        more = (length if functional else max(length, 2 * room, 64)) - room
        padding = (0, 0, 0, 0, 0, more)
        with ordinary_tensors():
            return F.pad(self.key_buffer, padding), F.pad(self.value_buffer, padding)

    def read(self) -> tuple[Tensor, Tensor]:
        """`key` and `value`."""
        return self.key_buffer[:, : self.length], self.value_buffer[:, : self.length]

    def place(self, name: str) -> str:
        """The attribute that holds `name`: its whole buffer."""
        return f"{name}_buffer"

    def stored(self, name: str) -> Tensor:
        """The tensor that holds `name`."""
        return self.__dict__[f"{name}_buffer"]

    def tensors(self) -> list[Tensor]:
        """Every tensor that the state holds."""
        return [self.key_buffer, self.value_buffer]

    def map(self, fn: Callable[[Tensor], Tensor]) -> KVCache:
        """The same state with fn applied to every tensor."""
        return replace(self, key_buffer=fn(self.key_buffer), value_buffer=fn(self.value_buffer))

    def snapshot(self) -> KVCache:
        """The state for a snapshot. It shares the buffers: later tokens are written behind its length."""
        return replace(self)

    def overwrite(self, other: KVCache) -> None:
        """Becomes a copy of another state of this layer, in place: for a static state."""
        if other.key_buffer is not self.key_buffer:
            for own, new in zip(self.tensors(), other.tensors(), strict=True):
                own[:, : other.length] = new[:, : other.length]
        self.length = other.length

    def __repr__(self) -> str:
        room = f"room for {self.key_buffer.shape[1]} tokens"
        return f"KVCache({described(self.key, 'key')}, {described(self.value, 'value')}, {room})"


def zero_behind(buffer: Tensor, starts: int | Tensor, functional: bool) -> Tensor:
    """A buffer [B, positions, G, K] with zeros from each row's position `starts` [B] on."""
    first = starts.to(buffer.device)[:, None] if isinstance(starts, Tensor) else starts
    hidden = (torch.arange(buffer.shape[1], device=buffer.device) >= first).expand(buffer.shape[:2])[..., None, None]
    return buffer.masked_fill(hidden, 0) if functional else buffer.masked_fill_(hidden, 0)


@dataclass(repr=False)
class DeltaNetState:
    """conv_state [B, C, W-1], the convolution's last inputs; recurrent_state [B, H, K, V], float32 or wider.

    log: the recorded tokens, from which `Cache.rollback` computes an earlier state. A static state's tensors are written in
    place when a new value is assigned.
    """

    names: ClassVar[tuple[str, str]] = ("conv_state", "recurrent_state")

    conv_state: Tensor
    recurrent_state: Tensor
    log: RollbackLog | None = None
    static: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        old = self.__dict__.get(name)
        if isinstance(old, Tensor) and isinstance(value, Tensor):
            check_shape(name, tuple(old.shape), value)
            if self.static:
                old.copy_(value)
                return
        self.__dict__[name] = value

    def read(self) -> tuple[Tensor, Tensor]:
        """`conv_state` and `recurrent_state`."""
        return self.conv_state, self.recurrent_state

    def place(self, name: str) -> str:
        """The attribute that holds `name`."""
        return name

    def stored(self, name: str) -> Tensor:
        """The tensor that holds `name`."""
        return self.__dict__[name]

    def tensors(self) -> list[Tensor]:
        """Every tensor that the state holds, the recorded tokens' included."""
        return [self.conv_state, self.recurrent_state, *([] if self.log is None else self.log.tensors())]

    def map(self, fn: Callable[[Tensor], Tensor]) -> DeltaNetState:
        """The same state with fn applied to every tensor."""
        log = None if self.log is None else self.log.map(fn)
        return DeltaNetState(fn(self.conv_state), fn(self.recurrent_state), log, self.static)

    def snapshot(self) -> DeltaNetState:
        """The state for a snapshot. It shares the tensors, except those that are written in place."""
        conv_state, recurrent_state = self.conv_state, self.recurrent_state
        if self.static:
            conv_state, recurrent_state = conv_state.clone(), recurrent_state.clone()
        return DeltaNetState(conv_state, recurrent_state, self.log, self.static)

    def write_rows(self, new: DeltaNetUpdate, rows: Tensor) -> None:
        """Writes the states after a token into the rows where `rows` [B] is True, in place, by operations on device memory
        alone."""
        for own, after in ((self.conv_state, new.conv_state), (self.recurrent_state, new.recurrent_state)):
            if after is not own:  # a fused step may have written it
                torch.where(rows.view(-1, *[1] * (own.dim() - 1)), after.to(own.dtype), own, out=own)

    def overwrite(self, other: DeltaNetState) -> None:
        """Becomes a copy of another state of this layer, in place: for a static state."""
        self.conv_state, self.recurrent_state, self.log = other.conv_state, other.recurrent_state, other.log

    def __repr__(self) -> str:
        recorded = "" if self.log is None else f", {self.log!r}"
        state = described(self.recurrent_state, "recurrent_state")
        return f"DeltaNetState({described(self.conv_state, 'conv_state')}, {state}{recorded})"


class DeltaNetUpdate(NamedTuple):
    """What a forward leaves for `Cache.commit`: the two states after the new tokens, and for a cache that records the tokens
    themselves."""

    conv_state: Tensor
    recurrent_state: Tensor
    segment: Segment | None = None

    def __repr__(self) -> str:
        recorded = "" if self.segment is None else f", {self.segment!r}"
        state = described(self.recurrent_state, "recurrent_state")
        return f"DeltaNetUpdate({described(self.conv_state, 'conv_state')}, {state}{recorded})"


LayerState = KVCache | DeltaNetState


def empty_state(
    config: TextConfig, kind: str, batch: int, max_length: int | None, dtype: torch.dtype, device: torch.device | str
) -> LayerState:
    """A layer's state before its first token: no keys; zeros for the convolution and the delta rule."""
    static = max_length is not None
    if kind == "full_attention":
        shape = (batch, max_length or 0, config.num_key_value_heads, config.head_dim)
        key_buffer, value_buffer = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCache(key_buffer, value_buffer, static=static)
    conv_state = torch.zeros(batch, config.conv_dim, config.linear_conv_kernel_dim - 1, dtype=dtype, device=device)
    shape = (batch, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    recurrent_state = torch.zeros(shape, dtype=torch.promote_types(torch.float32, dtype), device=device)
    return DeltaNetState(conv_state, recurrent_state, static=static)


SIZES = (
    "layer_types", "num_key_value_heads", "head_dim", "linear_conv_kernel_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip


def check_sizes(cached: TextConfig, model: TextConfig) -> None:
    """ValueError where a cache was made for a model with layers of other kinds or sizes."""
    if cached is model:
        return
    for name in SIZES:
        before, now = getattr(cached, name), getattr(model, name)
        if before != now:
            if name == "layer_types":
                layer = next(i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
                name, before, now = f"layer_types[{layer}]", before[layer], now[layer]
            raise ValueError(f"the cache was made for a model with {name}={before}, this model has {now}: use model.new_cache")


def check_shape(name: str, shape: tuple[int, ...], new: Tensor) -> None:
    """ValueError with both shapes where a new value has another one."""
    if tuple(new.shape) != shape:
        raise ValueError(f"the cache holds {name} {list(shape)}, the new value is {list(new.shape)}")


def described(tensor: Tensor, name: str) -> str:
    """A tensor in a repr: name, shape, dtype, and the device where it is not the CPU."""
    device = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{device}"
