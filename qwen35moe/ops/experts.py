"""The sparse mixture of experts: the router, and the sum over the chosen experts.

    p = softmax(W_r x),  chosen = the S largest,  w_e = p_e / sum of the chosen
    y = sum over chosen e of w_e * down_e (silu(gate_e x) * up_e x)

Shazeer et al. 2017. Expert weights are grouped: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype

Watch = Callable[[str, Tensor], Tensor]  # shown a value by name, returns what is to be used in its place

_FEW_ROWS = 64  # on CPUs with AMX, up to here weight @ rows.T streams a bfloat16 weight faster than rows @ weight.T
_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


def router(hidden: Tensor, weight: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The router's logits, and the weights and indices of the experts it chooses, largest first.

    hidden [N, D], weight [E, D]; returns logits [N, E] and weights [N, S] in hidden's dtype, indices [N, S]. As in
    transformers the product is in the weights' dtype and the softmax in float32 at least.
    """
    logits = F.linear(hidden, weight)
    indices, weights = router_choice(logits, top_k)
    return logits, weights, indices


def router_choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(indices, weights) [N, S] that logits [N, E] choose, largest first."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1)
    chosen, indices = probabilities.topk(top_k, dim=-1)
    return indices, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype)


def chosen_weights(logits: Tensor, indices: Tensor) -> Tensor:
    """The weights [N, S] that logits [N, E] give to experts chosen elsewhere: p_e over the sum of the chosen."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1).gather(-1, indices)
    return (probabilities / probabilities.sum(-1, keepdim=True)).to(logits.dtype)


def loop_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The definition, expert by expert.

    hidden [N, D], gate_up [E, 2F, D], down [E, D, F], indices [N, S], weights [N, S]; returns [N, D] in hidden's
    dtype, summed in float32 at least.
    """
    dtype = wide_dtype(hidden)
    total = torch.zeros_like(hidden, dtype=dtype)
    for expert in range(gate_up.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down[expert])
            total = total.index_add(0, token, out.to(dtype) * weights[token, slot, None].to(dtype))
    return total.to(hidden.dtype)


def sorted_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same with the (token, slot) pairs sorted by expert, so that each expert hit sees its rows once.

    Arguments and result as in the definition. The weights of a layer are split into its experts once: indexing them
    one by one would make the backward fill a whole zero gradient per expert.
    """
    dtype, slots = wide_dtype(hidden), indices.shape[1]
    if hidden.shape[0] == 1:  # nothing to sort
        outs = [one_expert(hidden, gate_up[expert], down[expert]) for expert in indices[0].tolist()]
        return (weights.to(dtype) @ torch.cat(outs).to(dtype)).to(hidden.dtype)
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    scales = weights.reshape(-1)[order].to(dtype)[:, None]
    total = torch.zeros_like(hidden, dtype=dtype)
    gate_ups, downs = gate_up.unbind(0), down.unbind(0)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            rows = order[pairs] // slots
            out = one_expert(hidden.index_select(0, rows), gate_ups[expert], downs[expert])
            total = total.index_add_(0, rows, out.to(dtype).mul(scales[pairs]))
            start += count
    return total.to(hidden.dtype)


def grouped_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same through torch's grouped_mm: no number of rows is read on the host, so it can be compiled whole.

    Arguments and result as in the definition.
    """
    dtype, experts, slots = wide_dtype(hidden), gate_up.shape[0], indices.shape[1]
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(experts, device=flat.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(hidden[order // slots], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    scaled = out.to(dtype) * weights.reshape(-1)[order].to(dtype)[:, None]
    return torch.zeros_like(hidden, dtype=dtype).index_add(0, order // slots, scaled).to(hidden.dtype)


def _cannot_group(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> str | None:
    if watch is not None:
        return _UNSEEN
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"grouped_mm takes float32 and bfloat16, hidden is {hidden.dtype}"
    widths = hidden.shape[-1], down.shape[-1]
    if any(width * hidden.element_size() % 16 for width in widths):
        return f"grouped_mm needs rows of whole 16 bytes, the widths are {widths[0]} and {widths[1]} of {hidden.dtype}"
    return None


@torch.library.custom_op("qwen35moe::experts", mutates_args=())
def _opaque(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`sorted_experts` as one operation that torch.compile does not look into: inside, rows are counted on the host."""
    return sorted_experts(hidden, gate_up, down, indices, weights)


@_opaque.register_fake
def _opaque_shape(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("qwen35moe::experts_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (hidden, gate_up, down, weights)]
        out = sorted_experts(inputs[0], inputs[1], inputs[2], indices, inputs[3])
        grads = torch.autograd.grad(out, inputs, grad)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous(), grads[3].contiguous()


@_opaque_backward.register_fake
def _opaque_backward_shape(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(gate_up), torch.empty_like(down), torch.empty_like(weights)


def _opaque_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _opaque_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, gate_up, down, weights = _opaque_backward(grad, *ctx.saved_tensors)
    return hidden, gate_up, down, None, weights


_opaque.register_autograd(_opaque_gradient, setup_context=_opaque_setup)


def opaque_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """`sorted_experts` for a graph that is being compiled. Arguments and result as in the definition."""
    return _opaque(hidden, gate_up, down, indices, weights)


_UNSEEN = "somebody listens to expert_in, expert_act or expert_out, which it never forms whole"


def _shows_nothing(*args: Tensor, watch: Watch | None = None) -> str | None:
    return None if watch is None else _UNSEEN


def _cannot_be_opaque(*args: Tensor, watch: Watch | None = None) -> str | None:
    if watch is None and not torch.compiler.is_compiling():
        return "nothing is being compiled, and it would only add a call"
    return _shows_nothing(*args, watch=watch)


def _cannot_sort(*args: Tensor, watch: Watch | None = None) -> str | None:
    if torch.compiler.is_compiling():
        return "it counts rows on the host, where a compiled graph breaks"
    return _shows_nothing(*args, watch=watch)


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value


def watched_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same, showing watch(name, value) the rows of all experts, those of one after those of the one before.

    expert_in [R, D], expert_act [R, F] and expert_out [R, D] with R = N S; what watch returns is used.
    """
    watch = watch or _unchanged
    flat, slots = indices.reshape(-1), indices.shape[1]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    rows = watch("expert_in", hidden[order // slots]).split(counts)
    acts = []
    for x, weight in zip(rows, gate_up.unbind(0), strict=False):
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        acts.append(F.silu(gate) * up)
    inner = watch("expert_act", torch.cat(acts)).split(counts)
    out = watch("expert_out", torch.cat([F.linear(x, weight) for x, weight in zip(inner, down.unbind(0), strict=False)]))
    dtype = wide_dtype(hidden)
    scaled = out.to(dtype) * weights.reshape(-1)[order].to(dtype)[:, None]
    return torch.zeros_like(hidden, dtype=dtype).index_add(0, order // slots, scaled).to(hidden.dtype)


def one_expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down (silu(gate rows) * up rows) for rows [n, D] of one expert, gate_up [2F, D], down [D, F]."""
    gate, up = project(rows, gate_up).chunk(2, dim=-1)
    return project(F.silu(gate) * up, down)


def project(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, in the order that reads a bfloat16 weight fastest on this CPU: [n, D], [F, D] -> [n, F].

    With AMX one row takes 23-26 GB/s by mv against 17-21 by F.linear; without (AVX-512 alone), F.linear is the fastest.
    """
    if not _AMX or rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or rows.shape[0] > _FEW_ROWS:
        return F.linear(rows, weight)
    if rows.shape[0] == 1:
        return torch.mv(weight, rows[0])[None]
    return (weight @ rows.T).T


def _router_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for tokens, width, experts, top_k in ((7, 12, 5, 2), (1, 8, 16, 4)):
        hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(experts, width, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (hidden, weight), {"top_k": top_k}


def _expert_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for tokens, width, inner, experts, top_k in ((7, 12, 5, 6, 2), (1, 8, 3, 4, 4), (70, 16, 8, 3, 1), (9, 24, 16, 5, 2)):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        scores = torch.rand(tokens, experts, generator=generator)
        indices = scores.topk(top_k, dim=-1).indices.to(device)
        weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(device, dtype)
        tensors = random(tokens, width), random(experts, 2 * inner, width), random(experts, width, inner)
        yield (*tensors, indices, weights), {}


backends.register("router", "torch", router)
backends.add_cases("router", router, _router_cases)
backends.register("experts", "torch", sorted_experts, _cannot_sort)
backends.register("experts", "opaque", opaque_experts, _cannot_be_opaque)
backends.register("experts", "grouped", grouped_experts, _cannot_group)
backends.register("experts", "loop", loop_experts, _shows_nothing)
backends.register("experts", "watched", watched_experts)
backends.add_cases("experts", loop_experts, _expert_cases)
