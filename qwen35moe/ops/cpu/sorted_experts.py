"""The experts with the (token, slot) pairs sorted by expert: the form for CPUs, forward and backward.

    P = gather(x) W_gate_up^T      A = silu(P_gate) * P_up      y = sum over slots of w * (A W_down^T)

    B = gather(dy) W_down          dw = <B, A>                  dA = w B         dP from dA and P
    dW_down = dy^T (w A)           dW_gate_up = dP^T x          dx = sum over slots of dP W_gate_up

Beyond its inputs the backward keeps P [N S, 2F] alone: the gathered rows and A are made again, and the experts' outputs
are not needed, because dw = <dy, A W_down^T> = <dy W_down, A> (Guo et al. 2025, SonicMoE). Every product writes into a
buffer or straight into the gradient: outside products, a CPU spends its time on touching fresh memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype

_BLOCK = 256  # rows of several experts worked on between two passes over a buffer: a few MB, which the cache holds
_PIECE = 1024  # rows of one expert at once: shorter pieces make slower products, longer ones touch more fresh memory
_KEPT = 32 << 20  # bytes of all pairs' rows up to which they are kept and summed in one pass: 0.3 ms instead of
#                   6 for 512 tokens, S = 8, D = 2048 (2 cores of Zen 4); above, fresh memory would cost more than that
_FEW_ROWS = 64  # on CPUs with AMX, up to here weight @ rows.T streams a bfloat16 weight faster than rows @ weight.T
_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False


def sorted_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: object = None
) -> Tensor:
    """Arguments and result as in `ops.experts.loop_experts`. Each expert hit reads its weights once.

    The number of rows of each expert is read on the host. Has a backward, and no second one. Under torch.compile it
    is one operation that the compiler does not look into.
    """
    inputs = (hidden, gate_up, down, weights)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_grad or torch.compiler.is_compiling():
        return _experts(hidden, gate_up, down, indices, weights, needs_grad)[0]
    with torch.no_grad():
        form = _one_token if len(hidden) == 1 else _forward
        return form(hidden, gate_up, down, indices, weights)


class Block(NamedTuple):
    """Consecutive experts and their pairs: the pairs' places in sorted order, and (expert, first, last) within."""

    pairs: slice
    parts: tuple[tuple[int, slice], ...]


def sort_pairs(indices: Tensor, experts: int, split: bool = False) -> tuple[Tensor, list[Block]]:
    """The pairs [N S] sorted by expert, and blocks of up to _BLOCK rows that cover them in order.

    An expert with more rows than that is a block of its own; with `split` several, of up to _PIECE rows.
    """
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=experts).tolist()
    if len(counts) > experts:
        raise ValueError(f"the indices name expert {len(counts) - 1}, the experts are 0 ... {experts - 1}")
    hit = [(expert, count) for expert, count in enumerate(counts) if count]
    if split:
        hit = [(expert, min(_PIECE, count - n)) for expert, count in hit for n in range(0, count, _PIECE)]
    return flat.argsort(stable=True), list(_blocks(hit))


def _blocks(hit: Sequence[tuple[int, int]]) -> Iterator[Block]:
    start = size = 0
    parts: list[tuple[int, slice]] = []
    for expert, count in hit:
        if parts and size + count > _BLOCK:
            yield Block(slice(start, start + size), tuple(parts))
            start, size, parts = start + size, 0, []
        parts.append((expert, slice(size, size + count)))
        size += count
    if parts:
        yield Block(slice(start, start + size), tuple(parts))


def _one_token(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """y [1, D]: nothing to sort, and the sum over the slots is a product."""
    chosen, (width, inner) = indices[0].tolist(), down.shape[1:]
    _check_range(chosen, gate_up.shape[0])
    pre, out = hidden.new_empty(len(chosen), 2 * inner), hidden.new_empty(len(chosen), width)
    for expert, p in zip(chosen, pre.split(1), strict=False):
        project(hidden, gate_up[expert], p)
    gate, up = pre.chunk(2, dim=-1)
    for expert, a, y in zip(chosen, F.silu(gate).mul_(up).split(1), out.split(1), strict=False):
        project(a, down[expert], y)
    dtype = wide_dtype(hidden)
    return torch.mm(weights.to(dtype), out.to(dtype)).to(hidden.dtype)


def _check_range(chosen: Sequence[int], experts: int) -> None:
    for expert in chosen:
        if not 0 <= expert < experts:
            raise ValueError(f"the indices name expert {expert}, the experts are 0 ... {experts - 1}")


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """y [N, D]; writes P into `kept` [N S, 2F] where given."""
    (tokens, width), slots, inner = hidden.shape, indices.shape[1], down.shape[-1]
    order, blocks = sort_pairs(indices, gate_up.shape[0], split=True)
    dtype, pairs = wide_dtype(hidden), order.numel()
    largest = max((block.pairs.stop - block.pairs.start for block in blocks), default=0)
    whole = _keeps_all(hidden, slots) and weights.dtype == hidden.dtype
    rows, scales = order // slots, weights.reshape(-1)[order].to(dtype)[:, None]
    x, act = hidden.new_empty(largest, width), hidden.new_empty(largest, inner)
    pre = hidden.new_empty(largest, 2 * inner) if kept is None else kept
    out = hidden.new_empty(pairs if whole else largest, width)
    total = None if whole else hidden.new_zeros(tokens, width, dtype=dtype)
    scaled = None if whole else hidden.new_empty(largest, width, dtype=dtype)
    for block in blocks:
        size = block.pairs.stop - block.pairs.start
        p = pre[:size] if kept is None else pre[block.pairs]
        y = out[block.pairs] if whole else out[:size]
        torch.index_select(hidden, 0, rows[block.pairs], out=x[:size])
        for expert, part in block.parts:
            project(x[part], gate_up[expert], p[part])
        gate, up = p.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=act[:size]).mul_(up)
        for expert, part in block.parts:
            project(act[part], down[expert], y[part])
        if total is not None and scaled is not None:
            total.index_add_(0, rows[block.pairs], scaled[:size].copy_(y).mul_(scales[block.pairs]))
    if total is not None:
        return total.to(hidden.dtype)
    return _summed(order, out, weights)


def _keeps_all(hidden: Tensor, slots: int) -> bool:
    """Whether the rows of all pairs are kept and summed in one pass, not added block by block to a wide sum [N, D].

    They are where they take no more memory than that sum (two slots of bfloat16), or little.
    """
    kept = slots * hidden.element_size()
    return kept <= wide_dtype(hidden).itemsize or kept * hidden.numel() <= _KEPT


def _summed(order: Tensor, out: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows [N, D], summed in float32, from the rows of all pairs [N S, D], sorted."""
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(weights.shape)
    if not len(order):
        return out.new_zeros(len(weights), out.shape[1])
    return F.embedding_bag(places, out, mode="sum", per_sample_weights=weights)


def _backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, gate_up, down and weights; an empty tensor for those that are not `wanted`."""
    dtype, slots, (width, inner) = wide_dtype(hidden), indices.shape[1], down.shape[1:]
    order, blocks = sort_pairs(indices, gate_up.shape[0])
    rows, scales = order // slots, weights.reshape(-1)[order].to(dtype)[:, None]
    to_hidden, to_gate_up, to_down, to_weights = wanted
    grads = [torch.empty_like(x) if want else x.new_empty(0) for x, want in zip((gate_up, down), wanted[1:3], strict=True)]
    whole = to_hidden and _keeps_all(hidden, slots)
    every = hidden.new_empty(order.numel(), width) if whole else None  # dx of all pairs
    total = hidden.new_zeros(hidden.shape if to_hidden and not whole else 0, dtype=dtype)
    by_pair = weights.new_zeros(order.numel(), dtype=dtype)
    _zero_unhit(grads, blocks, gate_up.shape[0])
    largest = max((block.pairs.stop - block.pairs.start for block in blocks), default=0)
    shared = hidden.new_empty(largest, width)  # dy until it has been used, then x, then dx
    back, act, dp = (hidden.new_empty(largest, n) for n in (inner, inner, 2 * inner))
    wide = hidden.new_empty(min(_BLOCK, largest) if total.numel() else 0, width, dtype=dtype)
    for block in blocks:
        size, row, scale, p = block.pairs.stop - block.pairs.start, rows[block.pairs], scales[block.pairs], pre[block.pairs]
        some, pieces = shared[:size], [slice(n, min(n + _BLOCK, size)) for n in range(0, size, _BLOCK)]
        torch.index_select(grad, 0, row, out=some)
        for expert, part in block.parts:
            torch.mm(some[part], down[expert], out=back[part])
        for n in pieces:
            by_pair[block.pairs][n] = _swiglu_backward(p[n], back[n], scale[n], act[n], dp[n])
        if to_down:
            for expert, part in block.parts:
                torch.mm(some[part].t(), act[part], out=grads[1][expert])
        if to_gate_up:
            torch.index_select(hidden, 0, row, out=some)
            for expert, part in block.parts:
                torch.mm(dp[part].t(), some[part], out=grads[0][expert])
        if to_hidden:
            dx = some if every is None else every[block.pairs]
            for expert, part in block.parts:
                torch.mm(dp[part], gate_up[expert], out=dx[part])
            for n in pieces if every is None else ():
                total.index_add_(0, row[n], wide[: n.stop - n.start].copy_(dx[n]))
    by_slot = torch.empty_like(by_pair).scatter_(0, order, by_pair).view(indices.shape).to(weights.dtype)
    to_x = total.to(hidden.dtype) if every is None else _summed(order, every, hidden.new_ones(indices.shape))
    return to_x, grads[0], grads[1], by_slot if to_weights else weights.new_empty(0)


def _zero_unhit(grads: Sequence[Tensor], blocks: Sequence[Block], experts: int) -> None:
    """Experts that nobody chose have gradient zero; the others' gradients are written once, by their product."""
    hit = {expert for block in blocks for expert, _ in block.parts}
    for grad in grads:
        if grad.numel():
            for expert in set(range(experts)) - hit:
                grad[expert].zero_()


def _swiglu_backward(pre: Tensor, back: Tensor, scales: Tensor, act: Tensor, dp: Tensor) -> Tensor:
    """dw [n] of a block from P [n, 2F] and B [n, F]; writes w A into `act` [n, F] and dP into `dp` [n, 2F]."""
    gate, up = pre.to(scales.dtype).chunk(2, dim=-1)
    to_gate, to_up = dp.chunk(2, dim=-1)
    silu = F.silu(gate)
    inner = silu * up
    wide = back.to(scales.dtype)
    by_pair = torch.linalg.vecdot(wide, inner)
    act.copy_(inner.mul_(scales))
    wide.mul_(scales)
    to_up.copy_(silu.mul_(wide))
    to_gate.copy_(torch.ops.aten.silu_backward(wide.mul_(up), gate))
    return by_pair


def project(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows @ weight.T, in the order that reads a bfloat16 weight fastest on this CPU: [n, D], [F, D] -> [n, F].

    With AMX one row takes 23-26 GB/s by mv and up to 64 as weight @ rows.T, against 17-21 the other way round. Without
    (AVX-512 alone) the plain product is the fastest for every number of rows: 11-14 GB/s of 14.
    """
    if not _AMX or rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or rows.shape[0] > _FEW_ROWS:
        torch.mm(rows, weight.t(), out=out)
    elif rows.shape[0] == 1:
        torch.mv(weight, rows[0], out=out[0])
    else:
        out.copy_((weight @ rows.T).T)


@torch.library.custom_op("qwen35moe::experts", mutates_args=())
def _experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, P); P is empty unless kept for a backward."""
    pre = hidden.new_empty(indices.numel() if keep else 0, gate_up.shape[1])
    return _forward(hidden, gate_up, down, indices, weights, pre if keep else None), pre


@_experts.register_fake
def _experts_shapes(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(indices.numel() if keep else 0, gate_up.shape[1])


@torch.library.custom_op("qwen35moe::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad, hidden, gate_up, down, indices, weights, pre, wanted)


@_experts_backward.register_fake
def _experts_backward_shapes(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        torch.empty_like(x) if want else x.new_empty(0)
        for x, want in zip((hidden, gate_up, down, weights), wanted, strict=True)
    )
    return first, second, third, fourth


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[4]]
    found = _experts_backward(grad, *ctx.saved_tensors, wanted)
    hidden, gate_up, down, weights = (g if want else None for g, want in zip(found, wanted, strict=True))
    return hidden, gate_up, down, None, weights, None


def _remember_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise ValueError("the sorted experts have no second derivative: choose backends.use(experts='loop'), which has")


_experts.register_autograd(_gradient, setup_context=_setup)
_experts_backward.register_autograd(_no_second_gradient, setup_context=_remember_nothing)
