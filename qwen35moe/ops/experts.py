"""The sparse mixture of experts: the router, and the sum over the chosen experts.

    p = softmax(W_r x),  chosen = the k largest,  w_e = p_e / sum of the chosen
    y = sum over chosen e of w_e * down_e (silu(gate_e x) * up_e x)

Shazeer et al. 2017. Expert weights are grouped: gate_up [E, 2F, D] (gate rows first), down [E, D, F]. A (token, expert)
assignment is one entry of the indices [N, k].

Implementations of `experts`, fast ones in `ops.cpu`:

    loop       the definition, expert by expert
    sorted     assignments sorted by expert, one product per expert, streamed: for CPUs
    grouped    assignments sorted by expert, torch's grouped_mm, nothing read on the host: for GPUs
    gathered   a copy of the chosen weights for every assignment, one batched product: for very few assignments
    tapped     materialises the values inside, for an active tap

A token's experts are added in the order of their numbers (loop, tapped; sorted where the rows of all assignments take more
than 32 MB and more than a float32 sum) or of its top-k (the others), always the same for the same arguments; on a GPU, loop
and tapped need torch.use_deterministic_algorithms(True) for that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype

Tap = Callable[[str, Tensor], Tensor]  # receives a value by name, returns the value to use in its place


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
    """The weights [N, k] that logits [N, E] give to experts chosen elsewhere: p_e over the sum of the chosen."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1).gather(-1, indices)
    return (probabilities / probabilities.sum(-1, keepdim=True)).to(logits.dtype)


NOT_MATERIALISED = "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"


def unsupported_tap(*args: Tensor, tap: Tap | None = None) -> str | None:
    """Why an implementation that does not materialise the values inside cannot run: an active tap reads them."""
    return None if tap is None else NOT_MATERIALISED


@operation(name="loop")
def experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """y = sum over chosen e of w_e * down_e (silu(gate_e x) * up_e x), expert by expert.

    hidden [N, D], gate_up [E, 2F, D], down [E, D, F], indices and weights [N, k]; returns [N, D] in hidden's dtype, summed
    in float32 at least. tap receives the values inside, as in `by_expert`.
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


@experts.implementation("tapped")
def tapped_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Tap | None = None
) -> Tensor:
    """All experts stage by stage, so that a tap reads or replaces the rows of a whole layer. See `by_expert`."""

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
    """sum over chosen e of w_e * project(e, activate(e, x)), the assignments sorted by expert: [N, D], see `experts`.

    activate(e, rows [n, D]) gives [n, F], project(e, rows [n, F]) gives [n, D]; only experts that have rows are called.
    tap(name, value) receives expert_in [N k, D], expert_act [N k, F] and expert_out [N k, D], the rows of one expert after
    those of the one before, and returns what is used in their place.
    """
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    token = order // indices.shape[1]
    rows = hidden[token]
    rows = tap("expert_in", rows) if tap else rows
    inner = _each_expert(activate, rows, counts)
    inner = tap("expert_act", inner) if tap else inner
    out = _each_expert(project, inner, counts)
    out = tap("expert_out", out) if tap else out
    dtype = wide_dtype(hidden)
    scaled = out.to(dtype) * weights.reshape(-1)[order].to(dtype)[:, None]
    return torch.zeros_like(hidden, dtype=dtype).index_add(0, token, scaled).to(hidden.dtype)


def _each_expert(function: Callable[[int, Tensor], Tensor], rows: Tensor, counts: list[int]) -> Tensor:
    """function(expert, its rows) for every expert that has rows, end to end."""
    parts = [function(expert, x) for expert, x in enumerate(rows.split(counts)) if x.shape[0]]
    return torch.cat(parts) if parts else function(0, rows)  # without a token: the right width, on the graph
