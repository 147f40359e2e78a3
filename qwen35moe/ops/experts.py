"""The sparse mixture of experts: the router, and the sum over the chosen experts.

    p = softmax(W_router x);   e_1, ..., e_k: the experts with the k largest p_e;   w_j = p_{e_j} / (p_{e_1} + ... + p_{e_k})
    y = sum_j w_j expert_{e_j}(x)          expert_e(x) = down_e (silu(gate_e x) * up_e x)

Shazeer et al. 2017. Expert weights are grouped: gate_up [E, 2F, D] (gate rows first), down [E, D, F]. Each entry of the indices
[N, k] is a (token, expert) assignment.

Implementations of `experts`, fast ones in `ops.cpu`:

    loop       the definition, expert by expert
    sorted     assignments sorted by expert, one product per expert, streamed: for CPUs
    grouped    assignments sorted by expert, torch's grouped_mm, no synchronisation with the host: for GPUs
    gathered   a copy of the expert's weights for every assignment, one batched product: for very few assignments
    tapped     materialises expert_in, expert_act and expert_out, for an active tap

The sum over j runs in the order of the experts' numbers (loop, tapped; sorted where the rows of all assignments take more than
32 MB and more than a float32 sum) or of the top-k (the others), always the same for the same arguments; on a GPU, loop and
tapped need torch.use_deterministic_algorithms(True) for that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype

Tap = Callable[[str, Tensor], Tensor]  # (name, value) -> the value to use in its place


@operation
def router(hidden: Tensor, weight: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The router's logits, and the weights and indices of the experts it chooses, largest first.

    hidden [N, D], weight [E, D]; returns logits [N, E] and weights [N, k] in hidden's dtype, indices [N, k]. As in
    transformers the product is in the weights' dtype and the softmax in float32 at least.
    """
    logits = F.linear(hidden, weight)
    indices, weights = router_choice(logits, top_k)
    return logits, weights, indices


def router_choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(indices, weights) [N, k] that logits [N, E] choose, largest first; the weights of a token sum to one."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1)
    chosen, indices = probabilities.topk(top_k, dim=-1)
    return indices, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype)


def chosen_weights(logits: Tensor, indices: Tensor) -> Tensor:
    """The weights w_j [N, k] that logits [N, E] give to the experts of indices [N, k]."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1).gather(-1, indices)
    return (probabilities / probabilities.sum(-1, keepdim=True)).to(logits.dtype)


NOT_MATERIALISED = "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"


def unsupported_tap(tap: Tap | None) -> str | None:
    """The reason why an implementation that does not materialise tapped values cannot run, None without an active tap."""
    return None if tap is None else NOT_MATERIALISED


@operation(name="loop", transforms=("grad", "jvp"))
def experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """y = sum_j w_j down_{e_j} (silu(gate_{e_j} x) * up_{e_j} x), expert by expert.

    hidden [N, D], gate_up [E, 2F, D], down [E, D, F], indices e_j and weights w_j [N, k]; returns [N, D] in hidden's dtype,
    summed in float32 at least. tap: see `by_expert`.
    """
    if tap is not None:
        return tapped_experts(hidden, gate_up, down, indices, weights, tap=tap)
    dtype = wide_dtype(hidden)
    total = torch.zeros_like(hidden, dtype=dtype)
    for expert in range(gate_up.shape[0]):
        token, choice = (indices == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down[expert])
            total = total.index_add(0, token, out.to(dtype) * weights[token, choice, None].to(dtype))
    return total.to(hidden.dtype)


@experts.implementation("tapped", transforms=("grad", "jvp"))
def tapped_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """One stage after the other for all experts, so that a tap reads or replaces the rows of the layer. See `by_expert`."""

    def activate(expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up

    def project(expert: int, x: Tensor) -> Tensor:
        return F.linear(x, down[expert])

    return by_expert(hidden, indices, weights, gate_up.shape[0], activate, project, tap)


def by_expert(
    hidden: Tensor, indices: Tensor, weights: Tensor, num_experts: int, activate: Callable[[int, Tensor], Tensor],
    project: Callable[[int, Tensor], Tensor], tap: Tap | None = None,
) -> Tensor:
    """sum_j w_j project(e_j, activate(e_j, x)), the assignments sorted by expert: [N, D], see `experts`.

    activate(e, rows [rows, D]) gives [rows, F], project(e, rows [rows, F]) gives [rows, D]; they are called for experts that
    have rows. tap(name, value) receives expert_in [N k, D], expert_act [N k, F] and expert_out [N k, D], sorted by expert, and
    returns the values to use in their place.
    """
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    token = order // indices.shape[1]
    rows = hidden[token]
    rows = tap("expert_in", rows) if tap else rows
    inner = _per_expert(activate, rows, counts)
    inner = tap("expert_act", inner) if tap else inner
    out = _per_expert(project, inner, counts)
    out = tap("expert_out", out) if tap else out
    dtype = wide_dtype(hidden)
    scaled = out.to(dtype) * weights.reshape(-1)[order].to(dtype)[:, None]
    return torch.zeros_like(hidden, dtype=dtype).index_add(0, token, scaled).to(hidden.dtype)


def _per_expert(function: Callable[[int, Tensor], Tensor], rows: Tensor, counts: list[int]) -> Tensor:
    """function(expert, its rows) for every expert that has rows, concatenated."""
    parts = [function(expert, x) for expert, x in enumerate(rows.split(counts)) if x.shape[0]]
    return torch.cat(parts) if parts else function(0, rows)  # no tokens: an empty result of the right width, in the graph
