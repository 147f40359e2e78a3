"""Rolls back the last tokens of a Gated DeltaNet layer, exactly.

Keys can be cut off; a recurrent state cannot, because every token changes all of it. So the layer keeps the state before
its last tokens and records the inputs of those tokens; a rollback runs the remaining ones again. A recorded token takes
28 KiB at 35B shapes (the input of the convolution, and key, value and gates of the delta rule); a recurrent state per
token would take 2 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe import ops
from qwen35moe.cache.modes import copied
from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate

if TYPE_CHECKING:
    from qwen35moe.cache.value import Cache

_SLACK = 64  # columns kept beyond those needed, so that the log's initial state moves in chunks and not at every token


@dataclass(repr=False)
class Segment:
    """The inputs of some tokens to a layer: qkv [B, T, C] before the convolution, key [B, T, G, K], value [B, T, H, V],
    decay and beta [B, T, H], valid [B, T] (False for padding). least: every row has so many tokens, or more."""

    qkv: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor
    valid: Tensor
    least: int = 0

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self) if f.name != "least"]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Segment:
        return self._with(map(fn, self.tensors()))

    def _with(self, tensors: Iterable[Tensor]) -> Segment:
        qkv, key, value, decay, beta, valid = tensors
        return Segment(qkv, key, value, decay, beta, valid, self.least)

    def columns(self, start: int, end: int | None = None) -> Segment:
        """The columns start ... end of [B, T]."""
        return self.map(lambda t: t[:, start:end])

    def __repr__(self) -> str:
        return f"Segment(inputs of {list(self.valid.shape)} tokens)"

    def append(self, other: Segment) -> Segment:
        return self._with(torch.cat(pair, dim=1) for pair in zip(self.tensors(), other.tensors(), strict=True))


@dataclass(repr=False)
class RollbackLog:
    """A state (conv_state [B, C, W-1], recurrent_state [B, H, K, V]) and the tokens recorded after it. least: every row has
    recorded so many, or more; a check then need not read `available`."""

    conv_state: Tensor
    recurrent_state: Tensor
    recorded: Segment
    least: int = 0

    def tensors(self) -> list[Tensor]:
        return [self.conv_state, self.recurrent_state, *self.recorded.tensors()]

    def map(self, fn: Callable[[Tensor], Tensor]) -> RollbackLog:
        return RollbackLog(fn(self.conv_state), fn(self.recurrent_state), self.recorded.map(fn), self.least)

    def __repr__(self) -> str:
        return f"RollbackLog({self.recorded.valid.shape[1]} columns of tokens)"

    def available(self) -> Tensor:
        """[B]: how many tokens of each row can be rolled back."""
        return self.recorded.valid.sum(1)

    def append(self, segment: Segment, record: int) -> RollbackLog:
        """The log with the tokens of `segment` appended. The last `record` tokens of each row stay recorded; once the log is
        long enough, older ones move into its initial state."""
        log = replace(self, recorded=self.recorded.append(segment), least=self.least + segment.least)
        columns = log.recorded.valid.shape[1]
        if columns <= 2 * record + _SLACK:
            return log
        # Padding first: the last `record` columns of a row then are its last tokens, whatever the device holds.
        order = log.recorded.valid.to(torch.int8).argsort(dim=1, stable=True)
        recorded = log.recorded.map(lambda t: t.gather(1, order.view(*order.shape, *[1] * (t.dim() - 2)).expand(t.shape)))
        older = replace(log, recorded=recorded.columns(0, columns - record))
        return RollbackLog(*older.state(), recorded.columns(columns - record), min(log.least, record))

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

    def truncate(self, keep: Tensor, fewer: int | None) -> RollbackLog:
        """The log with the first `keep` [B] recorded tokens alone; `fewer`: at most so many less in a row, None: unknown."""
        least = 0 if fewer is None else max(0, self.least - fewer)
        return replace(self, recorded=replace(self.recorded, valid=self._first(keep)), least=least)

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


def earlier_state(log: RollbackLog, count: Tensor, counts: Sequence[int] | None, dtype: torch.dtype) -> DeltaNetState:
    """The state before the last `count` [B] recorded tokens, conv_state in `dtype`, with the log of those before. counts: the
    same numbers on the host, None where only the device has them."""
    keep = log.available() - count.to(log.recurrent_state.device)
    conv_state, recurrent_state = log.state(keep)
    return DeltaNetState(conv_state.to(dtype), recurrent_state, log.truncate(keep, None if counts is None else max(counts)))


def checked_count(cache: Cache, tokens: int | Tensor) -> tuple[Tensor, list[int] | None]:
    """How many tokens `Cache.rollback` removes from each row [B], and the same on the host, None for a tensor on a GPU.

    ValueError where it cannot. The numbers of a tensor on a GPU are asserted there. Others are compared with what the host has
    of the lengths and the logs; it reads those of the device where that does not suffice.
    """
    device, batch = cache._lengths.device, cache.batch_size
    numbers = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
    if numbers.dim() and numbers.shape != cache._lengths.shape:
        raise ValueError(f"cannot roll back {list(numbers.shape)} rows: the cache holds {batch}")
    if numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"cannot roll back {numbers.expand(batch).tolist()} tokens: give whole numbers >= 0")
    if numbers.is_cuda and numbers.dim():
        count = numbers.to(device).expand(batch)
        _assert_possible(cache, count)
        return count, None
    counts = numbers.expand(batch).tolist()
    if any(number < 0 for number in counts):
        raise ValueError(f"cannot roll back {counts} tokens: give whole numbers >= 0")
    count = numbers.to(device, non_blocking=device.type != "cpu").expand(batch)
    lengths = cache.host_lengths
    if lengths is None or cache._rope_delta_since is not None or max(counts, default=0) > _least_recorded(cache):
        _check_exactly(cache, count, counts)
    elif any(number > length for number, length in zip(counts, lengths, strict=True)):
        raise ValueError(f"cannot roll back {counts} tokens: the rows hold {list(lengths)}")
    return count, counts


def _least_recorded(cache: Cache) -> int:
    """A number of tokens that every row of every layer has recorded: all of them may be more."""
    states = [view.state for view in cache]
    recorded = [0 if state.log is None else state.log.least for state in states if isinstance(state, DeltaNetState)]
    return min(recorded, default=1 << 62)


def _recorded(state: DeltaNetState, count: Tensor) -> Tensor:
    """[B]: how many tokens of each row a layer has recorded, on the device of `count`."""
    return torch.zeros_like(count) if state.log is None else state.log.available().to(count.device)


def _assert_possible(cache: Cache, count: Tensor) -> None:
    """Asserts on the device what `_check_exactly` checks."""
    least = cache._lengths
    for view in cache:
        if isinstance(view.state, DeltaNetState):
            least = torch.minimum(least, _recorded(view.state, count))
    if cache._rope_delta_since is not None:
        least = torch.minimum(least, cache._lengths - cache._rope_delta_since)
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
        ((count >= 0) & (count <= least)).all(),
        "rollback: more tokens than a row holds, has recorded (record=), or has behind its last image or video",
    )


def _check_exactly(cache: Cache, count: Tensor, counts: list[int]) -> None:
    """ValueError where a row cannot be rolled back so far; reads the lengths and all layers' logs in one transfer."""
    states = [(index, view.state) for index, view in enumerate(cache)]
    layers = [(index, state) for index, state in states if isinstance(state, DeltaNetState)]
    since = cache._rope_delta_since
    more = [] if since is None else [since]
    tensors = torch.stack([cache._lengths, *more, *(_recorded(state, count) for _, state in layers)]).tolist()
    lengths, since, recorded = tensors[0], tensors[1] if more else None, tensors[1 + len(more) :]
    cache.set_host_lengths(lengths)
    if any(number > length for number, length in zip(counts, lengths, strict=True)):
        raise ValueError(f"cannot roll back {counts} tokens: the rows hold {lengths}")
    for (index, _), numbers in zip(layers, recorded, strict=True):
        if any(a > b for a, b in zip(counts, numbers, strict=True)):
            why = "" if not cache.record else (
                ". Tokens before an edit of the layer's state are not recorded, nor those of a forward that patched `state` or "
                "whose mixer replaces the delta rule"
            )
            raise ValueError(
                f"cannot roll back {counts} tokens: layer {index} has recorded the last {numbers}. "
                f"Make the cache with record={max(counts)} or more, or keep a snapshot(){why}"
            )
    if since is not None and any(a - b < c for a, b, c in zip(lengths, counts, since, strict=True)):
        raise ValueError(
            f"cannot roll back {counts} tokens: images or videos are among the first {since} of "
            f"{lengths} tokens, and the rotary offset before them is not kept. Keep a snapshot() instead"
        )
