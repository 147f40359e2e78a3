"""`routing=` of a forward call: checked against the model, brought into the layers' order, asked layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.experts import chosen_weights, router_choice

from .value import FREE, Routing, are_integers, check_range

Intervention = Callable[[int, Tensor], "tuple[Tensor, Tensor] | Tensor"]


class ForcedRouting:
    """`routing=` of a forward call, checked against the model and brought into the layers' order of tokens.

    arrange: [B, T, ...] to [rows, tokens, ...], shape: the caller's (B, T).
    """

    def __init__(
        self, routing: Routing | Tensor | Intervention, *, layers: int, num_experts: int, top_k: int,
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
        missing = int(routing.ends_free and shape[0] == 1 and routing.tokens == shape[1] - 1)
        _check(routing, layers, num_experts, shape, missing)
        rows = F.pad(routing.indices.long(), (0, 0, 0, missing), value=FREE).unflatten(1, shape)
        # Padding is free, as in the captured run, so that a replay is that run bit for bit; with more or fewer slots than
        # the router takes it goes to expert 0.
        shift = int(rows.shape[-1] == top_k)
        self.rows = {layer: arrange(rows[i] + shift) - shift for i, layer in enumerate(routing.layers)}
        self.weights = {}
        if routing.weights is not None:
            given = F.pad(routing.weights, (0, 0, 0, missing)).unflatten(1, shape)
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
        if indices.dim() != 2 or indices.shape[0] != logits.shape[0] or not are_integers(indices):
            raise ValueError(
                f"layer {layer}: the routing function gave indices {list(indices.shape)} {indices.dtype} for logits "
                f"{list(logits.shape)}: give integers [{logits.shape[0]}, slots]"
            )
        check_range(indices, self.num_experts, f"layer {layer}: the routing function", lowest=0)
        indices = indices.long()
        if weights is None:
            return indices, chosen_weights(logits, indices)
        if weights.shape != indices.shape:
            raise ValueError(f"layer {layer}: weights {list(weights.shape)} do not fit indices {list(indices.shape)}")
        return indices, weights.to(logits.dtype)


def _from_batch(indices: Tensor, shape: tuple[int, int]) -> Routing:
    if indices.dim() != 4:
        raise ValueError(f"routing indices as a tensor are [B, T, L, S], got {list(indices.shape)}; or give a Routing")
    if tuple(indices.shape[:2]) != shape:
        raise ValueError(f"the routing is of a batch {list(indices.shape[:2])}, the input is {list(shape)}")
    return Routing(indices.flatten(0, 1).permute(1, 0, 2), shape=(indices.shape[0], indices.shape[1]))


def _check(routing: Routing, layers: int, num_experts: int, shape: tuple[int, int], missing: int) -> None:
    if routing.tokens + missing != shape[0] * shape[1]:
        raise ValueError(
            f"the routing holds {routing.tokens} tokens, the input {list(shape)} has {shape[0] * shape[1]}"
        )
    beyond = [layer for layer in routing.layers if not 0 <= layer < layers]
    if beyond:
        raise ValueError(f"the routing holds layer {beyond[-1]}, the model has {layers} layers")
    check_range(routing.indices, num_experts, "the routing", lowest=FREE)
