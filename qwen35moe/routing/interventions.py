"""Ready-made functions for `routing=`: (layer, logits [N, E]) -> (indices, weights) [N, k].

Each follows the router (p = softmax(logits), the k largest, weights p_e divided by their sum) with one change. Experts are a
list for every layer, or a mapping {layer: list} for some layers. Gradients reach the router through the weights. The N
tokens of a call include padding.

top_k is the model's unless it is given; another one than the model's is followed with a warning. In a forward, a layer or an
expert that the model does not have is a ValueError.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen35moe.compat import short
from qwen35moe.ops.experts import chosen_weights, router_choice
from qwen35moe.ops.precision import wide_dtype

from .forced import Intervention

_Experts = Sequence[int] | Mapping[int, Sequence[int]]
_Rule = Callable[[int, Tensor, int], tuple[Tensor, Tensor]]


class ReadyMade:
    """An intervention of this file: rule(layer, logits, top_k), and what it names of the model."""

    def __init__(self, name: str, rule: _Rule, top_k: int | None, experts: Any = ()) -> None:
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1):
            raise ValueError(f"{name}(): top_k must be a whole number of at least 1, got {short(top_k)}")
        self.name, self.rule, self.top_k = name, rule, top_k
        self.by_layer: dict[Any, Any] = dict(experts) if isinstance(experts, Mapping) else {None: experts}

    def __repr__(self) -> str:
        return f"<intervention {self.name}, top_k={self.top_k}>"

    def __call__(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.top_k is None:
            raise ValueError(f"{self.name}() without top_k takes the model's: outside a forward give top_k=")
        return self._apply(layer, logits, self.top_k)

    def bind(self, *, layers: Sequence[int], num_experts: int, top_k: int) -> Intervention:
        """The function for a model with these layers; ValueError for a layer or an expert that it does not have."""
        unknown = [layer for layer in self.by_layer if layer is not None and layer not in layers]
        if unknown:
            raise ValueError(f"{self.name}() names layer {short(unknown[0])}, the model has the layers {short(list(layers))}")
        for layer, experts in self.by_layer.items():
            checked_experts(experts, num_experts, self.name if layer is None else f"{self.name}, layer {layer}")
        k = top_k if self.top_k is None else self.top_k
        if k != top_k:
            warnings.warn(f"{self.name}(top_k={k}): the model's tokens take {top_k} experts", UserWarning, stacklevel=2)
        return lambda layer, logits: self._apply(layer, logits, k)

    def _apply(self, layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if top_k > logits.shape[-1]:
            raise ValueError(f"{self.name}(): top_k={top_k} is more than the {logits.shape[-1]} experts")
        return self.rule(layer, logits, top_k)


def ablate(experts: _Experts, *, top_k: int | None = None) -> Intervention:
    """Never choose these experts: each token takes the best of the others, whose weights sum to one."""

    def rule(layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        ablated = _of_layer(experts, layer, logits)
        if logits.shape[-1] - ablated.numel() < top_k:
            raise ValueError(
                f"layer {layer}: without {ablated.numel()} of {logits.shape[-1]} experts there are fewer than top_k={top_k}"
            )
        indices = logits.detach().index_fill(-1, ablated, -torch.inf).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return ReadyMade("ablate", rule, top_k, experts)


def force(experts: _Experts, *, top_k: int | None = None) -> Intervention:
    """Every token takes these experts first, then the best of the others, k in all. Weights from the live logits."""

    def rule(layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        forced = _of_layer(experts, layer, logits)
        if forced.numel() > top_k:
            raise ValueError(f"layer {layer}: {forced.numel()} forced experts are more than top_k={top_k}")
        others = logits.detach().index_fill(-1, forced, -torch.inf).topk(top_k - forced.numel(), dim=-1).indices
        indices = torch.cat([forced.expand(logits.shape[0], -1), others], dim=-1)
        return indices, chosen_weights(logits, indices)

    return ReadyMade("force", rule, top_k, experts)


def bias(values: Tensor | Mapping[int, Tensor], *, top_k: int | None = None) -> Intervention:
    """indices = top_k(logits + b), weights from the logits without b (Wang et al. 2024, loss-free balancing). values: b [E],
    or {layer: b}; -inf is allowed (never chosen), NaN is not."""
    by_layer = {key: _bias(b) for key, b in (values.items() if isinstance(values, Mapping) else [(None, values)])}

    def rule(layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        value = by_layer.get(layer if isinstance(values, Mapping) else None)
        if value is None:
            return router_choice(logits, top_k)
        if value.shape != logits.shape[-1:]:
            raise ValueError(f"layer {layer}: the bias {list(value.shape)} does not fit {logits.shape[-1]} experts")
        indices = (logits.detach() + value.to(logits)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return ReadyMade("bias", rule, top_k, dict.fromkeys(by_layer, ()))


def sample(*, top_k: int | None = None, temperature: float = 1.0, seed: int = 0) -> Intervention:
    """Draw top_k experts without replacement, in proportion to softmax(logits / temperature): the top_k of
    logits / temperature + Gumbel noise (Kool et al. 2019). Weights from the logits without noise.

    The noise is drawn on the CPU, so that a seed gives the same noise on every device; each call continues the stream.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be positive and finite; its limit at 0 is the router without an intervention"
        )
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a whole number of at most 64 bits, got {short(seed)}")
    generator = torch.Generator("cpu").manual_seed(int(seed))

    def rule(layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        dtype = wide_dtype(logits)
        noise = -torch.empty(logits.shape, dtype=dtype, device="cpu").exponential_(generator=generator).log()
        indices = (logits.detach().to(dtype) / temperature + noise.to(logits.device)).topk(top_k, dim=-1).indices
        return indices, chosen_weights(logits, indices)

    return ReadyMade("sample", rule, top_k)


def balance(*, top_k: int | None = None, rounds: int = 32) -> Intervention:
    """Choose experts about evenly often at the highest sum of log p: indices = top_k(log p - q), with prices q [E] that
    make the load of the call's N tokens even. Weights from the logits.

    Maximise sum_ne x_ne log p_ne with sum_e x_ne = k and sum_n x_ne <= capacity = ceil(N k / E). The prices solve the dual by
    alternating updates (Sun 2025): u_n is the (k+1)-th largest of log p_n - q, then q_e the (capacity+1)-th largest of
    log p_e - u over the tokens, if positive. With ties or too few rounds the load is near the capacity, not at it.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, numbers.Integral) or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {short(rounds)}")

    def rule(layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
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

    return ReadyMade("balance", rule, top_k)


def checked_experts(experts: Any, num_experts: int, source: str) -> list[int]:
    """The numbers of experts, sorted and without repetition; ValueError for one that does not exist."""
    if isinstance(experts, (str, bytes)) or not isinstance(experts, Iterable):
        raise ValueError(f"{source}: experts are a list of numbers, or a mapping of layers to lists, got {short(experts)}")
    numbers_ = [expert.item() if isinstance(expert, Tensor) and expert.numel() == 1 else expert for expert in experts]
    for expert in numbers_:
        if isinstance(expert, bool) or not isinstance(expert, numbers.Integral):
            raise ValueError(f"{source}: an expert is a whole number, got {short(expert)}")
        if not 0 <= int(expert) < num_experts:
            raise ValueError(f"{source}: there is no expert {expert}, the experts are 0 ... {num_experts - 1}")
    return sorted({int(expert) for expert in numbers_})


def _of_layer(experts: _Experts, layer: int, logits: Tensor) -> Tensor:
    named = experts.get(layer, ()) if isinstance(experts, Mapping) else experts
    checked = checked_experts(named, logits.shape[-1], f"layer {layer}")
    return torch.tensor(checked, dtype=torch.long, device=logits.device)


def _bias(value: Any) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"bias(): values are a tensor [E], or a mapping of layers to tensors, got {short(value)}") from None
    if tensor.is_complex() or bool(tensor.isnan().any()):
        raise ValueError(f"bias(): values {list(tensor.shape)} {tensor.dtype} hold NaN or are no real numbers")
    return tensor
