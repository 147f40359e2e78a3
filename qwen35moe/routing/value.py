"""`Routing`: the experts of some layers for some tokens, from a forward, by hand or from a serving engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen35moe.backends.values import unbatched, values_known
from qwen35moe.compat import short

UNFORCED = -1  # an index that leaves the choice for a token to the router
TENSORS = ("indices", "weights", "logits", "mask")  # the fields of a Routing that are tensors
FACTS = ("layers", "num_experts", "shape", "open_ended")  # the others


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """The routing of `layers` (numbers in the model) for N = B*T tokens in the caller's order.

    indices [L, N, k] (-1: unforced, the router chooses), weights [L, N, k] or None, logits [L, N, E] or None; shape is
    (B, T), mask [N] is False for padding. open_ended: the input may have one token more than the routing, which is
    unforced (a token that the engine sampled and never ran).

    == compares values: the same numbers in the same parts; indices may differ in dtype, and tensors in device.
    """

    indices: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None
    layers: tuple[int, ...] = ()
    num_experts: int = 0
    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    open_ended: bool = False

    def __post_init__(self) -> None:
        if self.indices.dim() != 3 or not are_integers(self.indices):
            raise ValueError(
                f"routing indices are integers [layers, tokens, k], got {list(self.indices.shape)} {self.indices.dtype}"
            )
        layers, tokens, _ = self.indices.shape
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(f"weights {list(self.weights.shape)} do not fit indices {list(self.indices.shape)}")
        if self.logits is not None and (self.logits.dim() != 3 or self.logits.shape[:2] != self.indices.shape[:2]):
            raise ValueError(f"logits {list(self.logits.shape)} do not fit indices {list(self.indices.shape)}")
        if self.logits is not None and self.num_experts and self.logits.shape[-1] != self.num_experts:
            raise ValueError(f"logits {list(self.logits.shape)} are not of {self.num_experts} experts")
        if self.mask is not None and self.mask.shape != (tokens,):
            raise ValueError(f"the mask {list(self.mask.shape)} does not fit {tokens} tokens")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"the mask is bool, True for a token, got {self.mask.dtype}")
        if self.shape is not None and self.shape[0] * self.shape[1] != tokens:
            raise ValueError(f"the shape {list(self.shape)} does not fit {tokens} tokens")
        for name in ("layers", "shape"):  # as tuples, so that a routing has a hash
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(layers)))
        if len(self.layers) != layers:
            raise ValueError(f"{len(self.layers)} layer numbers for indices of {layers} layers")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"a layer number appears twice in {self.layers}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routing):
            return NotImplemented
        own, others = (tuple(getattr(r, name) for name in FACTS) for r in (self, other))
        return own == others and all(same_values(getattr(self, name), getattr(other, name)) for name in TENSORS)

    def __hash__(self) -> int:
        return hash((*(getattr(self, name) for name in FACTS), tuple(self.indices.shape)))

    def __repr__(self) -> str:
        """In one screen, whatever its size."""
        parts = [f"{name} {_described(getattr(self, name))}" for name in TENSORS if getattr(self, name) is not None]
        layers = f"layers {short(list(self.layers))}"
        batch = "" if self.shape is None else f", batch {list(self.shape)}"
        padding = "" if self.mask is None else f", {int((~self.mask).sum())} of them padding"
        ended = ", perhaps one more" if self.open_ended else ""
        experts = f"{self.num_experts or '?'} experts, top-{self.indices.shape[-1]}"
        return f"Routing({layers}; {experts}; {self.tokens} tokens{padding}{ended}{batch}; {', '.join(parts)})"

    def _repr_html_(self) -> str:
        """A table in notebooks: how even each layer's load is."""
        from .plots import html_table

        return html_table(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        return replace(self, **{name: _copied(getattr(self, name)) for name in TENSORS})

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {name: value.detach() for name in TENSORS if (value := getattr(self, name)) is not None}
        return (_rebuilt, (parts | {name: getattr(self, name) for name in FACTS},))

    @property
    def tokens(self) -> int:
        """N."""
        return self.indices.shape[1]

    @property
    def unforced(self) -> Tensor:
        """[L, N]: True where the router chooses."""
        return (self.indices < 0).any(-1)

    def indices_only(self) -> Routing:
        """Without weights: a forward computes them from its own logits."""
        return replace(self, weights=None)

    def detach(self) -> Routing:
        """Without the autograd graph, so that no activations are kept alive."""
        parts = {name: getattr(self, name) for name in ("indices", "weights", "logits")}
        return replace(self, **{name: part if part is None else part.detach() for name, part in parts.items()})

    def to_batch(self) -> Tensor:
        """Indices as serving engines exchange them: [B, T, L, k]."""
        if self.shape is None:
            raise ValueError("this routing has no batch shape: make it with shape=(B, T)")
        return self.indices.permute(1, 0, 2).unflatten(0, self.shape)

    # ---------------------------------------------------------------------------------------------- one sequence

    @classmethod
    def from_engine(
        cls, prompt: Any, generated: Any = None, *, num_experts: int = 0, tokens: int | None = None, layers: Sequence[int] = ()
    ) -> Routing:
        """One sequence's routing as serving engines return it: a row [L, k] per token of the prompt and of the generated
        tokens (tensors, arrays or lists of integers).

        A row of -1 (a token from a prefix cache) is unforced. So is a missing last row, because engines never run the last
        token they sample: tokens= is the length of the sequence, at most one more than there are rows; without it the input
        may be as long as the rows or one token longer. Any other index outside 0 ... num_experts - 1 raises ValueError
        (without num_experts=, an index that is too high raises in the forward), and so does a row with some -1 only.
        layers: the numbers of the L layers, if they are not 0 ... L - 1.
        """
        parts = [_engine_rows(name, part) for name, part in (("prompt", prompt), ("generated", generated)) if part is not None]
        if len(parts) == 2 and parts[0].shape[1:] != parts[1].shape[1:]:
            raise ValueError(f"prompt {list(parts[0].shape)} and generated {list(parts[1].shape)} differ in layers or k")
        rows = torch.cat(parts)
        check_range(rows, num_experts, "the engine", lowest=UNFORCED)
        partly = (rows < 0).any(-1) & (rows >= 0).any(-1)
        if partly.any():
            token, layer = partly.nonzero()[0].tolist()
            raise ValueError(f"token {token}, layer {layer}: {rows[token, layer].tolist()} is unforced in part")
        count = rows.shape[0]
        if tokens is not None and not count <= tokens <= count + 1:
            raise ValueError(f"{count} rows of routing do not fit {tokens} tokens: only the last row may be missing")
        if tokens == count + 1:
            rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), UNFORCED)])
        return cls(
            rows.permute(1, 0, 2), layers=tuple(layers), num_experts=num_experts, shape=(1, rows.shape[0]),
            open_ended=tokens is None,
        )

    @classmethod
    def cat(cls, turns: Sequence[Routing], starts: Sequence[int] | None = None) -> Routing:
        """One sequence's routing from the routings of its turns; indices only.

        starts: the position of each turn's first row in the sequence; zeros where every turn returns the whole conversation
        so far. Without it each turn begins where the rows of the previous turn end, at the token that the previous turn
        sampled and never ran (its unforced last row, or its missing row). Where several turns have a row for a token, the
        first that is not unforced counts: the conversation was sampled with it.
        """
        layers, experts, k = _common_sizes(turns)
        if starts is not None and len(starts) != len(turns):
            raise ValueError(f"{len(starts)} starts for {len(turns)} turns")
        whole = turns[0].indices.new_full((len(layers), 0, k), UNFORCED)
        for number, turn in enumerate(turns):
            if turn.shape is not None and turn.shape[0] != 1:
                raise ValueError(f"turn {number} is a batch {list(turn.shape)}: give the turns of one sequence")
            length = whole.shape[1]
            last_unforced = length > 0 and bool((whole[:, -1] < 0).all())
            start = starts[number] if starts is not None else length - last_unforced
            if not 0 <= start <= length:
                raise ValueError(f"turn {number} starts at {start}, the rows before it end at {length}")
            more = max(start + turn.tokens - length, 0)
            whole = torch.cat([whole, whole.new_full((len(layers), more, k), UNFORCED)], 1)
            earlier = whole[:, start : start + turn.tokens]
            new = turn.indices.to(earlier)
            whole[:, start : start + turn.tokens] = torch.where((earlier < 0).any(-1, keepdim=True), new, earlier)
        return cls(whole, layers=layers, num_experts=experts, shape=(1, whole.shape[1]), open_ended=turns[-1].open_ended)

    # ---------------------------------------------------------------------------------------------- several sequences

    @classmethod
    def pack(cls, sequences: Sequence[Routing]) -> Routing:
        """The sequences one after the other in one row [1, N], as `cu_seqlens` packs them. Padding is dropped; weights and
        logits are kept if all sequences have them."""
        layers, experts, _ = _common_sizes(sequences)
        _check_closed(sequences)
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
        """One sequence per row, padded on the "right" or "left" to the longest; indices only, padding unforced and masked."""
        if side not in ("right", "left"):
            raise ValueError(f"side={side!r} is neither 'right' nor 'left'")
        layers, experts, k = _common_sizes(sequences)
        _check_closed(sequences)
        longest = max(s.tokens for s in sequences)
        rows = torch.full((len(layers), len(sequences), longest, k), UNFORCED, dtype=torch.long, device="cpu")
        mask = torch.zeros(len(sequences), longest, dtype=torch.bool, device="cpu")
        for number, sequence in enumerate(sequences):
            columns = slice(longest - sequence.tokens, longest) if side == "left" else slice(0, sequence.tokens)
            rows[:, number, columns], mask[number, columns] = sequence.indices.to(rows), True
        return cls(rows.flatten(1, 2), layers=layers, num_experts=experts, shape=(len(sequences), longest), mask=mask.flatten())

    # ---------------------------------------------------------------------------------------------- on disk

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file. metadata: strings of the caller, which `read_metadata` returns."""
        from .file import save_routing

        save_routing(self, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routing:
        """Reads a file written by `save`. The file is not trusted: ValueError names the problem."""
        from .file import load_routing

        return load_routing(path)


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """One layer's routing, tokens in the layers' order: logits [N, E], indices and weights [N, k]. == compares values."""

    logits: Tensor
    indices: Tensor
    weights: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RouterOutput):
            return NotImplemented
        return all(same_values(getattr(self, name), getattr(other, name)) for name in ("logits", "indices", "weights"))

    def __hash__(self) -> int:
        return hash((tuple(self.logits.shape), tuple(self.indices.shape)))


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two parts are equal: both None, or the same shape and numbers; integers of any width, floats of one dtype."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or (a.dtype != b.dtype and not (are_integers(a) and are_integers(b))):
        return False
    a, b = a.detach(), b.detach().to(a.device)
    return torch.equal(a.long(), b.long()) if are_integers(a) else torch.equal(a, b)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _rebuilt(parts: dict[str, Any]) -> Routing:
    return Routing(**parts)


def are_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_range(indices: Tensor, num_experts: int, source: str, lowest: int) -> None:
    """ValueError for an index outside lowest ... num_experts - 1 (num_experts=0: any). Not checked where values are unknown."""
    indices = unbatched(indices)
    if not values_known(indices) or indices.numel() == 0:
        return
    low, high = torch.stack(indices.aminmax()).tolist()
    if low < lowest or (num_experts and high >= num_experts):
        experts = f"0 ... {num_experts - 1}" if num_experts else "numbered from 0"
        raise ValueError(f"{source} has expert {low if low < lowest else high}, the experts are {experts}")


def check_distinct(indices: Tensor, source: str) -> None:
    """ValueError for a token [..., k] that has an expert twice, or -1 beside experts. Not checked where values are unknown."""
    if torch.compiler.is_compiling() or indices.numel() == 0 or indices.shape[-1] == 1:
        return
    ordered = indices.sort(-1).values
    unforced = ordered < 0
    wrong = ((ordered[..., 1:] == ordered[..., :-1]) & ~unforced[..., 1:]) | (unforced[..., 1:] != unforced[..., :-1])
    known = unbatched(wrong)
    if not values_known(known) or not bool(known.any()):
        return
    if known is not wrong:
        raise ValueError(f"{source}: a token's row has an expert twice or is unforced in part")
    row = indices[wrong.any(-1)][0].tolist()
    what = "is unforced in part" if min(row) < 0 else "has an expert twice"
    raise ValueError(f"{source}: a token's row {short(row)} {what}")


def check_weights(weights: Tensor, source: str) -> None:
    """ValueError for weights that are not finite floating-point numbers. Not checked where values are unknown."""
    if not weights.is_floating_point():
        raise ValueError(f"{source}: weights are floating-point numbers, got {weights.dtype}")
    weights = unbatched(weights)
    if values_known(weights) and not bool(weights.isfinite().all()):
        raise ValueError(f"{source} has weights that are not finite")


def _engine_rows(name: str, part: Any) -> Tensor:
    rows = part if isinstance(part, Tensor) else torch.as_tensor(part, device="cpu")
    if rows.dim() != 3 or not are_integers(rows):
        raise ValueError(f"{name} is integers [tokens, layers, k], got {list(rows.shape)} {rows.dtype}")
    return rows.long()


def _common_sizes(sequences: Sequence[Routing]) -> tuple[tuple[int, ...], int, int]:
    """(layers, experts, k), which all sequences must share."""
    if not sequences:
        raise ValueError("there is no routing to combine")
    sizes = [(s.layers, s.num_experts, s.indices.shape[-1]) for s in sequences]
    for number, other in enumerate(sizes):
        for name, expected, actual in zip(("layers", "experts", "k"), sizes[0], other, strict=True):
            if actual != expected:
                raise ValueError(f"routing {number} has {name} {actual}, the first one {expected}")
    return sizes[0]


def _check_closed(sequences: Sequence[Routing]) -> None:
    for number, sequence in enumerate(sequences):
        if sequence.open_ended:
            raise ValueError(
                f"routing {number} has {sequence.tokens} rows and perhaps one more token: pass tokens= to from_engine"
            )
