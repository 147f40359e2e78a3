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

from qwen35moe.ops.cpu.products import Form, form_of, input_gradient, weight_gradient
from qwen35moe.ops.precision import wide_dtype

_BLOCK = 256  # rows of several experts between two passes over a buffer: a few MB, which fit in cache
_BACKWARD_BLOCK = 64  # the same in the backward, whose buffers add to the peak of memory: about 1 MB
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
    experts: list[int]
    sizes: list[int]  # the number of rows of each of these experts

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
    parts: list[tuple[int, int]] = []
    for expert, count in pieces:
        if parts and size + count > block:
            yield _block(start, size, parts)
            start, size, parts = start + size, 0, []
        parts.append((expert, count))
        size += count
    if parts:
        yield _block(start, size, parts)


def _block(start: int, size: int, parts: Sequence[tuple[int, int]]) -> Block:
    return Block(slice(start, start + size), [expert for expert, _ in parts], [count for _, count in parts])


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
    forms: tuple[dict[int, Form], dict[int, Form]] = {}, {}
    for block in blocks:
        size = block.size
        z = z_buffer[:size] if saved is None else z_buffer[block.assignments]
        y = out[block.assignments] if one_pass else out[:size]
        torch.index_select(hidden, 0, token[block.assignments], out=x[:size])
        _multiply(block, x[:size], gate_up, z, forms[0])
        gate, up = z.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=h[:size]).mul_(up)
        _multiply(block, h[:size], down, y, forms[1])
        if total is not None and scaled is not None:
            total.index_add_(0, token[block.assignments], scaled[:size].copy_(y).mul_(scales[block.assignments]))
    if total is not None:
        return total.to(hidden.dtype)
    return _sum_by_token(order, out, weights)


def _multiply(block: Block, x: Tensor, weights: Tensor, out: Tensor, forms: dict[int, Form]) -> None:
    """Write x W^T into `out` for the rows of each expert of a block; `forms` keeps the form of each number of rows."""
    for expert, n, rows, result in zip(block.experts, block.sizes, x.split(block.sizes), out.split(block.sizes), strict=True):
        weight, form = weights[expert], forms.get(n)
        if form is None:
            form = forms[n] = form_of(rows, weight)
        form(rows, weight, result)


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


class _Inputs(NamedTuple):
    """The values behind the gradients of a block; the last three are in sorted order."""

    grad: Tensor
    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    saved: Tensor  # z [N k, 2F]
    token: Tensor  # [N k]
    scales: Tensor  # [N k, 1]


class _Gradients(NamedTuple):
    """Memory for the results; None for one not needed. Rows of dx [N k, D] are summed at the end, or added to `total`."""

    gate_up: Tensor | None
    down: Tensor | None
    scales: Tensor  # [N k]
    dx: Tensor | None
    total: Tensor | None  # [N, D], float32 at least


def _backward(
    grad: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, saved: Tensor,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, gate_up, down and weights; an empty tensor for those whose `needs_grad` is False."""
    dtype, top_k, (width, inner) = wide_dtype(hidden), indices.shape[1], down.shape[1:]
    order, blocks = sort_assignments(indices, gate_up.shape[0], _BACKWARD_BLOCK)
    needs_hidden, needs_gate_up, needs_down, needs_weights = needs_grad
    d_gate_up, d_down = _empty_unless_needed((gate_up, down), needs_grad[1:3])
    _zero_unused((d_gate_up, d_down), blocks, gate_up.shape[0])
    one_pass = _sums_in_one_pass(hidden, top_k)
    inputs = _Inputs(grad, hidden, gate_up, down, saved, order // top_k, weights.reshape(-1)[order].to(dtype)[:, None])
    results = _Gradients(
        d_gate_up if needs_gate_up else None, d_down if needs_down else None, weights.new_zeros(order.numel(), dtype=dtype),
        hidden.new_empty(order.numel(), width) if needs_hidden and one_pass else None,
        hidden.new_zeros(hidden.shape, dtype=dtype) if needs_hidden and not one_pass else None,
    )  # fmt: skip
    largest = max((block.size for block in blocks), default=0)
    buffers = [hidden.new_empty(largest, n) for n in (width, inner, 2 * inner)]
    for block in blocks:
        _block_backward(block, inputs, results, *(buffer[: block.size] for buffer in buffers))
    del buffers  # before the gradient of hidden in its own dtype is allocated
    d_hidden = hidden.new_empty(0) if results.total is None else results.total.to(hidden.dtype)
    if results.dx is not None:
        d_hidden = _sum_by_token(order, results.dx, hidden.new_ones(indices.shape))
    d_weights = torch.empty_like(results.scales).scatter_(0, order, results.scales).view(indices.shape).to(weights.dtype)
    return d_hidden, d_gate_up, d_down, d_weights if needs_weights else weights.new_empty(0)


def _block_backward(block: Block, inputs: _Inputs, results: _Gradients, rows: Tensor, h: Tensor, dz: Tensor) -> None:
    """The gradients of a block in the buffers rows [n, D] (dy, then x, then dx), h [n, F] (b, then w h) and dz [n, 2F]."""
    tokens, scales, z = (x[block.assignments] for x in (inputs.token, inputs.scales, inputs.saved))
    pieces = [slice(n, min(n + _BACKWARD_BLOCK, block.size)) for n in range(0, block.size, _BACKWARD_BLOCK)]
    by_expert, h_by_expert, dz_by_expert = (x.split(block.sizes) for x in (rows, h, dz))
    torch.index_select(inputs.grad, 0, tokens, out=rows)
    for expert, dy, b in zip(block.experts, by_expert, h_by_expert, strict=True):
        input_gradient(dy, inputs.down[expert], b)
    d_scales = results.scales[block.assignments]
    for n in pieces:
        d_scales[n] = _swiglu_backward(z[n], h[n], scales[n], dz[n])
    if results.down is not None:
        for expert, dy, wh in zip(block.experts, by_expert, h_by_expert, strict=True):
            weight_gradient(dy, wh, results.down[expert])
    if results.gate_up is not None:
        torch.index_select(inputs.hidden, 0, tokens, out=rows)
        for expert, x, d in zip(block.experts, by_expert, dz_by_expert, strict=True):
            weight_gradient(d, x, results.gate_up[expert])
    if results.dx is None and results.total is None:
        return
    dx = rows if results.dx is None else results.dx[block.assignments]
    for expert, d, out in zip(block.experts, dz_by_expert, dx.split(block.sizes), strict=True):
        input_gradient(d, inputs.gate_up[expert], out)
    if results.total is not None:
        for n in pieces:
            results.total.index_add_(0, tokens[n], dx[n].to(results.total.dtype))


def _empty_unless_needed(inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Memory for the gradients of the inputs that need one, an empty tensor for the others."""
    return [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in zip(inputs, needs_grad, strict=True)]


def _zero_unused(grads: Sequence[Tensor], blocks: Sequence[Block], num_experts: int) -> None:
    """The gradients of experts that no token chose are zero; the others are written once, by their product."""
    chosen = {expert for block in blocks for expert in block.experts}
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
