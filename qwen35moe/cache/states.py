"""The memory of one layer: keys and values of every token, or a convolution's last inputs and a matrix per head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.cache.rollback import RollbackLog, Segment
from qwen35moe.config import TextConfig

if TYPE_CHECKING:
    from qwen35moe.cache.layout import TokenLayout


@dataclass
class KVCache:
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

    def extended(self, key: Tensor, value: Tensor, layout: TokenLayout) -> KVCache:
        """With the layout's new tokens key, value [B, T, G, K] in their slots.

        Written in place where no gradient can flow, else into new tensors: a forward that is computed again for
        gradient checkpointing then finds the memory as it was.
        """
        functional = torch.is_grad_enabled() and (key.requires_grad or self.keys.requires_grad or value.requires_grad)
        used = self.used + layout.tokens
        state = self if used <= self.keys.shape[1] and not functional else self._grown(used, functional)
        keys, values = state.keys, state.values
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
        return KVCache(keys, values, used, self.fixed)

    def _grown(self, needed: int, functional: bool) -> KVCache:
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
class DeltaNetState:
    """inputs [B, C, W-1], the last the convolution has seen; memory [B, H, K, V], float32 at least.

    segment: what the forward that made this state brought, when the cache records; log: how to take it back. Fixed
    tensors are written in place when a new value is assigned.
    """

    conv_state: Tensor
    recurrent_state: Tensor
    segment: Segment | None = None
    log: RollbackLog | None = None
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


LayerState = KVCache | DeltaNetState


def empty_state(
    config: TextConfig, kind: str, batch: int, max_length: int | None, dtype: torch.dtype, device: torch.device | str
) -> LayerState:
    """A layer's memory before its first token: no keys, and zeros, which is what an empty past looks like."""
    if kind == "full_attention":
        shape = (batch, max_length or 0, config.num_key_value_heads, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCache(keys, values, 0, max_length is not None)
    heads, width, out = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    conv_state = torch.zeros(batch, config.conv_dim, config.linear_conv_kernel_dim - 1, dtype=dtype, device=device)
    wide = torch.promote_types(torch.float32, dtype)
    recurrent_state = torch.zeros(batch, heads, width, out, dtype=wide, device=device)
    return DeltaNetState(conv_state, recurrent_state, fixed=max_length is not None)


def state_tensors(layer: LayerState) -> list[Tensor]:
    """Every tensor that a layer holds, its recording included."""
    if isinstance(layer, KVCache):
        return [layer.keys, layer.values]
    found = [layer.conv_state, layer.recurrent_state]
    if layer.log is not None:
        found += [layer.log.conv_state, layer.log.recurrent_state, *vars(layer.log.since).values()]
    return found


def map_state(layer: LayerState, fn: Callable[[Tensor], Tensor]) -> LayerState:
    """The same with fn applied to every tensor."""
    if isinstance(layer, KVCache):
        return KVCache(fn(layer.keys), fn(layer.values), layer.used, layer.fixed)
    log = layer.log
    if log is not None:
        since = Segment(**{name: fn(tensor) for name, tensor in vars(log.since).items()})
        log = RollbackLog(fn(log.conv_state), fn(log.recurrent_state), since)
    return DeltaNetState(fn(layer.conv_state), fn(layer.recurrent_state), None, log, layer.fixed)


def snapshot_state(layer: LayerState, copy: bool) -> LayerState:
    """The layer's memory for a snapshot: shared, except that a static cache's matrices are copied."""
    if isinstance(layer, KVCache):
        return replace(layer)
    conv_state, recurrent_state = layer.conv_state, layer.recurrent_state
    if copy:
        conv_state, recurrent_state = conv_state.clone(), recurrent_state.clone()
    return DeltaNetState(conv_state, recurrent_state, None, layer.log)
