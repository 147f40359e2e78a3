r"""The gated delta rule a chunk of tokens at a time, as matrix products. Contract in `ops.delta_rule`.

Inside a chunk that starts from memory S, with D_ij = exp(decay_{j+1} + ... + decay_i) for j <= i, d_i = exp(decay_1 + ...
+ decay_i) and t_j = D_Cj, the corrections W [C, V] of all its tokens solve one triangular system:

    U = V - d K S
    W = X beta U                X = (I + A)^-1,  A_ij = beta_i (k_i . k_j) D_ij for j < i
    O = d Q S + P W             P = Q K^T * D
    S' = d_C S + (t K)^T W

What depends on one chunk alone (`inside`) is computed for a block of chunks at once, in memory that stays in a CPU's
cache; then the memory passes through them one after the other.
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

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # of the memories of a block's chunks, were they all kept


@dataclass(frozen=True)
class Plan:
    """How the tokens of a call fill chunks. Of packed documents each begins at a chunk, which keeps them apart for good.

    tokens: with the gaps between documents; chunk: C; block: chunks worked on at once. document: which row of the states
    each chunk belongs to, None when every row of the batch is one document. source [tokens]: the token at each position,
    in a gap the last one before it; place [T]: the position of each token; there [tokens]: 0 in a gap, else 1.
    """

    tokens: int
    chunk: int
    block: int
    document: list[int] | None = None
    source: Tensor | None = None
    place: Tensor | None = None
    there: Tensor | None = None

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[first, last) chunk of each block."""
        return ((c, min(c + self.block, self.chunks)) for c in range(0, self.chunks, self.block))

    def row(self, states: Tensor, c: int) -> Tensor:
        """[N, K, R*V]: the part of states [rows, G, K, R*V] that chunk c works on, a view."""
        mine = states if self.document is None else states[self.document[c] : self.document[c] + 1]
        return mine.flatten(0, 1)

    def continues(self, c: int) -> bool:
        """Whether chunk c goes on where chunk c - 1 stopped."""
        return c > 0 and (self.document is None or self.document[c] == self.document[c - 1])

    def take(self, x: Tensor, first: int, last: int) -> Tensor:
        """x [B, T, H, ...] of these chunks -> [n, B, H, C, ...]; gaps hold anything, what lies behind the end zeros."""
        rows = slice(first * self.chunk, min(last * self.chunk, self.tokens))
        x = x[:, rows] if self.source is None else x.index_select(1, self.source[rows])
        if missing := -x.shape[1] % self.chunk:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x.unflatten(1, (-1, self.chunk)).transpose(0, 1).transpose(2, 3)

    def mask(self, first: int, last: int) -> Tensor | None:
        """[n, 1, 1, C] of these chunks: 0 in a gap, else 1."""
        if self.there is None:
            return None
        return self.there[first * self.chunk : last * self.chunk].view(-1, 1, 1, self.chunk)

    def put(self, x: Tensor, first: int, out: Tensor) -> None:
        """The way back: x [n, B, H, C, ...] of the chunks from `first` on into its positions of out [B, tokens, H, ...]."""
        x = x.transpose(2, 3).transpose(0, 1)
        start, room = first * self.chunk, x.shape[1] * self.chunk
        rows = out[:, start : start + room]
        if rows.shape[1] == room:
            rows.unflatten(1, (-1, self.chunk)).copy_(x)
        else:
            rows.copy_(x.flatten(1, 2)[:, : rows.shape[1]])

    def gathered(self, x: Tensor) -> Tensor:
        """[B, tokens, ...] -> [B, T, ...]: without the gaps."""
        return x if self.place is None else x.index_select(1, self.place)


def sizes(key: Tensor, value: Tensor, chunk: int) -> tuple[int, int]:
    """Tokens per chunk, fewer than `chunk` for a short row, and chunks per block.

    Not fewer than 16, so that short documents round in a packed row as they do alone.
    """
    batch, tokens, heads, out = value.shape
    while chunk > 16 and chunk // 2 >= tokens:
        chunk //= 2
    budget = _BLOCK_BYTES["cpu" if value.device.type == "cpu" else "cuda"]
    return chunk, max(4, budget // (4 * batch * heads * key.shape[-1] * out))


def plan(key: Tensor, value: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Plan:
    """See `Plan` and `sizes`. Reads cu_seqlens on the host: on a GPU packed documents wait for it, once per call."""
    tokens = value.shape[1]
    chunk, block = sizes(key, value, chunk)
    if cu_seqlens is None:
        return Plan(tokens, chunk, block)
    bounds = cu_seqlens.cpu()
    lengths = bounds.diff()
    counts = (lengths + chunk - 1) // chunk
    begins = (counts.cumsum(0) - counts) * chunk  # of each document, among the positions
    of_token, of_chunk = torch.repeat_interleave(lengths), torch.repeat_interleave(counts)
    place = torch.arange(tokens) - bounds[:-1][of_token] + begins[of_token]
    of_position = of_chunk.repeat_interleave(chunk)
    source = torch.arange(of_position.shape[0]) - begins[of_position] + bounds[:-1][of_position]
    source = source.minimum(bounds[1:][of_position] - 1)
    there = torch.zeros(source.shape[0]).index_fill_(0, place, 1)
    source, place, there = (x.to(value.device) for x in (source, place, there))
    return Plan(source.shape[0], chunk, block, of_chunk.tolist(), source, place, there)


@dataclass
class Inside:
    """What depends on one chunk alone, for n chunks. N = B*G rows, R = H/G.

    qk [n, N, 2C, K]: unit queries / sqrt(K) above unit keys, which are `norm` [n, N, 2C, 1] times the given ones; v
    [n, N, R, C, V]; beta, since_start = d, to_end = t [n, N, R, C]; between = D, inverse = X [n, N, R, C, C]; scores
    [n, N, 2C, C]: Q K^T above K K^T.
    """

    qk: Tensor
    norm: Tensor
    v: Tensor
    beta: Tensor
    since_start: Tensor
    to_end: Tensor
    between: Tensor
    inverse: Tensor
    scores: Tensor

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Q K^T and K K^T [n, N, 1, C, C]."""
        return self.scores[:, :, None].chunk(2, dim=-2)  # pyright: ignore[reportReturnType]


def inside(
    plan: Plan, first: int, last: int, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> Inside:
    """Chunks first ... last - 1. See `Inside`."""
    dtype, size, groups = wide_dtype(query, key, value, decay, beta), plan.chunk, key.shape[2]
    q, k = plan.take(query, first, last), plan.take(key, first, last)
    qk = torch.empty(*q.shape[:3], 2 * size, q.shape[-1], dtype=dtype, device=q.device)
    qk[..., :size, :], qk[..., size:, :] = q, k
    qk = qk.flatten(1, 2)
    norm = torch.linalg.vecdot(qk, qk).add_(1e-6).rsqrt_()
    norm[..., :size] *= qk.shape[-1] ** -0.5
    qk *= norm[..., None]
    v = plan.take(value, first, last)
    v = torch.empty(v.shape, dtype=dtype, device=v.device).copy_(v).unflatten(2, (groups, -1)).flatten(1, 2)
    g, b = (plan.take(x, first, last).to(dtype) for x in (decay, beta))
    there = plan.mask(first, last)
    if there is not None:  # a token in a gap neither forgets nor writes
        g, b = g * there, b * there
    g, b = (x.unflatten(2, (groups, -1)).flatten(1, 2).contiguous() for x in (g, b))
    between = forgetting(segment_sums(g)).tril_()
    keys = qk[:, :, size:]
    scores = qk @ keys.mT  # once per key head
    system = scores[:, :, None, size:] * between
    system *= b[..., None]
    inverse = by_substitution(system) if system.device.type == "cpu" else by_blocks(system.tril_(-1))
    # Entry (i, j) of the inverse carries D_ij as a factor: where that is nothing, so is the entry, rounding apart.
    inverse.masked_fill_(between == 0, 0)
    since_start, to_end = forgetting(g.cumsum(-1)), between[..., -1, :].clone()
    return Inside(qk, norm[..., None], v, b, since_start, to_end, between, inverse, scores)


def segment_sums(decay: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: decay_{j+1} + ... + decay_i for j < i, and zero on and above the diagonal.

    Each entry is summed on its own, not as a difference of two running sums: behind a gate of -80 such a difference
    keeps no digit of a gate of -1e-4.
    """
    size = decay.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)
    return torch.where(below, decay[..., :, None], 0).cumsum_(-2)


def forgetting(logs: Tensor) -> Tensor:
    """exp(logs), exactly zero where less than 1e-13 (float64: 1e-35) would be left. Written in place of `logs`.

    Without the floor the products that follow fill with denormal numbers, which a CPU handles in microcode: at hard
    gates every form of the rule becomes several times slower, and no digit of the result depends on them.
    """
    floor = -80.0 if logs.dtype == torch.float64 else -30.0
    return torch.threshold_(logs, floor, float("-inf")).exp_()


class Corrections:
    """U, W and what follows from them for the memory, chunk by chunk; `keep` chunks of results stay to be read.

    by_query = Q S, by_key = K S, wanted = U, write = W [keep, N, R, C, V]; brought = t W [keep, N, C, R*V].
    """

    def __init__(self, part: Inside, keep: int) -> None:
        rows, each, size, out = part.v.shape[1:]

        def empty(*shape: int) -> Tensor:
            return part.v.new_empty(keep, rows, *shape)

        self.reads, self.brought = empty(2 * size, each * out), empty(size, each * out)
        self.wanted, self.write = empty(each, size, out), empty(each, size, out)
        self.by_query, self.by_key = apart(self.reads, each).chunk(2, dim=-2)

    def one_chunk(self, part: Inside, c: int, solve: Tensor, memory: Tensor, after: Tensor | None, at: int) -> None:
        """Chunk c of `part` from `memory` [N, K, R*V], its results at `at`; the memory behind it goes into `after`, which
        may be the same tensor. solve = X diag(beta) [N, R, C, C]."""
        each, size = part.v.shape[2], part.v.shape[-2]
        wanted, write, brought = self.wanted[at], self.write[at], self.brought[at]
        torch.bmm(part.qk[c], memory, out=self.reads[at])
        torch.mul(self.by_key[at], part.since_start[c][..., None], out=wanted)
        torch.sub(part.v[c], wanted, out=wanted)
        torch.bmm(solve.flatten(0, 1), wanted.flatten(0, 1), out=write.flatten(0, 1))
        torch.mul(write, part.to_end[c][..., None], out=apart(brought, each))
        if after is not None:
            kept = part.since_start[c, :, None, :, -1:]
            torch.mul(memory.unflatten(-1, (each, -1)), kept, out=after.unflatten(-1, (each, -1)))
            after.baddbmm_(part.qk[c, :, size:].mT, brought)


def apart(x: Tensor, each: int) -> Tensor:
    """[..., C, R*V] -> [..., R, C, V]: value heads side by side as heads of their own, a view."""
    return x.unflatten(-1, (each, -1)).transpose(-2, -3)


def side_by_side(states: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A copy [rows, G, K, R*V] of states [rows, H, K, V]: the memories of the value heads that share a key head lie side by
    side, so that one product reads them all."""
    rows, heads, width, out = states.shape
    wide = torch.empty(rows, groups, width, heads // groups, out, dtype=dtype, device=states.device)
    return wide.copy_(rearrange(states, "b (g r) k v -> b g k r v", g=groups)).flatten(-2)


def one_after_another(states: Tensor, out: int) -> Tensor:
    """The way back, [rows, G, K, R*V] -> [rows, H, K, V]."""
    return rearrange(states, "b g k (r v) -> b (g r) k v", v=out).contiguous()


@without_autocast
def chunked_forward(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, rows: int,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and memories [rows, H, K, V]; boundaries [blocks, N, K, R*V] gets the memory before each block."""
    (batch, _, groups, width), (heads, out) = key.shape, value.shape[2:]
    dtype = wide_dtype(query, key, value, decay, beta)
    if state is None:
        memories = torch.zeros(rows, groups, width, heads // groups * out, dtype=dtype, device=value.device)
    else:
        memories = side_by_side(state, groups, dtype)
    output = value.new_empty(batch, plan.tokens, heads, out)
    work = answer = None
    for index, (first, last) in enumerate(plan.blocks()):
        part = inside(plan, first, last, query, key, value, decay, beta)
        if work is None or answer is None:
            work, answer = Corrections(part, 1), torch.empty_like(part.v[0])
        if boundaries is not None:
            boundaries[index] = plan.row(memories, first)
        solve, attend = part.inverse.mul_(part.beta[..., None, :]), part.between.mul_(part.halves[0])
        for c in range(last - first):
            memory = plan.row(memories, first + c)
            work.one_chunk(part, c, solve[c], memory, memory, 0)
            torch.mul(work.by_query[0], part.since_start[c][..., None], out=answer)
            answer.flatten(0, 1).baddbmm_(attend[c].flatten(0, 1), work.write[0].flatten(0, 1))
            plan.put(answer.view(1, batch, heads, plan.chunk, out), first + c, output)
    return plan.gathered(output), one_after_another(memories, out)
