"""`Snapshot`: an earlier state of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen35moe.cache.states import KVCache, LayerState


@dataclass(eq=False, repr=False)
class Snapshot:
    """A state to return to. Cheap: it shares tensors with the cache, and becomes stale when they are overwritten."""

    lengths: Tensor
    ids: Tensor
    seen: int
    longest: int
    shorter: tuple[int, ...] | None
    common_length: int | None
    rope_delta: Tensor | None
    rope_delta_since: Tensor | None
    layers: list[LayerState]
    rewound: bool = False  # the cache is at an earlier state: the next write makes this snapshot stale
    stale: bool = False
    apart: bool = False  # the cache was reordered: they share no tensor any more

    @property
    def host_lengths(self) -> tuple[int, ...] | None:
        """The lengths, None where only the device has them."""
        return None if self.shorter is None else tuple(self.longest - less for less in self.shorter)

    def __repr__(self) -> str:
        stale = ", stale" if self.stale else ""
        return f"Snapshot({rows(self.lengths)}, {len(self.layers)} layers{stale})"


def share_tensors(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots hold the same buffers of keys."""
    pairs = zip(one.layers, other.layers, strict=True)
    return any(isinstance(a, KVCache) and isinstance(b, KVCache) and a.key_buffer is b.key_buffer for a, b in pairs)


def rows(lengths: Tensor, *more: str) -> str:
    """Rows, further words, lengths: for a repr."""
    listed = ", ".join(map(str, lengths[:8].tolist())) + (", ..." if lengths.shape[0] > 8 else "")
    return ", ".join([f"{lengths.shape[0]} rows", *more, f"lengths [{listed}]"])
