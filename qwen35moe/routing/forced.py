"""The argument `routing=` of a forward call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import values_known
from qwen35moe.ops.experts import chosen_weights, router_choice

from .value import UNFORCED, Routing, are_integers, check_distinct, check_range, check_weights

Intervention = Callable[[int, Tensor], "tuple[Tensor, Tensor] | Tensor"]


class ForcedRouting:
    """The argument `routing=`, checked against the model, with tokens in the layers' order. Called once per layer.

    shape: the caller's (B, T). arrange: [B, T, ...] to the layers' [rows, tokens, ...].
    """

    def __init__(
        self, routing: Routing | Tensor | Intervention, *, layers: int, num_experts: int, top_k: int,
        shape: tuple[int, int], arrange: Callable[[Tensor], Tensor],
    ) -> None:
        self.intervention = None
        self.num_experts, self.top_k = num_experts, top_k
        if isinstance(routing, Tensor):
            routing = _from_batch(routing, shape)
        if not isinstance(routing, Routing):
            if not callable(routing):
                raise ValueError(
                    f"routing is a Routing, indices [B, T, L, k] or a function (layer, logits), got {type(routing).__name__}"
                )
            self.intervention = routing
            return
        missing = int(routing.open_ended and shape[0] == 1 and routing.tokens == shape[1] - 1)
        _check(routing, layers, num_experts, shape, missing)
        rows = F.pad(routing.indices.long(), (0, 0, 0, missing), value=UNFORCED).unflatten(1, shape)
        # Padding is unforced, as in the recorded forward, so that a replay repeats it bit for bit. With another k than the
        # router's, padding goes to expert 0.
        shift = int(rows.shape[-1] == top_k)
        self.rows = {layer: arrange(rows[i] + shift) - shift for i, layer in enumerate(routing.layers)}
        self._check_rows(bool(shift))
        # Whether a layer has unforced tokens, in one read of the device; None where values are unknown.
        flags = torch.stack([(indices < 0).any() for indices in self.rows.values()]) if self.rows else torch.empty(0)
        self.unforced = dict(zip(self.rows, flags.tolist(), strict=True)) if values_known(flags) else None
        self.weights = {}
        if routing.weights is not None:
            weights = F.pad(routing.weights, (0, 0, 0, missing)).unflatten(1, shape)
            self.weights = {layer: arrange(weights[i]) for i, layer in enumerate(routing.layers)}

    def _check_rows(self, same_k: bool) -> None:
        """ValueError for a token with an expert twice; same_k: as many experts as the router chooses."""
        indices = list(self.rows.values())
        if same_k and indices and not indices[0].is_cpu:
            try:
                check_distinct(torch.stack(indices), "the routing")  # one read of the device
                return
            except ValueError:
                pass  # raised below, with the layer
        for layer, rows in self.rows.items():
            check_distinct(rows if same_k else rows[rows.any(-1)], f"the routing, layer {layer}")

    def __call__(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) [N, k] of a layer for its live logits [N, E]."""
        if self.intervention is not None:
            return _intervene(self.intervention, layer, logits, self.num_experts)
        if layer not in self.rows:
            return router_choice(logits, self.top_k)
        indices = self.rows[layer].flatten(0, 1).to(logits.device, non_blocking=logits.is_cuda)
        unforced = (indices < 0).any(-1, keepdim=True)
        weights = chosen_weights(logits, indices.clamp(min=0))
        if layer in self.weights:
            weights = self.weights[layer].flatten(0, 1).to(logits.device, logits.dtype, non_blocking=logits.is_cuda)
        if self.unforced is not None and not self.unforced[layer]:
            return indices, weights
        if indices.shape[-1] != self.top_k:
            raise ValueError(f"unforced tokens take top_k={self.top_k} experts, the forced ones have {indices.shape[-1]}")
        router_indices, router_weights = router_choice(logits, self.top_k)
        return torch.where(unforced, router_indices, indices), torch.where(unforced, router_weights, weights)


def _intervene(intervention: Intervention, layer: int, logits: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(indices, weights) [N, k] from the caller's function, checked; weights from the logits where it returns none."""
    result = intervention(layer, logits)
    parts = result if isinstance(result, tuple) else (result, None)
    if len(parts) != 2 or not isinstance(parts[0], Tensor) or not isinstance(parts[1], Tensor | None):
        types = [type(part).__name__ for part in result] if isinstance(result, tuple) else type(result).__name__
        raise ValueError(f"layer {layer}: the routing function returned {types}, expected indices or (indices, weights)")
    indices, weights = parts
    if indices.dim() != 2 or indices.shape[0] != logits.shape[0] or not are_integers(indices):
        raise ValueError(
            f"layer {layer}: the routing function returned indices {list(indices.shape)} {indices.dtype} for logits "
            f"{list(logits.shape)}, expected integers [{logits.shape[0]}, k]"
        )
    source = f"layer {layer}: the routing function"
    if indices.shape[1] == 0:
        raise ValueError(f"{source} returned no expert: indices {list(indices.shape)}")
    indices = indices.to(logits.device).long()
    check_range(indices, num_experts, source, lowest=0)
    if weights is None:
        check_distinct(indices, source)
        return indices, chosen_weights(logits, indices)
    if weights.shape != indices.shape:
        raise ValueError(f"layer {layer}: weights {list(weights.shape)} do not fit indices {list(indices.shape)}")
    check_distinct(indices, source)
    check_weights(weights, source)
    return indices, weights.to(logits)


def _from_batch(indices: Tensor, shape: tuple[int, int]) -> Routing:
    if indices.dim() != 4:
        raise ValueError(f"routing indices as a tensor are [B, T, L, k], got {list(indices.shape)}; or give a Routing")
    if tuple(indices.shape[:2]) != shape:
        raise ValueError(f"the routing is of a batch {list(indices.shape[:2])}, the input is {list(shape)}")
    return Routing(indices.flatten(0, 1).permute(1, 0, 2), shape=(indices.shape[0], indices.shape[1]))


def _check(routing: Routing, layers: int, num_experts: int, shape: tuple[int, int], missing: int) -> None:
    if routing.tokens + missing != shape[0] * shape[1]:
        raise ValueError(
            f"the routing has {routing.tokens} tokens, the input {list(shape)} has {shape[0] * shape[1]}"
        )
    unknown = [layer for layer in routing.layers if not 0 <= layer < layers]
    if unknown:
        raise ValueError(f"the routing has layer {unknown[-1]}, the model has {layers} layers")
    check_range(routing.indices, num_experts, "the routing", lowest=UNFORCED)
    if routing.num_experts and routing.num_experts != num_experts:
        raise ValueError(f"the routing is of {routing.num_experts} experts, the model has {num_experts}")
    if routing.weights is not None:
        check_weights(routing.weights, "the routing")
