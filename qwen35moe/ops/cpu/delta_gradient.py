r"""The gated delta rule in chunks with a backward that keeps the inputs and one recurrent state per block of chunks.

The backward runs the blocks from the last to the first and computes each block's forward again. Symbols are those of
`ops.cpu.delta_chunks`; a d in front of a symbol means the gradient of that value, and <., .> is the sum of the products of
two matrices' entries. With z_i = beta_i r_i, so that w_i = sum_j (I + a)^-1_ij z_j, a chunk gives from do_i and dS_M

    dw_j = sum_i p_ij do_i + d_Mj dS_M^T k_j                    dz_j = sum_i (I + a)^-1_ij dw_i
    dv_i = dr_i = beta_i dz_i
    dS_0 = d_M0 dS_M + sum_i q_i (x) d_i0 do_i - sum_i k_i (x) d_i0 dr_i
    dp_ij = do_i . w_j for j <= i                               da_ij = -dz_i . w_j for j < i
    dq_i = d_i0 S_0 do_i + sum_j dp_ij d_ij k_j
    dk_i = -d_i0 S_0 dr_i + d_Mi dS_M w_i + sum_j (dp_ji d_ji q_j + b_ij k_j + b_ji k_j)        b_ij = da_ij beta_i d_ij
    dbeta_i = dz_i . r_i + sum_j da_ij d_ij (k_i . k_j)
    dd_ij = dp_ij (q_i . k_j) + da_ij beta_i (k_i . k_j) for j < i, and (dS_M^T k_j) . w_j more for i = M
    dd_i0 = do_i . S_0^T q_i - dr_i . S_0^T k_i, and <dS_M, S_0> more for i = M

The decay of token t is in d_ij for i >= t > j and in d_i0 for i >= t:

    ddecay_t = sum_{i >= t > j} dd_ij d_ij + sum_{i >= t} dd_i0 d_i0

d_ii = 1 is constant, and no sum is a difference of two longer ones: a gate after which nothing of the state is left gets the
gradient zero. At 35B shapes the backward keeps 16 KiB of inputs and 16 KiB of states per token and layer.

The forward and the backward are one `torch.library` operator each: `torch.compile` and `torch.export` see two calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35moe.ops.cpu.delta_chunks import (
    AcrossChunks,
    ChunkTerms,
    Plan,
    chunk_terms,
    chunked_forward,
    group_heads,
    plan,
    sizes,
    split_heads,
    ungroup_heads,
)
from qwen35moe.ops.precision import wide_dtype, without_autocast


@without_autocast
def chunked_backward(
    d_output: Tensor | None, d_final_state: Tensor | None, boundaries: Tensor, query: Tensor, key: Tensor, value: Tensor,
    decay: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, decay, beta and of the state before the first token [rows, H, K, V].

    boundaries [blocks, B G, K, H/G V]: the state before each block, from `chunked_forward`.
    """
    chunks, G, dtype, V = plan(key, value, cu_seqlens, chunk), key.shape[2], boundaries.dtype, value.shape[-1]
    zeros = boundaries.new_zeros(_rows(key, cu_seqlens), G, *boundaries.shape[2:])
    initial = zeros if state is None else group_heads(state, G, dtype)
    d_states = zeros.clone() if d_final_state is None else group_heads(d_final_state, G, dtype)
    inputs = (query, key, value, decay, beta)
    gradients = tuple(x.new_empty(x.shape[0], chunks.length, *x.shape[2:]) for x in inputs)
    block = None
    for index, (first, last) in reversed(list(enumerate(chunks.blocks()))):
        terms = chunk_terms(chunks, first, last, *inputs)
        if block is None or block.capacity < last - first:
            block = _BlockBackward(terms)
        block.forward_again(terms, chunks, first, boundaries[index], initial)
        block.backward(terms, chunks, first, _output_gradient(terms, chunks, first, last, d_output), d_states)
        for x, out in zip(block.gradients(terms), gradients, strict=True):
            chunks.put(x.reshape(last - first, key.shape[0], out.shape[2], chunks.chunk_size, *out.shape[3:]), first, out)
    return *(chunks.without_padding(x) for x in gradients), ungroup_heads(d_states, V)


def _output_gradient(terms: ChunkTerms, chunks: Plan, first: int, last: int, d_output: Tensor | None) -> Tensor:
    """do_i [chunks, B G, H/G, M, V] of a block, zero in padding."""
    if d_output is None:
        return torch.zeros_like(terms.v)
    rows = chunks.take(d_output, first, last)
    d_out = terms.v.new_empty(rows.shape).copy_(rows)
    valid = chunks.mask(first, last)
    if valid is not None:
        d_out *= valid[..., None]
    return d_out.view_as(terms.v)


class _BlockBackward:
    """The backward of one block, in memory that the next block uses again.

    Names are those of `ChunkTerms` and `AcrossChunks`, with d_ in front of gradients. states S_0 and d_after dS_M [chunks,
    B G, K, H/G V]; d_writes dw_i and d_scaled dz_i [chunks, B G, H/G, M, V]; d_scores dp_ij and d_system da_ij [chunks, B G,
    H/G, M, M].
    """

    def __init__(self, terms: ChunkTerms) -> None:
        self.capacity, rows, repeats, _, V = terms.v.shape
        K = terms.qk.shape[-1]
        self.states, self.d_after = (terms.v.new_empty(self.capacity, rows, K, repeats * V) for _ in range(2))
        self.across = AcrossChunks(terms, self.capacity)
        self.d_state_reads = torch.empty_like(self.across.state_reads)
        self.d_decayed_writes = torch.empty_like(self.across.decayed_writes)
        self.d_writes, self.d_scaled = (torch.empty_like(terms.v) for _ in range(2))
        self.d_scores, self.d_system = (torch.empty_like(terms.decay_between) for _ in range(2))
        self.d_qk, self.d_products = torch.empty_like(terms.qk), torch.empty_like(terms.products)

    def forward_again(self, terms: ChunkTerms, chunks: Plan, first: int, before: Tensor, initial: Tensor) -> None:
        """Steps 6 and 8 of every chunk, from the state `before` the block; `initial`: the states before each document."""
        transform = terms.inverse * terms.beta[..., None, :]
        count = len(terms.v)
        for c in range(count):
            if c == 0:
                self.states[0] = before
            elif not chunks.continues(first + c):
                self.states[c] = chunks.state_of(initial, first + c)
            after = self.states[c + 1] if c + 1 < count and chunks.continues(first + c + 1) else None
            self.across.run_chunk(terms, c, transform[c], self.states[c], after, c)

    def backward(self, terms: ChunkTerms, chunks: Plan, first: int, d_out: Tensor, d_states: Tensor) -> None:
        """Gradients of the writes and states, from the last chunk to the first. d_states holds the gradient of the state
        after the block, and at the end that of the state before it."""
        count, _, repeats, size, _ = terms.v.shape
        d_query_reads, d_key_reads = split_heads(self.d_state_reads[:count], repeats).chunk(2, dim=-2)
        torch.mul(d_out, terms.decay_since_start[..., None], out=d_query_reads)
        scale = (terms.decay_since_start * terms.beta).neg_()[..., None]
        scores = (terms.decay_between * terms.query_key).flatten(1, 2)
        for c in reversed(range(count)):
            if c == count - 1 or not chunks.continues(first + c + 1):
                self.d_after[c] = chunks.state_of(d_states, first + c)
            torch.bmm(terms.qk[c, :, size:], self.d_after[c], out=self.d_decayed_writes[c])
            d_decayed_writes = split_heads(self.d_decayed_writes[c], repeats)
            torch.mul(d_decayed_writes, terms.decay_to_end[c][..., None], out=self.d_writes[c])
            self.d_writes[c].flatten(0, 1).baddbmm_(scores[c].mT, d_out[c].flatten(0, 1))
            inverse, d_scaled = terms.inverse[c].flatten(0, 1), self.d_scaled[c]
            torch.bmm(inverse.mT, self.d_writes[c].flatten(0, 1), out=d_scaled.flatten(0, 1))
            torch.mul(d_scaled, scale[c], out=d_key_reads[c])
            goes_on = c > 0 and chunks.continues(first + c)
            d_before = self.d_after[c - 1] if goes_on else chunks.state_of(d_states, first + c)
            decay_of_chunk = terms.decay_since_start[c, :, None, :, -1:]
            torch.mul(self.d_after[c].unflatten(-1, (repeats, -1)), decay_of_chunk, out=d_before.unflatten(-1, (repeats, -1)))
            d_before.baddbmm_(terms.qk[c].mT, self.d_state_reads[c])
        self.d_out = d_out

    def gradients(self, terms: ChunkTerms) -> tuple[Tensor, ...]:
        """dq_i, dk_i of the inputs [chunks, B G, M, K], dv_i [chunks, B G, H/G, M, V], ddecay_i and dbeta_i [chunks, B G,
        H/G, M] of all chunks of the block. Overwrites the results of the two passes."""
        across, block = self.across, slice(0, len(terms.v))
        writes, d_scaled = across.writes[block].flatten(0, 2), self.d_scaled[block]
        d_scores, d_system = self.d_scores[block], self.d_system[block]
        torch.bmm(self.d_out.flatten(0, 2), writes.mT, out=d_scores.flatten(0, 2))
        torch.bmm(d_scaled.flatten(0, 2), writes.mT, out=d_system.flatten(0, 2))
        d_scores *= terms.decay_between
        d_system *= terms.decay_between.tril(-1).neg_()
        d_beta = across.residual[block].mul_(d_scaled).sum(-1) + (d_system * terms.key_key).sum(-1)
        d_system *= terms.beta[..., None]
        d_query_key = self._query_key_gradients(terms, block, d_scores, d_system)
        d_decay = self._decay_gradient(terms, block, d_scores, d_system)
        return *d_query_key, torch.mul(d_scaled, terms.beta[..., None], out=self.d_writes[block]), d_decay, d_beta

    def _query_key_gradients(
        self, terms: ChunkTerms, block: slice, d_scores: Tensor, d_system: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dq_i and dk_i of the inputs: through the products, through the states, and through the normalisation.

        d_scores: dp_ij d_ij; d_system: b_ij.
        """
        size, qk = terms.v.shape[-2], terms.qk.flatten(0, 1)
        d_qk, d_products = self.d_qk[block].flatten(0, 1), self.d_products[block]
        torch.sum(d_scores, 2, out=d_products[:, :, :size])
        torch.sum(d_system, 2, out=d_products[:, :, size:])
        d_products = d_products.flatten(0, 1)
        torch.bmm(self.d_state_reads[block].flatten(0, 1), self.states[block].flatten(0, 1).mT, out=d_qk)
        d_qk.baddbmm_(d_products, qk[:, size:])
        d_key = torch.bmm(self.across.decayed_writes[block].flatten(0, 1), self.d_after[block].flatten(0, 1).mT)
        d_qk[:, size:] += d_key.baddbmm_(d_products.mT, qk)
        radial = torch.linalg.vecdot(d_qk, qk).neg_()
        radial[..., :size] *= qk.shape[-1]  # queries were divided by sqrt(K)
        d_qk.addcmul_(qk, radial[..., None]).mul_(terms.norm.flatten(0, 1))
        return self.d_qk[block, :, :size], self.d_qk[block, :, size:]

    def _decay_gradient(self, terms: ChunkTerms, block: slice, d_scores: Tensor, d_system: Tensor) -> Tensor:
        """ddecay_i. d_scores: dp_ij d_ij; d_system: b_ij. Both are overwritten."""
        repeats, size = terms.v.shape[2], terms.v.shape[-2]
        d_between = d_scores.mul_(terms.query_key).add_(d_system.mul_(terms.key_key)).tril_(-1)  # dd_ij d_ij
        to_end = self.d_decayed_writes[block].mul_(self.across.decayed_writes[block]).unflatten(-1, (repeats, -1)).sum(-1)
        d_between[..., -1, :-1] += to_end.mT[..., :-1]
        reads = self.across.state_reads[block].mul_(self.d_state_reads[block]).unflatten(-1, (repeats, -1)).sum(-1)
        d_since_start = (reads[..., :size, :] + reads[..., size:, :]).mT.contiguous()  # dd_i0 d_i0
        through_state = self.states[block].mul_(self.d_after[block]).unflatten(-1, (repeats, -1)).sum((-3, -1))
        d_since_start[..., -1] += terms.decay_since_start[..., -1] * through_state
        lower = torch.ones(size, size, dtype=d_between.dtype, device=d_between.device).tril()
        return (lower.mT @ d_between).tril_(-1).sum(-1) + d_since_start @ lower


_NAME = "qwen35moe::chunked_gated_delta_rule"
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? state, Tensor? cu_seqlens, SymInt chunk"
)
torch.library.define(_NAME, f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    f"{_NAME}_backward",
    f"(Tensor? d_output, Tensor? d_final_state, Tensor boundaries, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def chunked_operator(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:
    """The rule in chunks of `chunk` tokens, differentiable once."""
    arguments = (query, key, value, decay, beta, state, cu_seqlens, chunk)
    output, final_state, _ = torch.ops.qwen35moe.chunked_gated_delta_rule(*arguments)
    return output, final_state


@torch.library.impl(_NAME, "default")
def _forward(query, key, value, decay, beta, state, cu_seqlens, chunk):
    boundaries = _boundaries(query, key, value, decay, beta, cu_seqlens, chunk)
    chunks, rows = plan(key, value, cu_seqlens, chunk), _rows(key, cu_seqlens)
    return *chunked_forward(chunks, query, key, value, decay, beta, state, rows, boundaries), boundaries


@torch.library.register_fake(_NAME)
def _forward_shapes(query, key, value, decay, beta, state, cu_seqlens, chunk):
    boundaries = _boundaries(query, key, value, decay, beta, cu_seqlens, chunk)
    final_state = boundaries.new_empty(_rows(key, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    return value.new_empty(value.shape), final_state, boundaries


def _rows(key: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of the states: one per row of the batch, or one per document."""
    return key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _boundaries(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> Tensor:
    """Memory for the state before each block [blocks, B G, K, H/G V]: enough for the largest number of blocks that
    cu_seqlens of this length can give."""
    (B, T, G, K), (H, V) = key.shape, value.shape[2:]
    chunk_size, block_size = sizes(key, value, chunk)
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = (T + documents * (chunk_size - 1)) // chunk_size
    blocks = (chunks + block_size - 1) // block_size
    dtype = wide_dtype(query, key, value, decay, beta)
    return value.new_empty(blocks, B * G, K, H // G * V, dtype=dtype)


@torch.library.impl(f"{_NAME}_backward", "default")
def _backward(d_output, d_final_state, boundaries, query, key, value, decay, beta, state, cu_seqlens, chunk):
    inputs = (query, key, value, decay, beta)
    return chunked_backward(d_output, d_final_state, boundaries, *inputs, state, cu_seqlens, chunk)


@torch.library.register_fake(f"{_NAME}_backward")
def _backward_shapes(d_output, d_final_state, boundaries, query, key, value, decay, beta, state, cu_seqlens, chunk):
    d_state = boundaries.new_empty(_rows(key, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    return *(x.new_empty(x.shape) for x in (query, key, value, decay, beta)), d_state


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, d_output: Tensor | None, d_final_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_output is None and d_final_state is None:
        return (None,) * 8
    boundaries, *tensors = ctx.saved_tensors
    arguments = (d_output, d_final_state, boundaries, *tensors, ctx.chunk)
    *gradients, d_state = torch.ops.qwen35moe.chunked_gated_delta_rule_backward(*arguments)
    state = tensors[5]
    return *gradients, None if state is None else d_state.to(state.dtype), None, None


def _no_second_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise ValueError(
        "the chunked gated delta rule has no second derivative: differentiate twice with "
        'backends.use(gated_delta_rule="recurrent")'
    )


torch.library.register_autograd(_NAME, _gradient, setup_context=_setup)
torch.library.register_autograd(f"{_NAME}_backward", _no_second_gradient)
