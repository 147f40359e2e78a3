"""`RowCounts`: how many tokens each row of a cache holds, and at which rotary position it goes on.

The lengths are a tensor on the device, which a forward reads and advances. `_longest`, `_shorter` and `_common_length` count
them on the host, so that it need not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen35moe.cache.modes import ordinary_tensors
from qwen35moe.cache.states import KVCache, LayerState
from qwen35moe.compat import short

if TYPE_CHECKING:
    from qwen35moe.cache.layout import TokenLayout


class RowCounts:
    """The part of a `Cache` that counts. B: rows."""

    seen: int
    max_length: int | None
    record: int
    _layers: list[LayerState]

    def __init__(self, batch_size: int, device: torch.device | str) -> None:
        self._rope_delta: Tensor | None = None
        self._rope_delta_since: Tensor | None = None  # [B]: lengths when rope_delta last changed; its older values are lost
        self._common_length: int | None = 0  # the length of every row; None where they may differ
        self._longest = 0  # the length of the longest row, or more where the host does not have the lengths
        # How much shorter than the longest each row is; None where only the device has the lengths. Equal growth keeps it.
        self._shorter: tuple[int, ...] | None = (0,) * batch_size
        self._frozen: Tensor | None = None  # [B]: see `freeze`
        with ordinary_tensors():
            self._lengths = torch.zeros(batch_size, dtype=torch.long, device=device)

    @property
    def lengths(self) -> Tensor:
        """[B]: how many tokens each row holds. A copy: tokens are removed with `rollback`, `restore` or `reorder`."""
        return self._lengths.clone()

    @lengths.setter
    def lengths(self, lengths: object) -> None:
        raise ValueError(
            "lengths follow from the tokens and cannot be assigned: rollback(n) removes tokens, by row with a tensor"
        )

    @property
    def rope_delta(self) -> Tensor | None:
        """[B]: the rotary position of a token minus its position in the cache; None for 0. A copy, see `set_next_positions`."""
        return None if self._rope_delta is None else self._rope_delta.clone()

    @rope_delta.setter
    def rope_delta(self, delta: Tensor | None) -> None:
        self.set_next_positions(self._lengths if delta is None else delta.to(self._lengths.device) + self._lengths)

    @property
    def batch_size(self) -> int:
        return self._lengths.shape[0]

    def start(self) -> int | Tensor:
        """The position of each row's next token: an int where all rows have one, else [B]."""
        return self._common_length if self._common_length is not None else self._lengths.clone()

    @property
    def host_lengths(self) -> tuple[int, ...] | None:
        """The lengths without waiting for the device; None where only it has them."""
        return None if self._shorter is None else tuple(self._longest - less for less in self._shorter)

    def set_host_lengths(self, lengths: Sequence[int]) -> None:
        """The lengths, which were read from the device."""
        self._longest = max(lengths, default=0)
        self._shorter = tuple(self._longest - length for length in lengths)
        for layer in self._layers:
            if isinstance(layer, KVCache):
                layer.length = self._longest

    def _read_lengths(self) -> tuple[int, ...]:
        """The lengths on the host, which waits for the device where it does not have them."""
        if self._shorter is None:
            self.set_host_lengths(self._lengths.tolist())
        lengths = self.host_lengths
        assert lengths is not None
        return lengths

    def _check_length(self, layout: TokenLayout, room: int) -> None:
        if layout.lengths is None:
            longest = layout.tokens + (self._longest if self._common_length is None else self._common_length)
            if longest > room and self._common_length is None:
                longest = max(self._read_lengths()) + layout.tokens
        elif layout.host_lengths is None and not layout.lengths.is_cpu and self._longest + layout.tokens <= room:
            return  # without reading the lengths
        else:
            new = layout.lengths.tolist() if layout.host_lengths is None else layout.host_lengths
            longest = max(map(sum, zip(self._read_lengths(), new, strict=True)))
        if longest > room:
            raise ValueError(
                f"the longest row would hold {longest} tokens, the cache has room for {room}: "
                f"make one with new_cache({self.batch_size}, max_length={longest}) or more"
            )

    def _advance(self, layout: TokenLayout) -> None:
        """The lengths after the layout's tokens."""
        if layout.lengths is None:
            self._lengths = self._lengths + layout.tokens
            self._common_length = None if self._common_length is None else self._common_length + layout.tokens
            self._longest += layout.tokens
            return
        self._lengths, self._common_length = self._lengths + layout.lengths, None
        new, held = layout.host_lengths, self.host_lengths
        if new is not None and held is not None:
            lengths = [a + b for a, b in zip(held, new, strict=True)]
            self._longest = max(lengths)
            self._shorter = tuple(self._longest - length for length in lengths)
        elif self._lengths.is_cpu:
            self._longest, self._shorter = int(self._lengths.max()), None
        else:
            self._longest, self._shorter = self._longest + layout.tokens, None

    def _remove(self, tokens: int | Tensor, count: Tensor, counts: list[int] | None) -> None:
        """The lengths after a rollback of `tokens`: count [B] on the device, counts on the host, None where it has none."""
        self._lengths = self._lengths - count
        if counts is not None and not torch.as_tensor(tokens).dim():  # of every row
            self.seen -= counts[0]
            self._common_length = None if self._common_length is None else self._common_length - counts[0]
        else:
            self._common_length = None
        if counts is None:
            self._shorter = None  # the longest row may be shorter now, by a number that the device alone has
        elif (held := self.host_lengths) is not None:
            self.set_host_lengths([a - b for a, b in zip(held, counts, strict=True)])
        elif self._lengths.is_cpu:
            self.set_host_lengths(self._lengths.tolist())
        else:
            self._longest -= min(counts)

    def _reordered(self, numbers: list[int] | None) -> None:
        """The host's account of the lengths after row r became a copy of row numbers[r]; None where the host has no numbers."""
        if self._shorter is not None and not any(self._shorter):  # all rows are equally long
            self.set_host_lengths([self._longest] * self.batch_size)
        elif numbers is not None and (held := self.host_lengths) is not None:
            self.set_host_lengths([held[row] for row in numbers])
        elif self._lengths.is_cpu:
            self.set_host_lengths(self._lengths.tolist())
        else:
            self._shorter = None

    def freeze(self, rows: Tensor) -> None:
        """For decoding loops on a GPU, until `settle`: a forward leaves the Gated DeltaNet state of a row as it is where `rows`
        [B] bool, read at that time and on the device, is True. Positions and lengths go on until `settle` sets them right, so
        that what attention layers have stored of such a row lies behind its tokens. Not for a cache that records tokens."""
        if self.record:
            raise ValueError(f"rows of a cache with record={self.record} cannot be frozen: pass an attention_mask")
        self._frozen = rows

    def settle(self, lengths: Sequence[int], seen: int) -> None:
        """The lengths of the rows, and `seen`, after forwards of which the host did not have the numbers of tokens."""
        if self._frozen is not None:
            with ordinary_tensors():
                new = torch.tensor(lengths, device="cpu").to(self._lengths.device, non_blocking=self._lengths.is_cuda)
            self._lengths, self._frozen = new, None
            for layer in self._layers:
                if isinstance(layer, KVCache):
                    layer.behind = True
        self.set_host_lengths(lengths)
        self._common_length, self.seen = self._longest if min(lengths) == max(lengths) else None, seen

    @property
    def next_positions(self) -> Tensor:
        """[B]: the rotary position of each row's next token."""
        return self._lengths + (0 if self._rope_delta is None else self._rope_delta)

    def set_next_positions(self, positions: Tensor) -> None:
        """Sets the rotary position [B] of each row's next token: an image takes fewer positions than tokens."""
        if not isinstance(positions, Tensor) or positions.shape != self._lengths.shape or positions.dtype.is_floating_point:
            raise ValueError(f"positions are a tensor of integers [{self.batch_size}], got {short(positions)}")
        new = positions.to(self._lengths.device) - self._lengths
        old = torch.zeros_like(new) if self._rope_delta is None else self._rope_delta
        since = torch.zeros_like(new) if self._rope_delta_since is None else self._rope_delta_since
        self._rope_delta, self._rope_delta_since = new, torch.where(new != old, self._lengths, since)

    def _map_counts(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to the tensors with one number per row."""
        self._lengths = function(self._lengths)
        self._rope_delta = None if self._rope_delta is None else function(self._rope_delta)
        self._rope_delta_since = None if self._rope_delta_since is None else function(self._rope_delta_since)
        self._frozen = None if self._frozen is None else function(self._frozen)
