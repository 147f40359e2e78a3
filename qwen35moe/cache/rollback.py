"""Rolls back the last tokens of a Gated DeltaNet layer, exactly.

Keys can be cut off; a recurrent state cannot, because every token changes all of it. So the layer keeps the state before
its last tokens and records the inputs of those tokens; a rollback runs the remaining ones again. A recorded token takes
28 KiB at 35B shapes (the input of the convolution, and key, value and gates of the delta rule); a recurrent state per
token would take 2 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe import ops
from qwen35moe.cache.modes import copied
from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate, KVCache

if TYPE_CHECKING:
    from qwen35moe.cache.value import Cache

_SLACK = 64  # columns kept beyond those needed, so that the log's initial state moves in chunks and not at every token


@dataclass(repr=False)
class Segment:
    """The inputs of some tokens to a layer: qkv [B, T, C] before the convolution, key [B, T, G, K], value [B, T, H, V],
    decay and beta [B, T, H], valid [B, T] (False for padding)."""

    qkv: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor
    valid: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Segment:
        return Segment(*map(fn, self.tensors()))

    def columns(self, start: int, end: int | None = None) -> Segment:
        """The columns start ... end of [B, T]."""
        return self.map(lambda t: t[:, start:end])

    def __repr__(self) -> str:
        return f"Segment(inputs of {list(self.valid.shape)} tokens)"

    def append(self, other: Segment) -> Segment:
        return Segment(*(torch.cat(pair, dim=1) for pair in zip(self.tensors(), other.tensors(), strict=True)))


@dataclass(repr=False)
class RollbackLog:
    """A state (conv_state [B, C, W-1], recurrent_state [B, H, K, V]) and the tokens recorded after it."""

    conv_state: Tensor
    recurrent_state: Tensor
    recorded: Segment

    def tensors(self) -> list[Tensor]:
        return [self.conv_state, self.recurrent_state, *self.recorded.tensors()]

    def map(self, fn: Callable[[Tensor], Tensor]) -> RollbackLog:
        return RollbackLog(fn(self.conv_state), fn(self.recurrent_state), self.recorded.map(fn))

    def __repr__(self) -> str:
        return f"RollbackLog({self.recorded.valid.shape[1]} columns of tokens)"

    def available(self) -> Tensor:
        """[B]: how many tokens of each row can be rolled back."""
        return self.recorded.valid.sum(1)

    def append(self, segment: Segment, record: int) -> RollbackLog:
        """The log with the tokens of `segment` appended. At least `record` tokens of each row stay recorded; once it is
        long enough, older ones move into its initial state."""
        log = replace(self, recorded=self.recorded.append(segment))
        columns = log.recorded.valid.shape[1]
        if columns <= 2 * record + _SLACK:
            return log
        available = log.recorded.valid.flip(1).cumsum(1).amin(0)  # tokens that every row has in its last 1, 2, ... columns
        needed = int((available < record).sum()) + 1
        cut = columns - needed
        if cut <= 0:
            return log
        older = replace(log, recorded=log.recorded.columns(0, cut))
        return RollbackLog(*older.state(), log.recorded.columns(cut))

    def state(self, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(conv_state, recurrent_state) after the first `keep` [B] recorded tokens, by default after all of them."""
        recorded = self.recorded
        valid = recorded.valid if keep is None else self._first(keep)
        decay, beta = (torch.where(valid[..., None], gate, 0) for gate in (recorded.decay, recorded.beta))
        # Zeros, because tokens that were rolled back may be nan, and 0 * nan is nan.
        key, value = (torch.where(valid[..., None, None], x, 0) for x in (recorded.key, recorded.value))
        _, recurrent_state = ops.gated_delta_rule(key, key, value, decay=decay, beta=beta, state=self.recurrent_state)
        past = self.conv_state.shape[-1]
        inputs = torch.cat([self.conv_state.mT.to(recorded.qkv.dtype), recorded.qkv], dim=1)
        valid = torch.cat([valid.new_ones(valid.shape[0], past), valid], dim=1)
        last = valid.to(torch.int8).argsort(dim=1, stable=True)[:, valid.shape[1] - past :]
        return inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[-1])).mT, recurrent_state

    def truncate(self, keep: Tensor) -> RollbackLog:
        """The log with the first `keep` [B] recorded tokens alone."""
        return replace(self, recorded=replace(self.recorded, valid=self._first(keep)))

    def _first(self, keep: Tensor) -> Tensor:
        """[B, T]: True for the first `keep` [B] recorded tokens of each row."""
        valid = self.recorded.valid
        return valid & (valid.cumsum(1) <= keep[:, None])


def extended_log(old: DeltaNetState, new: DeltaNetUpdate, record: int, copy: bool) -> RollbackLog | None:
    """The log of the old state with the tokens of the new one, of which `record` stay available; a new log begins with the old
    state itself, with a copy where its tensors may be written."""
    if new.segment is None:
        return None
    log = old.log
    if log is None:
        conv_state, recurrent_state = old.conv_state, old.recurrent_state
        if copy:
            conv_state, recurrent_state = copied(conv_state), copied(recurrent_state)
        log = RollbackLog(conv_state, recurrent_state, new.segment.columns(0, 0))
    return log.append(new.segment, record)


def earlier_state(log: RollbackLog, count: Tensor, dtype: torch.dtype) -> DeltaNetState:
    """The state before the last `count` [B] recorded tokens, conv_state in `dtype`, with the log of those before."""
    keep = log.available() - count.to(log.recurrent_state.device)
    conv_state, recurrent_state = log.state(keep)
    return DeltaNetState(conv_state.to(dtype), recurrent_state, log.truncate(keep))


def checked_count(cache: Cache, tokens: int | Tensor) -> Tensor:
    """[B]: how many tokens `Cache.rollback` removes from each row; ValueError where it cannot."""
    lengths = cache.lengths
    count = torch.as_tensor(tokens, device=lengths.device)
    if count.dim() and count.shape != lengths.shape:
        raise ValueError(f"cannot roll back {list(count.shape)} rows: the cache holds {cache.batch_size}")
    count = count.expand(cache.batch_size)
    if count.is_floating_point() or count.dtype == torch.bool or bool((count < 0).any()):
        raise ValueError(f"cannot roll back {count.tolist()} tokens: give whole numbers >= 0")
    if bool((count > lengths).any()):
        raise ValueError(f"cannot roll back {count.tolist()} tokens: the rows hold {lengths.tolist()}")
    for index, view in enumerate(cache):
        layer = view.state
        if isinstance(layer, KVCache):
            continue
        recorded = torch.zeros_like(count) if layer.log is None else layer.log.available().to(count.device)
        if bool((count > recorded).any()):
            why = "" if not cache.record else (
                ". Tokens before an edit of the layer's state are not recorded, nor those of a forward that patched `state` or "
                "whose mixer replaces the delta rule"
            )
            raise ValueError(
                f"cannot roll back {count.tolist()} tokens: layer {index} has recorded the last {recorded.tolist()}. "
                f"Make the cache with record={int(count.max())} or more, or keep a snapshot(){why}"
            )
    since = cache._rope_delta_since
    if since is not None and bool((lengths - count < since).any()):
        raise ValueError(
            f"cannot roll back {count.tolist()} tokens: images or videos are among the first {since.tolist()} of "
            f"{lengths.tolist()} tokens, and the rotary offset before them is not kept. Keep a snapshot() instead"
        )
    return count
