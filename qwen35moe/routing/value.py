"""The routing of some layers for some tokens, as one value: made by a forward, by hand, or from a serving engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FREE = -1  # an index that leaves the choice of a token to the router


@dataclass(frozen=True)
class Routing:
    """The routing of `layers` (numbers in the model) for N = B*T tokens in the caller's order.

    indices [L, N, S] (-1: free, the router decides), weights [L, N, S] or None, logits [L, N, E] or None; shape is
    (B, T), mask [N] is True for tokens that are there. ends_free: the input may have one token more than there are rows,
    which routes freely (a sampled token that the engine never ran).
    """

    indices: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None
    layers: tuple[int, ...] = ()
    num_experts: int = 0
    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    ends_free: bool = False

    def __post_init__(self) -> None:
        if self.indices.dim() != 3 or not are_integers(self.indices):
            raise ValueError(
                f"routing indices are integers [layers, tokens, slots], got {list(self.indices.shape)} {self.indices.dtype}"
            )
        layers, tokens, _ = self.indices.shape
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(f"weights {list(self.weights.shape)} do not fit indices {list(self.indices.shape)}")
        if self.logits is not None and (self.logits.dim() != 3 or self.logits.shape[:2] != self.indices.shape[:2]):
            raise ValueError(f"logits {list(self.logits.shape)} do not fit indices {list(self.indices.shape)}")
        if self.mask is not None and self.mask.shape != (tokens,):
            raise ValueError(f"the mask {list(self.mask.shape)} does not fit {tokens} tokens")
        if self.shape is not None and self.shape[0] * self.shape[1] != tokens:
            raise ValueError(f"the shape {list(self.shape)} does not fit {tokens} tokens")
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(layers)))
        if len(self.layers) != layers:
            raise ValueError(f"{len(self.layers)} layer numbers for indices of {layers} layers")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"the layers {self.layers} name one twice")

    @property
    def tokens(self) -> int:
        """N, the number of rows."""
        return self.indices.shape[1]

    @property
    def free(self) -> Tensor:
        """[L, N]: True where the router decides."""
        return (self.indices < 0).any(-1)

    def indices_only(self) -> Routing:
        """Without weights: a replay computes them from its own logits."""
        return replace(self, weights=None)

    def detach(self) -> Routing:
        """Off the autograd graph, so that keeping it keeps no activations."""
        parts = {name: getattr(self, name) for name in ("indices", "weights", "logits")}
        return replace(self, **{name: part if part is None else part.detach() for name, part in parts.items()})

    def to_batch(self) -> Tensor:
        """Indices as serving engines exchange them: [B, T, L, S]."""
        if self.shape is None:
            raise ValueError("this routing does not know its batch: make it with shape=(B, T)")
        return self.indices.permute(1, 0, 2).unflatten(0, self.shape)

    # ---------------------------------------------------------------------------------------------- one sequence

    @classmethod
    def from_engine(
        cls, prompt: Any, generated: Any = None, *, num_experts: int = 0, tokens: int | None = None, layers: Sequence[int] = ()
    ) -> Routing:
        """One sequence's routing as serving engines return it: prompt [P, L, S], generated [G, L, S] (tensors, arrays
        or lists of integers), a row per token.

        A row of -1 (a token taken from a prefix cache) routes freely. So does a missing last row, because engines never
        run the last token they sample: tokens= says how long the sequence is, one more than P + G at most; without it
        the input may be as long as the rows or one token longer. Any other id outside 0 ... num_experts - 1 raises
        ValueError (without num_experts= one that is too high does so when it is replayed), and so does a row that is free
        in part. layers: the numbers of the L layers, if not all from 0 on.
        """
        parts = [_engine_rows(name, part) for name, part in (("prompt", prompt), ("generated", generated)) if part is not None]
        if len(parts) == 2 and parts[0].shape[1:] != parts[1].shape[1:]:
            raise ValueError(f"prompt {list(parts[0].shape)} and generated {list(parts[1].shape)} differ in layers or slots")
        rows = torch.cat(parts)
        check_range(rows, num_experts, "the engine", lowest=FREE)
        partly = (rows < 0).any(-1) & (rows >= 0).any(-1)
        if partly.any():
            token, layer = partly.nonzero()[0].tolist()
            raise ValueError(f"token {token}, layer {layer}: {rows[token, layer].tolist()} is free in part")
        found = rows.shape[0]
        if tokens is not None and not found <= tokens <= found + 1:
            raise ValueError(f"{found} rows of routing do not fit {tokens} tokens: only the last row may be missing")
        if tokens == found + 1:
            rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), FREE)])
        return cls(
            rows.permute(1, 0, 2), layers=tuple(layers), num_experts=num_experts, shape=(1, rows.shape[0]),
            ends_free=tokens is None,
        )

    @classmethod
    def cat(cls, turns: Sequence[Routing], starts: Sequence[int] | None = None) -> Routing:
        """One sequence's routing from that of its turns, indices alone; a real row replaces a free one.

        starts: the position of each turn's first row in the sequence; zeros where every turn returns the whole
        conversation so far. Without it each turn takes up where the rows of the one before end, at the token that one
        sampled and never ran (its free last row, or the row it lacks). Where two turns have a real row of a token, the
        first counts: by it the conversation was sampled.
        """
        layers, experts, slots = _agreed(turns)
        if starts is not None and len(starts) != len(turns):
            raise ValueError(f"{len(starts)} starts for {len(turns)} turns")
        whole = turns[0].indices.new_full((len(layers), 0, slots), FREE)
        for number, turn in enumerate(turns):
            if turn.shape is not None and turn.shape[0] != 1:
                raise ValueError(f"turn {number} is a batch {list(turn.shape)}: give the turns of one sequence")
            length = whole.shape[1]
            last_free = length > 0 and bool((whole[:, -1] < 0).all())
            start = starts[number] if starts is not None else length - last_free
            if not 0 <= start <= length:
                raise ValueError(f"turn {number} starts at {start}, the rows before it end at {length}")
            more = max(start + turn.tokens - length, 0)
            whole = torch.cat([whole, whole.new_full((len(layers), more, slots), FREE)], 1)
            here = whole[:, start : start + turn.tokens]
            new = turn.indices.to(here)
            whole[:, start : start + turn.tokens] = torch.where((here < 0).any(-1, keepdim=True), new, here)
        return cls(whole, layers=layers, num_experts=experts, shape=(1, whole.shape[1]), ends_free=turns[-1].ends_free)

    # ---------------------------------------------------------------------------------------------- several sequences

    @classmethod
    def pack(cls, sequences: Sequence[Routing]) -> Routing:
        """Documents end to end in one row, [1, N] of all tokens, as `cu_seqlens` packs them. Weights and logits stay if
        all have them; tokens that are not there are dropped."""
        layers, experts, _ = _agreed(sequences)
        _refuse_open(sequences)
        kept = [slice(None) if s.mask is None else s.mask.to(s.indices.device).nonzero()[:, 0] for s in sequences]
        indices = torch.cat([s.indices[:, keep].long() for s, keep in zip(sequences, kept, strict=True)], 1)
        parts: dict[str, Any] = {}
        for name in ("weights", "logits"):
            values = [getattr(s, name) for s in sequences]
            if all(value is not None for value in values):
                parts[name] = torch.cat([value[:, keep] for value, keep in zip(values, kept, strict=True)], 1)
        return cls(indices, layers=layers, num_experts=experts, shape=(1, indices.shape[1]), **parts)

    @classmethod
    def pad(cls, sequences: Sequence[Routing], side: str = "right") -> Routing:
        """One sequence a row, padded on the "right" or "left" to the longest: indices alone, padding free and masked."""
        if side not in ("right", "left"):
            raise ValueError(f"side={side!r} is neither 'right' nor 'left'")
        layers, experts, slots = _agreed(sequences)
        _refuse_open(sequences)
        longest = max(s.tokens for s in sequences)
        rows = torch.full((len(layers), len(sequences), longest, slots), FREE)
        mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
        for number, sequence in enumerate(sequences):
            at = slice(longest - sequence.tokens, longest) if side == "left" else slice(0, sequence.tokens)
            rows[:, number, at], mask[number, at] = sequence.indices.to(rows), True
        return cls(rows.flatten(1, 2), layers=layers, num_experts=experts, shape=(len(sequences), longest), mask=mask.flatten())

    # ---------------------------------------------------------------------------------------------- on disk

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file; metadata: strings of the caller, which come back from `read_metadata`."""
        from .file import save_routing

        save_routing(self, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routing:
        """Reads what `save` wrote. The file is not trusted: ValueError says what does not fit."""
        from .file import load_routing

        return load_routing(path)


@dataclass(frozen=True)
class RouterOutput:
    """One layer's routing: logits [N, E], indices [N, S], weights [N, S], tokens in the layers' order."""

    logits: Tensor
    indices: Tensor
    weights: Tensor


def are_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_range(indices: Tensor, num_experts: int, who: str, lowest: int) -> None:
    """ValueError for an expert outside lowest ... num_experts - 1 (0: not known); nothing while a graph is compiled."""
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < lowest or (num_experts and high >= num_experts):
        experts = f"0 ... {num_experts - 1}" if num_experts else "numbered from 0"
        raise ValueError(f"{who} names expert {low if low < lowest else high}, the experts are {experts}")


def _engine_rows(name: str, part: Any) -> Tensor:
    rows = torch.as_tensor(part)
    if rows.dim() != 3 or not are_integers(rows):
        raise ValueError(f"{name} is integers [tokens, layers, slots], got {list(rows.shape)} {rows.dtype}")
    return rows.long()


def _agreed(sequences: Sequence[Routing]) -> tuple[tuple[int, ...], int, int]:
    """(layers, experts, slots) that all of them have."""
    if not sequences:
        raise ValueError("there is no routing to put together")
    found = [(s.layers, s.num_experts, s.indices.shape[-1]) for s in sequences]
    for number, other in enumerate(found):
        if other != found[0]:
            names = ("layers", "experts", "slots")
            name, first, here = next(t for t in zip(names, found[0], other, strict=True) if t[1] != t[2])
            raise ValueError(f"routing {number} has {name} {here}, the first one {first}")
    return found[0]


def _refuse_open(sequences: Sequence[Routing]) -> None:
    for number, sequence in enumerate(sequences):
        if sequence.ends_free:
            raise ValueError(
                f"routing {number} has {sequence.tokens} rows and perhaps a token more: say tokens= to from_engine"
            )
