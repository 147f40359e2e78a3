"""The experts with the (token, expert) assignments sorted by expert: the form for CPUs, forward and backward.

For an assignment of a token x to an expert with weight w, where dy is the gradient of the token's y and so for other symbols:

    z = W_gate_up x          h = silu(gate) * up with gate, up = z          y = sum over the token's assignments of w W_down h

    b = W_down^T dy          dw = b . h          dh = w b          dz from dh and z
    dW_down = sum of dy (x) w h       dW_gate_up = sum of dz (x) x       dx = sum over the token's assignments of W_gate_up^T dz

Beyond its inputs the backward keeps z [N k, 2F] alone: the rows x and h are computed again, and the experts' outputs are not
needed, because dw = dy . W_down h = W_down^T dy . h (Guo et al. 2025, SonicMoE). Every product writes into a buffer or straight
into the gradient: outside products, a CPU spends its time on page faults in newly allocated memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.cpu.products import form_of, input_gradient, product, weight_gradient
from qwen35moe.ops.precision import wide_dtype

_BLOCK = 256  # rows of several experts between two passes over a buffer: a few MB, which fit in cache
_BACKWARD_BLOCK = 64  # the same in the backward, whose buffers add to the peak of memory: about 1 MB, which fit in L2
_PIECE = 1024  # rows of one expert at once: shorter pieces make slower products, longer ones touch more new memory
_KEPT = 32 << 20  # bytes of all assignments' rows up to which they are kept and summed in one pass: 0.3 ms instead of
#                   6 for 512 tokens, k = 8, D = 2048 (2 cores of Zen 4); above, new memory would cost more than that


def sorted_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: object = None
) -> Tensor:
    """Arguments and result as in `ops.experts.experts`. Reads the weights of each chosen expert once.

    Differentiable once. Synchronises with the host for the number of rows of each expert. Under torch.compile it is one
    opaque operator.
    """
    inputs = (hidden, gate_up, down, weights)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_grad or torch.compiler.is_compiling():
        return _experts(hidden, gate_up, down, indices, weights, needs_grad)[0]
    with torch.no_grad():
        form = _one_token if len(hidden) == 1 and indices.numel() else _forward
        return form(hidden, gate_up, down, indices, weights)


class Block(NamedTuple):
    """Consecutive experts and their assignments."""

    assignments: slice  # in sorted order
    parts: tuple[tuple[int, slice], ...]  # (expert, its rows within the block)

    @property
    def size(self) -> int:
        return self.assignments.stop - self.assignments.start


def sort_assignments(
    indices: Tensor, num_experts: int, block: int, piece: int | None = None
) -> tuple[Tensor, list[Block]]:
    """The assignments [N k] sorted by expert, and blocks of up to `block` rows that cover them in order.

    An expert with more rows than that is a block of its own, or several of up to `piece` rows.
    """
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise ValueError(_out_of_range(len(counts) - 1, num_experts))
    pieces = [(expert, count) for expert, count in enumerate(counts) if count]
    if piece is not None:
        pieces = [(expert, min(piece, count - n)) for expert, count in pieces for n in range(0, count, piece)]
    return flat.argsort(stable=True), list(_blocks(pieces, block))


def _blocks(pieces: Sequence[tuple[int, int]], block: int) -> Iterator[Block]:
    """pieces: (expert, number of rows), in order."""
    start = size = 0
    parts: list[tuple[int, slice]] = []
    for expert, count in pieces:
        if parts and size + count > block:
            yield Block(slice(start, start + size), tuple(parts))
            start, size, parts = start + size, 0, []
        parts.append((expert, slice(size, size + count)))
        size += count
    if parts:
        yield Block(slice(start, start + size), tuple(parts))


def _one_token(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """y [1, D]: nothing to sort, one form for all products, and the weighted sum over the experts is a product."""
    chosen = indices[0].tolist()
    for expert in chosen:
        if not 0 <= expert < gate_up.shape[0]:
            raise ValueError(_out_of_range(expert, gate_up.shape[0]))
    form = form_of(hidden, gate_up[chosen[0]])
    gate, up = torch.cat([form(hidden, gate_up[expert], None) for expert in chosen]).chunk(2, dim=-1)
    h = F.silu(gate).mul_(up).split(1)
    form = form_of(h[0], down[chosen[0]])
    out = torch.cat([form(row, down[expert], None) for expert, row in zip(chosen, h, strict=True)])
    dtype = wide_dtype(hidden)
    return torch.mm(weights.to(dtype), out.to(dtype)).to(hidden.dtype)


def _out_of_range(expert: int, num_experts: int) -> str:
    return f"indices contain expert {expert}, the experts are 0 ... {num_experts - 1}"


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, saved: Tensor | None = None
) -> Tensor:
    """y [N, D]; writes z into `saved` [N k, 2F] if it is passed."""
    (tokens, width), top_k, inner = hidden.shape, indices.shape[1], down.shape[-1]
    order, blocks = sort_assignments(indices, gate_up.shape[0], _BLOCK, _PIECE)
    dtype, assignments = wide_dtype(hidden), order.numel()
    largest = max((block.size for block in blocks), default=0)
    one_pass = _sums_in_one_pass(hidden, top_k) and weights.dtype == hidden.dtype
    token, scales = order // top_k, weights.reshape(-1)[order].to(dtype)[:, None]
    x, h = hidden.new_empty(largest, width), hidden.new_empty(largest, inner)
    z_buffer = hidden.new_empty(largest, 2 * inner) if saved is None else saved
    out = hidden.new_empty(assignments if one_pass else largest, width)
    total = None if one_pass else hidden.new_zeros(tokens, width, dtype=dtype)
    scaled = None if one_pass else hidden.new_empty(largest, width, dtype=dtype)
    for block in blocks:
        size = block.size
        z = z_buffer[:size] if saved is None else z_buffer[block.assignments]
        y = out[block.assignments] if one_pass else out[:size]
        torch.index_select(hidden, 0, token[block.assignments], out=x[:size])
        for expert, rows in block.parts:
            product(x[rows], gate_up[expert], z[rows])
        gate, up = z.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=h[:size]).mul_(up)
        for expert, rows in block.parts:
            product(h[rows], down[expert], y[rows])
        if total is not None and scaled is not None:
            total.index_add_(0, token[block.assignments], scaled[:size].copy_(y).mul_(scales[block.assignments]))
    if total is not None:
        return total.to(hidden.dtype)
    return _sum_by_token(order, out, weights)


def _sums_in_one_pass(hidden: Tensor, top_k: int) -> bool:
    """Whether the rows of all assignments are kept and summed in one pass, not added block by block to a wide sum [N, D]: if
    they take no more memory than that sum (top-2 in bfloat16), or little."""
    kept = top_k * hidden.element_size()
    return kept <= wide_dtype(hidden).itemsize or kept * hidden.numel() <= _KEPT


def _sum_by_token(order: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows [N, D], in float32, from the sorted rows of all assignments [N k, D]."""
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(weights.shape)
    if not len(order):
        return rows.new_zeros(len(weights), rows.shape[1])
    return F.embedding_bag(positions, rows, mode="sum", per_sample_weights=weights)


def _backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, saved: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, gate_up, down and weights; an empty tensor for those whose `needs_grad` is False."""
    dtype, top_k, (width, inner) = wide_dtype(hidden), indices.shape[1], down.shape[1:]
    order, blocks = sort_assignments(indices, gate_up.shape[0], _BACKWARD_BLOCK)
    token, scales = order // top_k, weights.reshape(-1)[order].to(dtype)[:, None]
    needs_hidden, needs_gate_up, needs_down, needs_weights = needs_grad
    d_gate_up, d_down = _empty_unless_needed((gate_up, down), needs_grad[1:3])
    one_pass = needs_hidden and _sums_in_one_pass(hidden, top_k)
    all_dx = hidden.new_empty(order.numel(), width) if one_pass else None  # of all assignments
    total = hidden.new_zeros(hidden.shape if needs_hidden and not one_pass else 0, dtype=dtype)
    d_scales = weights.new_zeros(order.numel(), dtype=dtype)
    _zero_unused((d_gate_up, d_down), blocks, gate_up.shape[0])
    largest = max((block.size for block in blocks), default=0)
    buffer = hidden.new_empty(largest, width)  # dy, then x, then dx
    inner_buffer, dz = (hidden.new_empty(largest, n) for n in (inner, 2 * inner))  # b, then w h
    for block in blocks:
        size, tokens = block.size, token[block.assignments]
        scale, z, d_scale = scales[block.assignments], saved[block.assignments], d_scales[block.assignments]
        block_rows, h = buffer[:size], inner_buffer[:size]
        pieces = [slice(n, min(n + _BACKWARD_BLOCK, size)) for n in range(0, size, _BACKWARD_BLOCK)]
        torch.index_select(grad, 0, tokens, out=block_rows)
        for expert, rows in block.parts:
            input_gradient(block_rows[rows], down[expert], h[rows])
        for n in pieces:
            d_scale[n] = _swiglu_backward(z[n], h[n], scale[n], dz[n])
        if needs_down:
            for expert, rows in block.parts:
                weight_gradient(block_rows[rows], h[rows], d_down[expert])
        if needs_gate_up:
            torch.index_select(hidden, 0, tokens, out=block_rows)
            for expert, rows in block.parts:
                weight_gradient(dz[rows], block_rows[rows], d_gate_up[expert])
        if needs_hidden:
            dx = block_rows if all_dx is None else all_dx[block.assignments]
            for expert, rows in block.parts:
                input_gradient(dz[rows], gate_up[expert], dx[rows])
            for n in pieces if all_dx is None else ():
                total.index_add_(0, tokens[n], dx[n].to(dtype))
    del buffer, inner_buffer, dz  # before the result in the narrower dtype is allocated
    d_weights = torch.empty_like(d_scales).scatter_(0, order, d_scales).view(indices.shape).to(weights.dtype)
    d_hidden = total.to(hidden.dtype) if all_dx is None else _sum_by_token(order, all_dx, hidden.new_ones(indices.shape))
    return d_hidden, d_gate_up, d_down, d_weights if needs_weights else weights.new_empty(0)


def _empty_unless_needed(inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Memory for the gradients of the inputs that need one, an empty tensor for the others."""
    return [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip(inputs, needs_grad, strict=True)]


def _zero_unused(grads: Sequence[Tensor], blocks: Sequence[Block], num_experts: int) -> None:
    """The gradients of experts that no token chose are zero; the others are written once, by their product."""
    chosen = {expert for block in blocks for expert, _ in block.parts}
    for grad in grads:
        if grad.numel():
            for expert in set(range(num_experts)) - chosen:
                grad[expert].zero_()


def _swiglu_backward(z: Tensor, b: Tensor, scales: Tensor, dz: Tensor) -> Tensor:
    """dw [rows] of a block from z [rows, 2F] and b [rows, F]; writes w h in place of `b` and dz into `dz` [rows, 2F]."""
    gate, up = z.to(scales.dtype).chunk(2, dim=-1)
    d_gate, d_up = dz.chunk(2, dim=-1)
    silu = F.silu(gate)
    inner = silu * up
    d_scales = torch.linalg.vecdot(b.to(scales.dtype), inner)
    d_inner = b * scales
    b.copy_(inner.mul_(scales))
    d_up.copy_(silu.mul_(d_inner))
    d_gate.copy_(torch.ops.aten.silu_backward(d_inner.mul_(up), gate))
    return d_scales


@torch.library.custom_op("qwen35moe::experts", mutates_args=())
def _experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless kept for a backward."""
    z = hidden.new_empty(indices.numel() if keep else 0, gate_up.shape[1])
    return _forward(hidden, gate_up, down, indices, weights, z if keep else None), z


@_experts.register_fake
def _experts_shapes(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(indices.numel() if keep else 0, gate_up.shape[1])


@torch.library.custom_op("qwen35moe::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, saved: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad, hidden, gate_up, down, indices, weights, saved, needs_grad)


@_experts_backward.register_fake
def _experts_backward_shapes(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, saved: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden, d_gate_up, d_down, d_weights = _empty_unless_needed((hidden, gate_up, down, weights), needs_grad)
    return d_hidden, d_gate_up, d_down, d_weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    needs_grad = [needs[0], needs[1], needs[2], needs[4]]
    gradients = _experts_backward(grad, *ctx.saved_tensors, needs_grad)
    hidden, gate_up, down, weights = (x if needed else None for x, needed in zip(gradients, needs_grad, strict=True))
    return hidden, gate_up, down, None, weights, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise ValueError("the sorted experts have no second derivative: choose backends.use(experts='loop'), which has one")


_experts.register_autograd(_gradient, setup_context=_setup)
_experts_backward.register_autograd(_no_second_gradient, setup_context=_save_nothing)
