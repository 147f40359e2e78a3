"""The gated delta rule in chunks of M tokens, written to be read: eight steps that docs/reference/delta_rule.md derives.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (UT transform, WY form), and
"Gated Delta Networks" (decay). The contract is that of `ops.delta_rule`.

For one value head and the tokens i, j = 1 ... M of a chunk that starts with the recurrent state S_0:

    1   q_i, k_i            of unit length, q_i divided by sqrt(K); a shorter last chunk is padded
    2   d_ij = exp(decay_{j+1} + ... + decay_i) for j <= i, else 0          d_i0 = exp(decay_1 + ... + decay_i)
    3   a_ij = beta_i d_ij (k_i . k_j) for j < i, else 0                    x = (I + a)^-1 diag(beta)
    4   u_i = sum_j x_ij v_j                                                y_i = sum_j x_ij d_j0 k_j
    5   p_ij = d_ij (q_i . k_j)
    6   w_i = u_i - S_0^T y_i
    7   o_i = d_i0 S_0^T q_i + sum_j p_ij w_j
    8   S_M = d_M0 S_0 + sum_j d_Mj k_j (x) w_j

Steps 1 to 5 do not use the state and run for all chunks at once; steps 6 to 8 pass it from chunk to chunk.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, einsum

from qwen35moe.ops.delta_rule import gated_delta_rule, initial_state
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import widen, without_autocast


class Chunk(NamedTuple):
    """Results of steps 1 to 5: of one chunk [B, H, M, ...], or of all chunks [B, chunks, H, M, ...]."""

    q: Tensor  # q_i [..., M, K]
    k: Tensor  # k_i [..., M, K]
    decay_between: Tensor  # d_ij [..., M, M]
    decay_since_start: Tensor  # d_i0 [..., M]
    transform: Tensor  # x_ij [..., M, M]
    u: Tensor  # u_i [..., M, V]
    y: Tensor  # y_i [..., M, K]
    scores: Tensor  # p_ij [..., M, M]


@gated_delta_rule.implementation("chunked")
@without_autocast
def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The contract of `ops.delta_rule`, and chunk_size = M: any number of tokens. Differentiable by autograd."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    if cu_seqlens is not None:
        documents = []
        for number, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            q, k, v, g, b = (x[:, start:end] for x in (query, key, value, decay, beta))
            before = None if state is None else state[number : number + 1]
            documents.append(chunked_gated_delta_rule(q, k, v, decay=g, beta=b, state=before, chunk_size=chunk_size))
        if not documents:
            return value, initial_state(state, *widen(query, value))[:0]
        outputs, states = zip(*documents, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)

    dtype, length = value.dtype, value.shape[1]
    query, key, value, decay, beta = widen(query, key, value, decay, beta)
    state = initial_state(state, query, value)
    if length == 0:  # an empty document keeps its state
        return value.to(dtype), state
    chunks = within_chunks(query, key, value, decay, beta, chunk_size)
    outputs = []
    for n in range(chunks.q.shape[1]):
        output, state = across_chunk(Chunk(*(x[:, n] for x in chunks)), state)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2)[:, :length].to(dtype), state


def within_chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, chunk_size: int) -> Chunk:
    """Steps 1 to 5 for all chunks. In einsum: b row, n chunk, h value head, i and j tokens of a chunk, k and v widths."""
    # 1. Unit queries and keys for every value head, in chunks.
    repeats = value.shape[2] // key.shape[2]
    query = l2_norm(query).repeat_interleave(repeats, dim=2) * query.shape[-1] ** -0.5
    key = l2_norm(key).repeat_interleave(repeats, dim=2)
    q, k, v, decay, beta = (into_chunks(x, chunk_size) for x in (query, key, value, decay, beta))
    # 2. Decay between two tokens. Each exponent is summed on its own: a difference of two running sums has no correct digit
    # of a gate of -1e-6 that follows a gate of -80.
    below = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=v.device).tril(-1)
    decay_between = torch.where(below, decay[..., :, None], 0).cumsum(-2).exp().tril()
    decay_since_start = decay.cumsum(-1).exp()
    # 3. The triangular system and the UT transform.
    system = (beta[..., None] * decay_between * einsum("bnhik,bnhjk->bnhij", k, k)).tril(-1)
    transform = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
    # 4. The WY form: writes for an empty state, and the keys that read the state before the chunk.
    u = einsum("bnhij,bnhjv->bnhiv", transform, v)
    y = einsum("bnhij,bnhj,bnhjk->bnhik", transform, decay_since_start, k)
    # 5. Scores.
    scores = decay_between * einsum("bnhik,bnhjk->bnhij", q, k)
    return Chunk(q, k, decay_between, decay_since_start, transform, u, y, scores)


def across_chunk(chunk: Chunk, state: Tensor) -> tuple[Tensor, Tensor]:
    """Steps 6 to 8 for one chunk: output [B, H, M, V] and the state after the chunk, from the state [B, H, K, V] before."""
    # 6. Writes [B, H, M, V].
    w = chunk.u - einsum("bhik,bhkv->bhiv", chunk.y, state)
    # 7. Output.
    output = einsum("bhi,bhik,bhkv->bhiv", chunk.decay_since_start, chunk.q, state)
    output = output + einsum("bhij,bhjv->bhiv", chunk.scores, w)
    # 8. State after the chunk.
    to_end = chunk.decay_between[..., -1, :]
    state = chunk.decay_since_start[..., -1, None, None] * state + einsum("bhj,bhjk,bhjv->bhkv", to_end, chunk.k, w)
    return output, state


def into_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, ...] -> [B, chunks, H, M, ...]. Padded with zeros: decay 0 and beta 0 keep the state."""
    missing = -x.shape[1] % chunk_size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, chunk_size)).transpose(2, 3)
