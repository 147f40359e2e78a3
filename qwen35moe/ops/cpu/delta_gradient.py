r"""The gated delta rule with a backward that fits: it keeps the inputs and one memory per block of chunks, nothing else.

The backward goes through the blocks from the last to the first and computes each one's forward again. With the letters of
`ops.delta_rule_chunks`, G the gradient of the memory behind a chunk and * entry by entry, a chunk gives back

    dW = P^T dO + t K G                     dY = X^T dW          (W = X Y, Y = beta U)
    dV = dU = beta dY                       dS = d_C G + Q^T (d dO) - K^T (d dU)
    dP = dO W^T                             dA = -dY W^T         (both lower triangular, dA strictly)
    dQ = (d dO) S^T + (dP * D) K
    dK = -(d dU) S^T + (t W) G^T + (dP * D)^T Q + M K + M^T K           M = beta dA * D
    dbeta_i = dY_i . U_i + sum_j (dA * D * K K^T)_ij
    dD = dP * Q K^T + beta dA * K K^T below the diagonal, and in its last row (K G)_j . W_j more for t_j

and to the decay of token m, which lies in D_ij for i >= m > j and in d_i for i >= m,

    sum_{i >= m > j} (dD * D)_ij + sum_{i >= m} d_i dd_i        dd_i = dO_i . (Q S)_i - dU_i . (K S)_i,   dd_C + G . S

The diagonal of D is the constant 1 and no sum is a difference of two longer ones, so that a gate behind which nothing is
left gets a gradient of nothing. At 35B shapes that is 16 KiB of inputs and 16 KiB of memories per token and layer.

The forward and the backward are one `torch.library` operator each: `torch.compile` and `torch.export` see two calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35moe.ops.cpu.delta_chunks import (
    Corrections,
    Inside,
    Plan,
    apart,
    chunked_forward,
    inside,
    one_after_another,
    plan,
    side_by_side,
    sizes,
)
from qwen35moe.ops.precision import wide_dtype, without_autocast


@without_autocast
def chunked_backward(
    d_output: Tensor | None, d_memory: Tensor | None, boundaries: Tensor, query: Tensor, key: Tensor, value: Tensor,
    decay: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, decay, beta and of the memory before the first token [rows, H, K, V].

    boundaries [blocks, N, K, R*V]: the memory before each block, from `chunked_forward`.
    """
    chunks, groups, dtype, out = plan(key, value, cu_seqlens, chunk), key.shape[2], boundaries.dtype, value.shape[-1]
    empty = boundaries.new_zeros(_rows(key, cu_seqlens), groups, *boundaries.shape[2:])
    befores = empty if state is None else side_by_side(state, groups, dtype)
    gradient = empty.clone() if d_memory is None else side_by_side(d_memory, groups, dtype)
    given = (query, key, value, decay, beta)
    found = tuple(x.new_empty(x.shape[0], chunks.tokens, *x.shape[2:]) for x in given)
    work = None
    for index, (first, last) in reversed(list(enumerate(chunks.blocks()))):
        part = inside(chunks, first, last, *given)
        if work is None or work.room < last - first:
            work = _Block(part)
        work.forward_again(part, chunks, first, boundaries[index], befores)
        work.backward(part, chunks, first, _cotangent(part, chunks, first, last, d_output), gradient)
        for x, into in zip(work.gradients(part), found, strict=True):
            chunks.put(x.reshape(last - first, key.shape[0], into.shape[2], chunks.chunk, *into.shape[3:]), first, into)
    return *(chunks.gathered(x) for x in found), one_after_another(gradient, out)


def _cotangent(part: Inside, chunks: Plan, first: int, last: int, d_output: Tensor | None) -> Tensor:
    """dO [n, N, R, C, V] of a block, zero in gaps."""
    if d_output is None:
        return torch.zeros_like(part.v)
    taken = chunks.take(d_output, first, last)
    d_out = part.v.new_empty(taken.shape).copy_(taken)
    there = chunks.mask(first, last)
    if there is not None:
        d_out *= there[..., None]
    return d_out.view_as(part.v)


class _Block:
    """One block's backward, in memory that the next block uses again.

    memories = S, gradients_behind = G [n, N, K, R*V]; echo = K G, d_write = dW, d_solved = dY [n, N, R, C, V]; spread
    [n, N, 2C, R*V]: d dO above -d dU.
    """

    def __init__(self, part: Inside) -> None:
        self.room, rows, each, size, out = part.v.shape
        width = part.qk.shape[-1]
        self.memories, self.behind = (part.v.new_empty(self.room, rows, width, each * out) for _ in range(2))
        self.corrections = Corrections(part, self.room)
        self.spread, self.echo = torch.empty_like(self.corrections.reads), torch.empty_like(self.corrections.brought)
        self.d_write, self.d_solved = (torch.empty_like(part.v) for _ in range(2))
        self.d_query, self.d_system = (torch.empty_like(part.between) for _ in range(2))
        self.d_qk, self.d_scores = torch.empty_like(part.qk), torch.empty_like(part.scores)

    def forward_again(self, part: Inside, chunks: Plan, first: int, before: Tensor, befores: Tensor) -> None:
        """The memory before every chunk, from the one before the block; `befores`: those before each document."""
        solve = part.inverse * part.beta[..., None, :]
        count = len(part.v)
        for c in range(count):
            if c == 0:
                self.memories[0] = before
            elif not chunks.continues(first + c):
                self.memories[c] = chunks.row(befores, first + c)
            after = self.memories[c + 1] if c + 1 < count and chunks.continues(first + c + 1) else None
            self.corrections.one_chunk(part, c, solve[c], self.memories[c], after, c)

    def backward(self, part: Inside, chunks: Plan, first: int, d_out: Tensor, gradient: Tensor) -> None:
        """The gradient of the memory, chunk by chunk from the last; `gradient` holds it behind the block, then before it."""
        count, _, each, size, _ = part.v.shape
        by_query, by_key = apart(self.spread[:count], each).chunk(2, dim=-2)
        torch.mul(d_out, part.since_start[..., None], out=by_query)
        scale = (part.since_start * part.beta).neg_()[..., None]
        attend = (part.between * part.halves[0]).flatten(1, 2)
        for c in reversed(range(count)):
            if c == count - 1 or not chunks.continues(first + c + 1):
                self.behind[c] = chunks.row(gradient, first + c)
            torch.bmm(part.qk[c, :, size:], self.behind[c], out=self.echo[c])
            torch.mul(apart(self.echo[c], each), part.to_end[c][..., None], out=self.d_write[c])
            self.d_write[c].flatten(0, 1).baddbmm_(attend[c].mT, d_out[c].flatten(0, 1))
            inverse, solved = part.inverse[c].flatten(0, 1), self.d_solved[c]
            torch.bmm(inverse.mT, self.d_write[c].flatten(0, 1), out=solved.flatten(0, 1))
            torch.mul(solved, scale[c], out=by_key[c])
            before = self.behind[c - 1] if c > 0 and chunks.continues(first + c) else chunks.row(gradient, first + c)
            kept = part.since_start[c, :, None, :, -1:]
            torch.mul(self.behind[c].unflatten(-1, (each, -1)), kept, out=before.unflatten(-1, (each, -1)))
            before.baddbmm_(part.qk[c].mT, self.spread[c])
        self.d_out = d_out

    def gradients(self, part: Inside) -> tuple[Tensor, ...]:
        """dQ, dK as given [n, N, C, K], dV [n, N, R, C, V], ddecay, dbeta [n, N, R, C] of all chunks of the block.

        Uses up what the two passes have left: products are written over the factor that is not needed again.
        """
        done, n = self.corrections, slice(0, len(part.v))
        write, solved = done.write[n].flatten(0, 2), self.d_solved[n]
        d_query, d_system = self.d_query[n], self.d_system[n]
        torch.bmm(self.d_out.flatten(0, 2), write.mT, out=d_query.flatten(0, 2))
        torch.bmm(solved.flatten(0, 2), write.mT, out=d_system.flatten(0, 2))
        d_query *= part.between
        d_system *= part.between.tril(-1).neg_()
        d_beta = done.wanted[n].mul_(solved).sum(-1) + (d_system * part.halves[1]).sum(-1)
        d_system *= part.beta[..., None]
        d_query_key = self._of_queries_and_keys(part, n, d_query, d_system)
        d_decay = self._of_decay(part, n, d_query, d_system)
        return *d_query_key, torch.mul(solved, part.beta[..., None], out=self.d_write[n]), d_decay, d_beta

    def _of_queries_and_keys(self, part: Inside, n: slice, d_query: Tensor, d_system: Tensor) -> tuple[Tensor, Tensor]:
        """Through the scores, through the memories, and back through the normalisation."""
        size, qk = part.v.shape[-2], part.qk.flatten(0, 1)
        d_qk, d_scores = self.d_qk[n].flatten(0, 1), self.d_scores[n]
        torch.sum(d_query, 2, out=d_scores[:, :, :size])
        torch.sum(d_system, 2, out=d_scores[:, :, size:])
        d_scores = d_scores.flatten(0, 1)
        torch.bmm(self.spread[n].flatten(0, 1), self.memories[n].flatten(0, 1).mT, out=d_qk)
        d_qk.baddbmm_(d_scores, qk[:, size:])
        d_key = torch.bmm(self.corrections.brought[n].flatten(0, 1), self.behind[n].flatten(0, 1).mT)
        d_qk[:, size:] += d_key.baddbmm_(d_scores.mT, qk)
        along = torch.linalg.vecdot(d_qk, qk).neg_()
        along[..., :size] *= qk.shape[-1]  # queries were divided by sqrt(K)
        d_qk.addcmul_(qk, along[..., None]).mul_(part.norm.flatten(0, 1))
        return self.d_qk[n, :, :size], self.d_qk[n, :, size:]

    def _of_decay(self, part: Inside, n: slice, d_query: Tensor, d_system: Tensor) -> Tensor:
        each, size = part.v.shape[2], part.v.shape[-2]
        by_query, by_key = part.halves
        d_logs = d_query.mul_(by_query).add_(d_system.mul_(by_key)).tril_(-1)
        to_end = self.echo[n].mul_(self.corrections.brought[n]).unflatten(-1, (each, -1)).sum(-1)
        d_logs[..., -1, :-1] += to_end.mT[..., :-1]
        reads = self.corrections.reads[n].mul_(self.spread[n]).unflatten(-1, (each, -1)).sum(-1)
        d_since = (reads[..., :size, :] + reads[..., size:, :]).mT.contiguous()
        held = self.memories[n].mul_(self.behind[n]).unflatten(-1, (each, -1)).sum((-3, -1))
        d_since[..., -1] += part.since_start[..., -1] * held
        lower = torch.ones(size, size, dtype=d_logs.dtype, device=d_logs.device).tril()
        return (lower.mT @ d_logs).tril_(-1).sum(-1) + d_since @ lower


_NAME = "qwen35moe::chunked_gated_delta_rule"
_GIVEN = "Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? state, Tensor? cu_seqlens, SymInt chunk"
torch.library.define(_NAME, f"({_GIVEN}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    f"{_NAME}_backward",
    f"(Tensor? d_output, Tensor? d_memory, Tensor boundaries, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def chunked_operator(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:
    """The rule in chunks, differentiable once."""
    given = (query, key, value, decay, beta, state, cu_seqlens, chunk)
    output, memory, _ = torch.ops.qwen35moe.chunked_gated_delta_rule(*given)
    return output, memory


@torch.library.impl(_NAME, "default")
def _forward(query, key, value, decay, beta, state, cu_seqlens, chunk):  # noqa: ANN001, ANN202
    boundaries = _boundaries(query, key, value, decay, beta, cu_seqlens, chunk)
    chunks, rows = plan(key, value, cu_seqlens, chunk), _rows(key, cu_seqlens)
    return *chunked_forward(chunks, query, key, value, decay, beta, state, rows, boundaries), boundaries


@torch.library.register_fake(_NAME)
def _shapes(query, key, value, decay, beta, state, cu_seqlens, chunk):  # noqa: ANN001, ANN202
    boundaries = _boundaries(query, key, value, decay, beta, cu_seqlens, chunk)
    memory = boundaries.new_empty(_rows(key, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    return value.new_empty(value.shape), memory, boundaries


def _rows(key: Tensor, cu_seqlens: Tensor | None) -> int:
    return key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _boundaries(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> Tensor:
    """Room for the memories before each block [blocks, N, K, R*V], as many as there can be, whatever cu_seqlens hold."""
    (batch, tokens, groups, width), (heads, out) = key.shape, value.shape[2:]
    chunk, block = sizes(key, value, chunk)
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = (tokens + documents * (chunk - 1)) // chunk
    count = (chunks + block - 1) // block
    dtype = wide_dtype(query, key, value, decay, beta)
    return value.new_empty(count, batch * groups, width, heads // groups * out, dtype=dtype)


@torch.library.impl(f"{_NAME}_backward", "default")
def _backward(d_output, d_memory, boundaries, query, key, value, decay, beta, state, cu_seqlens, chunk):  # noqa: ANN001, ANN202
    given = (query, key, value, decay, beta)
    return chunked_backward(d_output, d_memory, boundaries, *given, state, cu_seqlens, chunk)


@torch.library.register_fake(f"{_NAME}_backward")
def _gradient_shapes(d_output, d_memory, boundaries, query, key, value, decay, beta, state, cu_seqlens, chunk):  # noqa: ANN001, ANN202
    d_state = boundaries.new_empty(_rows(key, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    return *(x.new_empty(x.shape) for x in (query, key, value, decay, beta)), d_state


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, d_memory: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    boundaries, *tensors = ctx.saved_tensors
    given = (d_output, d_memory, boundaries, *tensors, ctx.chunk)
    *gradients, d_state = torch.ops.qwen35moe.chunked_gated_delta_rule_backward(*given)
    state = tensors[5]
    return *gradients, None if state is None else d_state.to(state.dtype), None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise ValueError(
        "the chunked gated delta rule has no second derivative: differentiate twice with "
        'backends.use(gated_delta_rule="recurrent")'
    )


torch.library.register_autograd(_NAME, _differentiate, setup_context=_keep)
torch.library.register_autograd(f"{_NAME}_backward", _refuse)
