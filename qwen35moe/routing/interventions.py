"""Ready-made functions for `routing=`: (layer, logits [N, E]) -> (indices, weights) [N, S].

Each is the router's rule, softmax, the top_k largest, weights p_e over the sum of the chosen, with one thing changed.
Where experts are named, a list means every layer and a mapping {layer: list} those layers alone. Gradients reach the
router through the weights. The tokens of a call are those that the layers see: padding is among them.
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
    """Those experts are never chosen: each token takes the best of the others, whose weights sum to one."""

    def decide(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        gone = _of_layer(experts, layer, logits)
        if logits.shape[-1] - gone.numel() < top_k:
            raise ValueError(
                f"layer {layer}: without {gone.numel()} of {logits.shape[-1]} experts there are fewer than top_k={top_k}"
            )
        indices = logits.detach().index_fill(-1, gone, -torch.inf).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return decide


def force(experts: _Experts, *, top_k: int) -> Intervention:
    """Those experts are chosen by every token, in the first slots; the best of the others fill the rest. Weights from
    the live logits."""

    def decide(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        forced = _of_layer(experts, layer, logits)
        if forced.numel() > top_k:
            raise ValueError(f"layer {layer}: {forced.numel()} experts cannot be forced into top_k={top_k} slots")
        others = logits.detach().index_fill(-1, forced, -torch.inf).topk(top_k - forced.numel(), dim=-1).indices
        indices = torch.cat([forced.expand(logits.shape[0], -1), others], dim=-1)
        return indices, chosen_weights(logits, indices)

    return decide


def bias(values: Tensor | Mapping[int, Tensor], *, top_k: int) -> Intervention:
    """indices = top_k(logits + b), weights from the logits without b (Wang et al. 2024, loss-free balancing: a bias that
    steers the choice and does not enter the sum). values: b [E], or {layer: b}."""

    def decide(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        value = values.get(layer) if isinstance(values, Mapping) else values
        if value is None:
            return router_choice(logits, top_k)
        if value.shape != logits.shape[-1:]:
            raise ValueError(f"layer {layer}: the bias {list(value.shape)} does not fit {logits.shape[-1]} experts")
        indices = (logits.detach() + value.to(logits)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return decide


def sample(*, top_k: int, temperature: float = 1.0, seed: int = 0) -> Intervention:
    """top_k different experts drawn without replacement, one after the other in proportion to softmax(logits /
    temperature): the top_k of logits / temperature + Gumbel noise (Kool et al. 2019). Weights from the logits themselves.

    The noise is drawn on the CPU, so a seed chooses alike on every device; calls go on where the one before ended.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive; the router itself is the limit at 0")
    generator = torch.Generator().manual_seed(seed)

    def decide(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        dtype = wide_dtype(logits)
        noise = -torch.empty(logits.shape, dtype=dtype).exponential_(generator=generator).log()
        indices = (logits.detach().to(dtype) / temperature + noise.to(logits.device)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return decide


def balance(*, top_k: int, rounds: int = 32) -> Intervention:
    """The choice of the highest sum of log p in which experts are chosen about evenly often: indices =
    top_k(log p - q), with prices q [E] that make the load of the call's N tokens even. Weights from the logits.

    Maximise sum of x_ne log p_ne with sum_e x_ne = S and sum_n x_ne <= C = ceil(N S / E). The prices solve its dual, by
    turns (Sun 2025): u_n the (S+1)-th largest of log p_n - q, then q_e the (C+1)-th largest of log p_e - u over the
    tokens, if positive. Ties and the end of the rounds leave the load near C, not at it.
    """

    def decide(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.detach().to(wide_dtype(logits)).log_softmax(-1)
        tokens, experts = scores.shape
        room = -(-tokens * top_k // experts)
        if top_k == experts or room >= tokens:
            return router_choice(logits, top_k)
        price = scores.new_zeros(experts)
        for _ in range(rounds):
            last = (scores - price).topk(top_k + 1, dim=-1).values[:, -1:]
            price = (scores - last).topk(room + 1, dim=0).values[-1].clamp(min=0)
        indices = (scores - price).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return decide


def _of_layer(experts: _Experts, layer: int, logits: Tensor) -> Tensor:
    """The experts named for a layer, each once; ValueError for one that is not there."""
    named = experts.get(layer, ()) if isinstance(experts, Mapping) else experts
    wrong = [expert for expert in named if not 0 <= expert < logits.shape[-1]]
    if wrong:
        raise ValueError(f"layer {layer}: there is no expert {wrong[0]}, the experts are 0 ... {logits.shape[-1] - 1}")
    return torch.tensor(sorted(set(named)), dtype=torch.long, device=logits.device)
