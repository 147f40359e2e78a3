"""Ready-made functions for `routing=`: (layer, logits [N, E]) -> (indices, weights) [N, k].

Each follows the router (p = softmax(logits), the k largest, weights p_e divided by their sum) with one change. Experts are a
list for every layer, or a mapping {layer: list} for some layers. Gradients reach the router through the weights. The N
tokens of a call include padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwen35moe.ops.experts import chosen_weights, router_choice
from qwen35moe.ops.precision import wide_dtype

from .forced import Intervention

_Experts = Sequence[int] | Mapping[int, Sequence[int]]


def ablate(experts: _Experts, *, top_k: int) -> Intervention:
    """Never choose these experts: each token takes the best of the others, whose weights sum to one."""

    def intervention(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ablated = _of_layer(experts, layer, logits)
        if logits.shape[-1] - ablated.numel() < top_k:
            raise ValueError(
                f"layer {layer}: without {ablated.numel()} of {logits.shape[-1]} experts there are fewer than top_k={top_k}"
            )
        indices = logits.detach().index_fill(-1, ablated, -torch.inf).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return intervention


def force(experts: _Experts, *, top_k: int) -> Intervention:
    """Every token takes these experts first, then the best of the others, k in all. Weights from the live logits."""

    def intervention(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        forced = _of_layer(experts, layer, logits)
        if forced.numel() > top_k:
            raise ValueError(f"layer {layer}: {forced.numel()} forced experts are more than top_k={top_k}")
        others = logits.detach().index_fill(-1, forced, -torch.inf).topk(top_k - forced.numel(), dim=-1).indices
        indices = torch.cat([forced.expand(logits.shape[0], -1), others], dim=-1)
        return indices, chosen_weights(logits, indices)

    return intervention


def bias(values: Tensor | Mapping[int, Tensor], *, top_k: int) -> Intervention:
    """indices = top_k(logits + b), weights from the logits without b (Wang et al. 2024, loss-free balancing). values: b [E],
    or {layer: b}."""

    def intervention(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        value = values.get(layer) if isinstance(values, Mapping) else values
        if value is None:
            return router_choice(logits, top_k)
        if value.shape != logits.shape[-1:]:
            raise ValueError(f"layer {layer}: the bias {list(value.shape)} does not fit {logits.shape[-1]} experts")
        indices = (logits.detach() + value.to(logits)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return intervention


def sample(*, top_k: int, temperature: float = 1.0, seed: int = 0) -> Intervention:
    """Draw top_k experts without replacement, in proportion to softmax(logits / temperature): the top_k of
    logits / temperature + Gumbel noise (Kool et al. 2019). Weights from the logits without noise.

    The noise is drawn on the CPU, so that a seed gives the same noise on every device; each call continues the stream.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; its limit at 0 is the router without an intervention")
    generator = torch.Generator().manual_seed(seed)

    def intervention(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        dtype = wide_dtype(logits)
        noise = -torch.empty(logits.shape, dtype=dtype).exponential_(generator=generator).log()
        indices = (logits.detach().to(dtype) / temperature + noise.to(logits.device)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return intervention


def balance(*, top_k: int, rounds: int = 32) -> Intervention:
    """Choose experts about evenly often at the highest sum of log p: indices = top_k(log p - q), with prices q [E] that
    make the load of the call's N tokens even. Weights from the logits.

    Maximise sum_ne x_ne log p_ne with sum_e x_ne = k and sum_n x_ne <= capacity = ceil(N k / E). The prices solve the dual by
    alternating updates (Sun 2025): u_n is the (k+1)-th largest of log p_n - q, then q_e the (capacity+1)-th largest of
    log p_e - u over the tokens, if positive. With ties or too few rounds the load is near the capacity, not at it.
    """

    def intervention(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.detach().to(wide_dtype(logits)).log_softmax(-1)
        tokens, experts = scores.shape
        capacity = -(-tokens * top_k // experts)
        if top_k == experts or capacity >= tokens:
            return router_choice(logits, top_k)
        price = scores.new_zeros(experts)
        for _ in range(rounds):
            last = (scores - price).topk(top_k + 1, dim=-1).values[:, -1:]
            price = (scores - last).topk(capacity + 1, dim=0).values[-1].clamp(min=0)
        indices = (scores - price).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return intervention


def _of_layer(experts: _Experts, layer: int, logits: Tensor) -> Tensor:
    """The experts of a layer, sorted and without repetition; ValueError for an expert that does not exist."""
    named = experts.get(layer, ()) if isinstance(experts, Mapping) else experts
    wrong = [expert for expert in named if not 0 <= expert < logits.shape[-1]]
    if wrong:
        raise ValueError(f"layer {layer}: there is no expert {wrong[0]}, the experts are 0 ... {logits.shape[-1] - 1}")
    return torch.tensor(sorted(set(named)), dtype=torch.long, device=logits.device)
