"""What the routers chose, as data: captured by one run, replayed or decided in another.

    out = model(ids, output_routing=True)             out.routing: a Routing
    model(ids, routing=out.routing)                   indices and weights as given
    model(ids, routing=out.routing.indices_only())    indices as given, weights from the live logits, gradient to the router
    model(ids, routing=lambda layer, logits: ...)     (indices, weights) or indices decided by a function
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen35moe.ops.experts import chosen_weights, router_choice

Decision = Callable[[int, Tensor], "tuple[Tensor, Tensor] | Tensor"]
FREE = -1  # an index that leaves the choice of a token to the router


@dataclass(frozen=True)
class Routing:
    """The routing of `layers` (numbers in the model) for N = B*T tokens in the caller's order.

    indices [L, N, S] (-1: free, the router decides), weights [L, N, S] or None, logits [L, N, E] or None; shape is
    (B, T), mask [N] is True for tokens that are there.
    """

    indices: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None
    layers: tuple[int, ...] = ()
    num_experts: int = 0
    shape: tuple[int, int] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.indices.dim() != 3 or not _integers(self.indices):
            raise ValueError(
                f"routing indices are integers [layers, tokens, slots], got {list(self.indices.shape)} {self.indices.dtype}"
            )
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(f"weights {list(self.weights.shape)} do not fit indices {list(self.indices.shape)}")
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(self.indices.shape[0])))
        if len(self.layers) != self.indices.shape[0]:
            raise ValueError(f"{len(self.layers)} layer numbers for indices of {self.indices.shape[0]} layers")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"the layers {self.layers} name one twice")

    def indices_only(self) -> Routing:
        """Without weights: a replay computes them from its own logits."""
        return replace(self, weights=None)

    def to_batch(self) -> Tensor:
        """Indices as serving engines exchange them: [B, T, L, S]."""
        if self.shape is None:
            raise ValueError("this routing does not know its batch: make it with shape=(B, T)")
        return self.indices.permute(1, 0, 2).unflatten(0, self.shape)

    def load(self) -> Tensor:
        """[L, E]: the share of all choices that fell on each expert; tokens that are not there do not count."""
        if not self.num_experts:
            raise ValueError("this routing does not know the number of experts: make it with num_experts=E")
        chosen = self.indices if self.mask is None else self.indices[:, self.mask.to(self.indices.device)]
        flat = chosen.flatten(1)
        counts = torch.zeros(flat.shape[0], self.num_experts + 1, device=flat.device)
        counts.scatter_add_(1, torch.where(flat < 0, self.num_experts, flat), torch.ones_like(flat, dtype=counts.dtype))
        counts = counts[:, : self.num_experts]
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Choice:
    """One layer's routing: logits [N, E], indices [N, S], weights [N, S], tokens in the layers' order."""

    logits: Tensor
    indices: Tensor
    weights: Tensor


class Replay:
    """`routing=` of a forward call, checked against the model and brought into the layers' order of tokens.

    arrange: [B, T, ...] to [rows, tokens, ...], shape: the caller's (B, T).
    """

    def __init__(
        self, routing: Routing | Tensor | Decision, *, layers: int, num_experts: int, top_k: int,
        shape: tuple[int, int], arrange: Callable[[Tensor], Tensor],
    ) -> None:
        self.decide = None
        self.num_experts, self.top_k = num_experts, top_k
        if isinstance(routing, Tensor):
            routing = _from_batch(routing, shape)
        if not isinstance(routing, Routing):
            if not callable(routing):
                raise ValueError(
                    f"routing is a Routing, indices [B, T, L, S] or a function (layer, logits), got {type(routing).__name__}"
                )
            self.decide = routing
            return
        _check(routing, layers, num_experts, shape)
        rows = routing.indices.long().unflatten(1, shape)
        # Padding is free, as in the captured run, so that a replay is that run bit for bit; with more or fewer slots than
        # the router takes it goes to expert 0.
        shift = int(rows.shape[-1] == top_k)
        self.rows = {layer: arrange(rows[i] + shift) - shift for i, layer in enumerate(routing.layers)}
        self.weights = {}
        if routing.weights is not None:
            given = routing.weights.unflatten(1, shape)
            self.weights = {layer: arrange(given[i]) for i, layer in enumerate(routing.layers)}

    def __call__(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) [N, S] of a layer for its live logits [N, E]."""
        if self.decide is not None:
            return self._decided(layer, logits)
        if layer not in self.rows:
            return router_choice(logits, self.top_k)
        indices = self.rows[layer].flatten(0, 1).to(logits.device)
        free = (indices < 0).any(-1, keepdim=True)
        weights = chosen_weights(logits, indices.clamp(min=0))
        if layer in self.weights:
            weights = self.weights[layer].flatten(0, 1).to(logits.device, logits.dtype)
        if not torch.compiler.is_compiling() and not bool(free.any()):
            return indices, weights
        if indices.shape[-1] != self.top_k:
            raise ValueError(f"free tokens take top_k={self.top_k} experts, the replayed ones have {indices.shape[-1]} slots")
        own_indices, own_weights = router_choice(logits, self.top_k)
        return torch.where(free, own_indices, indices), torch.where(free, own_weights, weights)

    def _decided(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        assert self.decide is not None
        decided = self.decide(layer, logits)
        parts = decided if isinstance(decided, tuple) else (decided, None)
        if len(parts) != 2 or not isinstance(parts[0], Tensor) or not isinstance(parts[1], Tensor | None):
            given = [type(part).__name__ for part in decided] if isinstance(decided, tuple) else type(decided).__name__
            raise ValueError(f"layer {layer}: the routing function gave {given}: give indices, or (indices, weights)")
        indices, weights = parts
        if indices.dim() != 2 or indices.shape[0] != logits.shape[0] or not _integers(indices):
            raise ValueError(
                f"layer {layer}: the routing function gave indices {list(indices.shape)} {indices.dtype} for logits "
                f"{list(logits.shape)}: give integers [{logits.shape[0]}, slots]"
            )
        _check_range(indices, self.num_experts, f"layer {layer}: the routing function", lowest=0)
        indices = indices.long()
        if weights is None:
            return indices, chosen_weights(logits, indices)
        if weights.shape != indices.shape:
            raise ValueError(f"layer {layer}: weights {list(weights.shape)} do not fit indices {list(indices.shape)}")
        return indices, weights.to(logits.dtype)


def _integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _from_batch(indices: Tensor, shape: tuple[int, int]) -> Routing:
    if indices.dim() != 4:
        raise ValueError(f"routing indices as a tensor are [B, T, L, S], got {list(indices.shape)}; or give a Routing")
    if tuple(indices.shape[:2]) != shape:
        raise ValueError(f"the routing is of a batch {list(indices.shape[:2])}, the input is {list(shape)}")
    return Routing(indices.flatten(0, 1).permute(1, 0, 2), shape=(indices.shape[0], indices.shape[1]))


def _check(routing: Routing, layers: int, num_experts: int, shape: tuple[int, int]) -> None:
    if routing.indices.shape[1] != shape[0] * shape[1]:
        raise ValueError(
            f"the routing holds {routing.indices.shape[1]} tokens, the input {list(shape)} has {shape[0] * shape[1]}"
        )
    beyond = [layer for layer in routing.layers if not 0 <= layer < layers]
    if beyond:
        raise ValueError(f"the routing holds layer {beyond[-1]}, the model has {layers} layers")
    _check_range(routing.indices, num_experts, "the routing", lowest=FREE)


def _check_range(indices: Tensor, num_experts: int, who: str, lowest: int) -> None:
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < lowest or high >= num_experts:
        raise ValueError(f"{who} names expert {low if low < lowest else high}, the experts are 0 ... {num_experts - 1}")
