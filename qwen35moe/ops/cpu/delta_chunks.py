r"""The gated delta rule in chunks of M tokens, as matrix products in memory that is reused. Contract in `ops.delta_rule`.

Symbols and steps are those of `ops.delta_chunked`, which docs/reference/delta_rule.md derives. For one value head and the
tokens i, j = 1 ... M of a chunk that starts with the recurrent state S_0:

    2   d_ij = exp(decay_{j+1} + ... + decay_i) for j <= i, else 0          d_i0 = exp(decay_1 + ... + decay_i)
    3   a_ij = beta_i d_ij (k_i . k_j) for j < i, else 0                    x = (I + a)^-1 diag(beta)
    5   p_ij = d_ij (q_i . k_j)
    6   r_i = v_i - d_i0 S_0^T k_i                                          w_i = sum_j x_ij r_j
    7   o_i = d_i0 S_0^T q_i + sum_j p_ij w_j
    8   S_M = d_M0 S_0 + sum_j k_j (x) d_Mj w_j

There is no step 4: the residual r_i needs S_0^T k_i, which the product that gives S_0^T q_i for step 7 computes as well, so
that u_i and y_i are not needed. Steps 1 to 5 (`chunk_terms`) run for a block of chunks at once, whose size keeps them in a
CPU's cache; steps 6 to 8 then pass the state from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qwen35moe.ops.cpu.triangular import by_blocks, by_substitution
from qwen35moe.ops.precision import wide_dtype, without_autocast

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of one recurrent state for each chunk of a block


@dataclass(frozen=True)
class Plan:
    """The chunks of a call. Each packed document starts a chunk of its own; padding fills its last chunk.

    length: tokens with the padding between documents; chunk_size: M; block_size: chunks per block. document: the document of
    each chunk, None when every row of the batch is one document. source [length]: the token at each position, in padding
    the last one before it; position [T]: the position of each token; valid [length]: 0 in padding, else 1.
    """

    length: int
    chunk_size: int
    block_size: int
    document: list[int] | None = None
    source: Tensor | None = None
    position: Tensor | None = None
    valid: Tensor | None = None

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk_size)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[first, last) chunk of each block."""
        return ((c, min(c + self.block_size, self.chunks)) for c in range(0, self.chunks, self.block_size))

    def state_of(self, states: Tensor, c: int) -> Tensor:
        """[B G, K, H/G V]: the states of chunk c among those of all rows [B or documents, G, K, H/G V], a view."""
        rows = states if self.document is None else states[self.document[c] : self.document[c] + 1]
        return rows.flatten(0, 1)

    def continues(self, c: int) -> bool:
        """Whether chunk c starts with the state after chunk c - 1."""
        return c > 0 and (self.document is None or self.document[c] == self.document[c - 1])

    def take(self, x: Tensor, first: int, last: int) -> Tensor:
        """x [B, T, H, ...] of these chunks -> [chunks, B, H, M, ...]; padding between documents is undefined, at the end 0."""
        rows = slice(first * self.chunk_size, min(last * self.chunk_size, self.length))
        x = x[:, rows] if self.source is None else x.index_select(1, self.source[rows])
        if missing := -x.shape[1] % self.chunk_size:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x.unflatten(1, (-1, self.chunk_size)).transpose(0, 1).transpose(2, 3)

    def mask(self, first: int, last: int) -> Tensor | None:
        """[chunks, 1, 1, M] of these chunks: 0 in padding, else 1; None without padding between documents."""
        if self.valid is None:
            return None
        return self.valid[first * self.chunk_size : last * self.chunk_size].view(-1, 1, 1, self.chunk_size)

    def put(self, x: Tensor, first: int, out: Tensor) -> None:
        """Write x [chunks, B, H, M, ...] of the chunks from `first` on to its positions in out [B, length, H, ...]."""
        x = x.transpose(2, 3).transpose(0, 1)
        start, size = first * self.chunk_size, x.shape[1] * self.chunk_size
        rows = out[:, start : start + size]
        if rows.shape[1] == size:
            rows.unflatten(1, (-1, self.chunk_size)).copy_(x)
        else:
            rows.copy_(x.flatten(1, 2)[:, : rows.shape[1]])

    def without_padding(self, x: Tensor) -> Tensor:
        """[B, length, ...] -> [B, T, ...]."""
        return x if self.position is None else x.index_select(1, self.position)


def sizes(key: Tensor, value: Tensor, chunk_size: int) -> tuple[int, int]:
    """Tokens per chunk, fewer than `chunk_size` for a short row, and chunks per block.

    At least 16 tokens, so that a short document is rounded in a packed row as it is alone.
    """
    B, T, H, V = value.shape
    while chunk_size > 16 and chunk_size // 2 >= T:
        chunk_size //= 2
    budget = _BLOCK_BYTES["cpu" if value.device.type == "cpu" else "cuda"]
    return chunk_size, max(4, budget // (4 * B * H * key.shape[-1] * V))


def plan(key: Tensor, value: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Plan:
    """See `Plan` and `sizes`. Copies cu_seqlens to the host: one synchronisation per call with packed documents on a GPU."""
    tokens = value.shape[1]
    chunk_size, block_size = sizes(key, value, chunk_size)
    if cu_seqlens is None:
        return Plan(tokens, chunk_size, block_size)
    bounds = cu_seqlens.cpu()
    lengths = bounds.diff()
    counts = (lengths + chunk_size - 1) // chunk_size
    starts = (counts.cumsum(0) - counts) * chunk_size  # of each document, among the positions
    of_token, of_chunk = torch.repeat_interleave(lengths), torch.repeat_interleave(counts)
    position = torch.arange(tokens, device="cpu") - bounds[:-1][of_token] + starts[of_token]
    of_position = of_chunk.repeat_interleave(chunk_size)
    source = torch.arange(of_position.shape[0], device="cpu") - starts[of_position] + bounds[:-1][of_position]
    source = source.minimum(bounds[1:][of_position] - 1)
    valid = torch.zeros(source.shape[0], dtype=torch.float32, device="cpu").index_fill_(0, position, 1)
    source, position, valid = (x.to(value.device) for x in (source, position, valid))
    return Plan(source.shape[0], chunk_size, block_size, of_chunk.tolist(), source, position, valid)


@dataclass
class ChunkTerms:
    """Results of steps 1 to 5 for the chunks of a block. The value heads of a key head are in an axis of their own, H/G."""

    qk: Tensor  # q_i above k_i [chunks, B G, 2M, K]
    norm: Tensor  # by which the rule's queries and keys were multiplied [chunks, B G, 2M, 1]
    v: Tensor  # v_i [chunks, B G, H/G, M, V]
    beta: Tensor  # beta_i [chunks, B G, H/G, M]
    decay_since_start: Tensor  # d_i0 [chunks, B G, H/G, M]
    decay_to_end: Tensor  # d_Mi [chunks, B G, H/G, M]
    decay_between: Tensor  # d_ij [chunks, B G, H/G, M, M]
    inverse: Tensor  # (I + a)^-1 [chunks, B G, H/G, M, M]
    products: Tensor  # q_i . k_j above k_i . k_j [chunks, B G, 2M, M]

    @property
    def query_key(self) -> Tensor:
        """q_i . k_j [chunks, B G, 1, M, M]."""
        return self.products[:, :, None].chunk(2, dim=-2)[0]

    @property
    def key_key(self) -> Tensor:
        """k_i . k_j [chunks, B G, 1, M, M]."""
        return self.products[:, :, None].chunk(2, dim=-2)[1]


def chunk_terms(
    plan: Plan, first: int, last: int, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> ChunkTerms:
    """Steps 1 to 5 for the chunks first ... last - 1."""
    # 1. Queries and keys of unit length, in chunks.
    dtype, size, groups = wide_dtype(query, key, value, decay, beta), plan.chunk_size, key.shape[2]
    q, k = plan.take(query, first, last), plan.take(key, first, last)
    qk = torch.empty(*q.shape[:3], 2 * size, q.shape[-1], dtype=dtype, device=q.device)
    qk[..., :size, :], qk[..., size:, :] = q, k
    qk = qk.flatten(1, 2)
    norm = torch.linalg.vecdot(qk, qk).add_(1e-6).rsqrt_()
    norm[..., :size] *= qk.shape[-1] ** -0.5
    qk *= norm[..., None]
    v = plan.take(value, first, last)
    v = torch.empty(v.shape, dtype=dtype, device=v.device).copy_(v).unflatten(2, (groups, -1)).flatten(1, 2)
    decay, beta = (plan.take(x, first, last).to(dtype) for x in (decay, beta))
    valid = plan.mask(first, last)
    if valid is not None:  # a padding token keeps the state and writes nothing
        decay, beta = decay * valid, beta * valid
    decay, beta = (x.unflatten(2, (groups, -1)).flatten(1, 2).contiguous() for x in (decay, beta))
    # 2. Decay between two tokens.
    decay_between = floored_exp(segment_sums(decay)).tril_()
    # 3. and 5. The products of queries and keys, once per key head; the triangular system and its inverse.
    products = qk @ qk[:, :, size:].mT
    system = products[:, :, None, size:] * decay_between
    system *= beta[..., None]
    inverse = by_substitution(system) if system.device.type == "cpu" else by_blocks(system.tril_(-1))
    # Entry (i, j) of the inverse has the factor d_ij: where that is zero, the entry is zero too, except for rounding.
    inverse *= decay_between.sign()  # a seventh of the time of masked_fill_ on a CPU
    since_start, to_end = floored_exp(decay.cumsum(-1)), decay_between[..., -1, :].clone()
    return ChunkTerms(qk, norm[..., None], v, beta, since_start, to_end, decay_between, inverse, products)


def segment_sums(decay: Tensor) -> Tensor:
    """[..., M] -> [..., M, M]: decay_{j+1} + ... + decay_i for j < i, and zero on and above the diagonal.

    Each entry is summed on its own: a difference of two running sums has no correct digit of a gate of -1e-4 that follows
    a gate of -80.
    """
    size = decay.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)
    return torch.where(below, decay[..., :, None], 0).cumsum_(-2)


def floored_exp(logs: Tensor) -> Tensor:
    """exp(logs), exactly zero where it is below 1e-13 (float64: 1e-35). Overwrites `logs`.

    Without the floor the products that follow contain denormal numbers, which a CPU handles in microcode: with strongly
    negative gates every form of the rule is several times slower, and no digit of the result depends on them.
    """
    floor = -80.0 if logs.dtype == torch.float64 else -30.0
    return torch.threshold_(logs, floor, float("-inf")).exp_()


class AcrossChunks:
    """Steps 6 and 8, chunk by chunk, in memory for the results of `capacity` chunks.

    state_reads [capacity, B G, 2M, H/G V]: S_0^T q_i above S_0^T k_i, and their views query_reads and key_reads [capacity,
    B G, H/G, M, V]. residual r_i and writes w_i [capacity, B G, H/G, M, V], decayed_writes d_Mi w_i [capacity, B G, M, H/G V].
    """

    def __init__(self, terms: ChunkTerms, capacity: int) -> None:
        rows, repeats, size, V = terms.v.shape[1:]

        def empty(*shape: int) -> Tensor:
            return terms.v.new_empty(capacity, rows, *shape)

        self.state_reads, self.decayed_writes = empty(2 * size, repeats * V), empty(size, repeats * V)
        self.residual, self.writes = empty(repeats, size, V), empty(repeats, size, V)
        self.query_reads, self.key_reads = split_heads(self.state_reads, repeats).chunk(2, dim=-2)

    def run_chunk(
        self, terms: ChunkTerms, c: int, transform: Tensor, state: Tensor, after: Tensor | None, index: int
    ) -> None:
        """Chunk c of `terms` from `state` [B G, K, H/G V]; the results go to `index`, the state after the chunk to `after`,
        which may be `state`. transform: x_ij [B G, H/G, M, M]."""
        repeats, size = terms.v.shape[2], terms.v.shape[-2]
        residual, writes, decayed_writes = self.residual[index], self.writes[index], self.decayed_writes[index]
        # 6. Residuals and writes.
        torch.bmm(terms.qk[c], state, out=self.state_reads[index])
        torch.mul(self.key_reads[index], terms.decay_since_start[c][..., None], out=residual)
        torch.sub(terms.v[c], residual, out=residual)
        torch.bmm(transform.flatten(0, 1), residual.flatten(0, 1), out=writes.flatten(0, 1))
        # 8. State after the chunk.
        torch.mul(writes, terms.decay_to_end[c][..., None], out=split_heads(decayed_writes, repeats))
        if after is not None:
            decay_of_chunk = terms.decay_since_start[c, :, None, :, -1:]
            torch.mul(state.unflatten(-1, (repeats, -1)), decay_of_chunk, out=after.unflatten(-1, (repeats, -1)))
            after.baddbmm_(terms.qk[c, :, size:].mT, decayed_writes)


def split_heads(x: Tensor, repeats: int) -> Tensor:
    """[..., M, H/G V] -> [..., H/G, M, V], a view."""
    return x.unflatten(-1, (repeats, -1)).transpose(-2, -3)


def group_heads(states: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A copy [rows, G, K, H/G V] of states [rows, H, K, V]: the value heads that share a key head are side by side, so that
    one product reads all of their states."""
    rows, H, K, V = states.shape
    grouped = torch.empty(rows, groups, K, H // groups, V, dtype=dtype, device=states.device)
    return grouped.copy_(rearrange(states, "b (g h) k v -> b g k h v", g=groups)).flatten(-2)


def ungroup_heads(states: Tensor, value_width: int) -> Tensor:
    """[rows, G, K, H/G V] -> [rows, H, K, V]."""
    return rearrange(states, "b g k (h v) -> b (g h) k v", v=value_width).contiguous()


@without_autocast
def chunked_forward(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, rows: int,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and states [rows, H, K, V]; boundaries [blocks, B G, K, H/G V] gets the state before each block."""
    (B, _, G, K), (H, V) = key.shape, value.shape[2:]
    dtype = wide_dtype(query, key, value, decay, beta)
    if state is None:
        states = torch.zeros(rows, G, K, H // G * V, dtype=dtype, device=value.device)
    else:
        states = group_heads(state, G, dtype)
    output = value.new_empty(B, plan.length, H, V)
    across = chunk_output = None
    for index, (first, last) in enumerate(plan.blocks()):
        terms = chunk_terms(plan, first, last, query, key, value, decay, beta)
        if across is None or chunk_output is None:
            across, chunk_output = AcrossChunks(terms, 1), torch.empty_like(terms.v[0])
        if boundaries is not None:
            boundaries[index] = plan.state_of(states, first)
        transform, scores = terms.inverse.mul_(terms.beta[..., None, :]), terms.decay_between.mul_(terms.query_key)
        for c in range(last - first):
            before = plan.state_of(states, first + c)
            across.run_chunk(terms, c, transform[c], before, before, 0)
            # 7. Output.
            torch.mul(across.query_reads[0], terms.decay_since_start[c][..., None], out=chunk_output)
            chunk_output.flatten(0, 1).baddbmm_(scores[c].flatten(0, 1), across.writes[0].flatten(0, 1))
            plan.put(chunk_output.view(1, B, H, plan.chunk_size, V), first + c, output)
    return plan.without_padding(output), ungroup_heads(states, V)
