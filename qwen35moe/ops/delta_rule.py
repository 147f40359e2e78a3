"""The gated delta rule: a memory matrix that forgets by a gate and is corrected rather than accumulated.

Yang et al. 2024, "Gated Delta Networks". Per value head, with keys and queries of unit length:

    S_t = exp(decay_t) S_{t-1} + k_t (x) beta_t (v_t - exp(decay_t) S_{t-1}^T k_t)        S [K, V]
    o_t = S_t^T q_t / sqrt(K)

`recurrent_gated_delta_rule` is that definition; `chunked_gated_delta_rule` gives the same result as matrix products.
One contract for both:

    query, key [B, T, G, K]   normalised here: x / sqrt(sum x^2 + 1e-6); key head g serves value heads g H/G ... (g+1) H/G - 1
    value [B, T, H, V]        H a multiple of G
    decay [B, T, H]           log of the share of memory kept, <= 0
    beta [B, T, H]            learning rate, 0 (write nothing) to 1 (replace what the key recalls)
    state [B, H, K, V]        the memory before the first token; None is an empty one
    cu_seqlens [documents+1]  B = 1: where packed documents begin and end; `state` then has one row per document
    returns (output [B, T, H, V] in value's dtype, memory after the last token [B or documents, H, K, V], float32 at least)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.attention_map import attention_map as attention_map
from qwen35moe.ops.attention_map import writers as writers
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import wide_dtype, widen
from qwen35moe.ops.triangular import unit_lower_inverse

CHUNK = 32  # smaller chunks save C^2 work, larger ones launches: 32 is fastest on CPUs
_BLOCK_BYTES = 2 << 20  # a CPU works through as many chunks at once as keep each temporary in cache


def recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: slow and obvious. See the module's contract."""
    if cu_seqlens is not None:
        return _each_document(recurrent_gated_delta_rule, query, key, value, decay, beta, state, cu_seqlens)
    q, k, v, decay, beta = widen(query, key, value, decay, beta)
    repeats = v.shape[2] // k.shape[2]
    q = l2_norm(q).repeat_interleave(repeats, dim=2) * q.shape[-1] ** -0.5
    k = l2_norm(k).repeat_interleave(repeats, dim=2)
    memory = _initial(state, q, v)
    outputs = []
    for t in range(q.shape[1]):
        memory = memory * decay[:, t].exp()[..., None, None]  # forget
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], memory)  # what the memory answers for this key
        write = beta[:, t, :, None] * (v[:, t] - recalled)  # only the correction
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
    return torch.stack(outputs, dim=1).to(value.dtype), memory


def _initial(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    if state is None:
        return v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
    return state.to(v.dtype)


def _each_document(rule, query, key, value, decay, beta, state, cu_seqlens):  # noqa: ANN001
    bounds = cu_seqlens.tolist()
    outputs, memories = [], []
    for document, (start, end) in enumerate(pairwise(bounds)):
        rows = slice(start, end)
        before = None if state is None else state[document : document + 1]
        output, memory = rule(
            query[:, rows], key[:, rows], value[:, rows], decay=decay[:, rows], beta=beta[:, rows], state=before
        )
        outputs.append(output)
        memories.append(memory)
    return torch.cat(outputs, dim=1), torch.cat(memories)


def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    r"""The same rule, a chunk of tokens at a time. See the module's contract; chunk_size is 8, 16, 32, ...

    Inside a chunk that starts from memory S, with D_ij = exp(decay_{j+1} + ... + decay_i) for j <= i and
    d_i = exp(decay_1 + ... + decay_i), the corrections W [C, V] of all its tokens solve one triangular system:

        (I + A) W = beta (V - d K S)          A_ij = beta_i (k_i . k_j) D_ij   for j < i
        O  = d Q S + (Q K^T * D) W
        S' = d_C S + (D_C K)^T W
    """
    chunk_size = min(chunk_size, max(8, 1 << (query.shape[1] - 1).bit_length()))
    if cu_seqlens is not None:
        return _packed(query, key, value, decay, beta, state, cu_seqlens, chunk_size)
    output, memories = _scan(query, key, value, decay, beta, state, chunk_size, [(0, query.shape[1])])
    return output, memories


def _scan(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, chunk_size: int,
    documents: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Runs the chunks in order. `documents` are spans [start, end) that begin at multiples of chunk_size; each starts
    from its own row of `state` and leaves its own memory."""
    batch, tokens, groups, width = key.shape
    heads, out = value.shape[2:]
    dtype, one_document = wide_dtype(query, key, value, decay, beta), len(documents) == 1
    first_chunks = {start // chunk_size: index for index, (start, _) in enumerate(documents)}
    last_chunks = {max(start, end - 1) // chunk_size for start, end in documents}
    # The memories of the value heads that share a key head lie side by side: [B, G, K, R*V].
    empty = torch.zeros(batch, groups, width, heads // groups * out, dtype=dtype, device=value.device)
    if state is not None:
        state = rearrange(state.to(dtype), "b (g r) k v -> b g k (r v)", g=groups)
    memory, outputs, memories = empty, [], []
    step = _tokens_at_once(value, batch * heads * max(width, out), chunk_size)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        qk, v, g, b = _chunks(query[:, rows], key[:, rows], value[:, rows], decay[:, rows], beta[:, rows], chunk_size)
        block = _inside(qk, v, g, b)
        for c in range(v.shape[0]):
            before = first_chunks.get(start // chunk_size + c)
            if before is not None:
                memory = empty if state is None else state if one_document else state[before : before + 1]
            output, memory = _one_chunk(tuple(part[c] for part in block), memory)
            outputs.append(output.to(value.dtype))
            if start // chunk_size + c in last_chunks:
                memories.append(memory)
    output = rearrange(torch.stack(outputs), "n b g r c v -> b (n c) (g r) v")[:, :tokens]
    return output, rearrange(torch.cat(memories), "b g k (r v) -> b (g r) k v", v=out)


def _tokens_at_once(value: Tensor, elements_per_token: int, chunk_size: int) -> int:
    if value.device.type != "cpu":
        return value.shape[1] + chunk_size  # a GPU has room for all chunks, and wants large products
    return max(1, _BLOCK_BYTES // (4 * elements_per_token * chunk_size)) * chunk_size


def _chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, chunk_size: int):  # noqa: ANN202
    """Widened, normalised and cut into n chunks: queries above keys [n, B, G, 2C, K], value [n, B, G, R, C, V], decay and
    beta [n, B, G, R, C]. The last chunk is filled up with tokens that neither forget nor write."""
    groups, missing, dtype = key.shape[2], -query.shape[1] % chunk_size, wide_dtype(query, key, value, decay, beta)
    qk, v, g, b = torch.stack([query, key]), value, decay, beta
    if missing:
        qk, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (qk, v))
        g, b = (F.pad(x, (0, 0, 0, missing)) for x in (g, b))
    qk = l2_norm(rearrange(qk, "s b (n c) g k -> n b g (s c) k", c=chunk_size).to(dtype))
    scale = torch.ones(2 * chunk_size, 1, dtype=dtype, device=qk.device)
    scale[:chunk_size] = qk.shape[-1] ** -0.5
    v = rearrange(v.to(dtype), "b (n c) (g r) v -> n b g r c v", c=chunk_size, g=groups)
    g, b = (rearrange(x.to(dtype), "b (n c) (g r) -> n b g r c", c=chunk_size, g=groups).contiguous() for x in (g, b))
    return qk * scale, v, g, b


def _inside(qk: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What depends on one chunk alone, for all n chunks at once. Adds to qk and v: solve = (I + A)^-1 diag(beta) and
    attend = Q K^T * D [n, B, G, R, C, C], and the decay since the chunk's start and to its end [n, B, G, R, C]."""
    between = forgetting(segment_sums(decay))
    keys = qk[..., qk.shape[-2] // 2 :, :]
    scores = (qk @ keys.mT)[:, :, :, None]  # Q K^T and K K^T once per key head
    q_scores, k_scores = scores.chunk(2, dim=-2)
    inverse = unit_lower_inverse((k_scores * between * beta[..., None]).tril(-1))
    # Entry (i, j) of the inverse carries D_ij as a factor: where that is nothing, so is the entry, rounding apart.
    solve = inverse.masked_fill(between == 0, 0) * beta[..., None, :]
    return qk, v, solve, q_scores * between, forgetting(decay.cumsum(-1)), between[..., -1, :]


def _one_chunk(chunk: tuple[Tensor, ...], memory: Tensor) -> tuple[Tensor, Tensor]:
    """(output [B, G, R, C, V], memory [B, G, K, R*V]) of one chunk of what `_inside` gives, from the memory before it."""
    qk, v, solve, attend, since_start, to_end = chunk
    repeats, size, out = v.shape[2:]
    reach = since_start[..., None]
    recalled = rearrange(qk @ memory, "b g c (r v) -> b g r c v", r=repeats)  # what q and k read from before the chunk
    by_query, by_key = recalled[..., :size, :], recalled[..., size:, :]
    write = solve @ torch.addcmul(v, reach, by_key, value=-1)
    output = torch.addcmul(attend @ write, reach, by_query)
    brought = rearrange(to_end[..., None] * write, "b g r c v -> b g c (r v)")
    kept = reach[..., -1, 0].repeat_interleave(out, dim=-1)[:, :, None]  # [B, G, 1, R*V]
    return output, torch.addcmul(qk[..., size:, :].mT @ brought, memory, kept)


def inplace_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked form without a backward: the scan reuses its memory, which on a CPU saves what fresh pages cost.

    See the module's contract; packed documents are not taken.
    """
    if query.shape[1] == 1:
        return _one_token(query, key, value, decay, beta, state)
    (batch, tokens, groups, width), (heads, out) = key.shape, value.shape[2:]
    each, dtype = heads // groups, wide_dtype(query, key, value, decay, beta)
    size = min(CHUNK, max(8, 1 << (tokens - 1).bit_length()))
    memory = torch.zeros(batch, groups, width, each, out, dtype=dtype)
    if state is not None:
        memory.copy_(rearrange(state, "b (g r) k v -> b g k r v", g=groups))
    output = torch.empty(batch, tokens, heads, out, dtype=value.dtype)
    work = _Work(batch * groups, each, size, out, dtype)
    step = 4 * _tokens_at_once(value, batch * heads * max(width, out), size)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        qk, v, g, b = _chunks(query[:, rows], key[:, rows], value[:, rows], decay[:, rows], beta[:, rows], size)
        block = _inside(qk, v, g, b)
        for c in range(v.shape[0]):
            here = slice(start + c * size, min(start + (c + 1) * size, tokens))
            answer = work.one_chunk(tuple(part[c] for part in block), memory)
            output[:, here] = rearrange(answer, "b g r c v -> b c (g r) v")[:, : here.stop - here.start]
    return output, rearrange(memory, "b g k r v -> b (g r) k v").contiguous()


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition's step with one pass over the memory for each of forget, recall, write and answer."""
    q, k, v, decay, beta = widen(query, key, value, decay, beta)
    (batch, _, heads, out), width = v.shape, q.shape[-1]
    repeats = heads // k.shape[2]
    q, k = (l2_norm(x).repeat_interleave(repeats, dim=2).view(batch * heads, 1, width) for x in (q, k))
    memory = (_initial(state, q, v) * decay[:, 0].exp()[..., None, None]).view(batch * heads, width, out)
    write = beta.view(-1, 1, 1) * (v.reshape(-1, 1, out) - k @ memory)
    memory.baddbmm_(k.mT, write)
    answer = (q @ memory).mul_(width**-0.5)
    return answer.view(value.shape).to(value.dtype), memory.view(batch, heads, width, out)


class _Work:
    """`_one_chunk` with its buffers made once: reads [B*G, 2C, R*V], three of [B*G, R, C, V], one of [B*G, C, R, V]."""

    def __init__(self, rows: int, each: int, size: int, out: int, dtype: torch.dtype) -> None:
        self.reads = torch.empty(rows, 2 * size, each * out, dtype=dtype)
        self.wanted, self.answer, self.write = (torch.empty(rows, each, size, out, dtype=dtype) for _ in range(3))
        self.brought = torch.empty(rows, size, each, out, dtype=dtype)

    def one_chunk(self, chunk: tuple[Tensor, ...], memory: Tensor) -> Tensor:
        """The output [B, G, R, C, V], good until the next call; memory [B, G, K, R, V] is written in place."""
        qk, v, solve, attend, since_start, to_end = (part.flatten(0, 1) for part in chunk)
        rows, each, size, out = self.write.shape
        side_by_side = memory.view(rows, -1, each * out)
        torch.bmm(qk, side_by_side, out=self.reads)  # what q and k read from before the chunk
        read, reach = self.reads.view(rows, 2 * size, each, out).transpose(1, 2), since_start[..., None]
        torch.sub(v, torch.mul(read[:, :, size:], reach, out=self.wanted), out=self.wanted)
        flat = self.write.view(-1, size, out)
        torch.bmm(solve.flatten(0, 1), self.wanted.view(-1, size, out), out=flat)
        torch.mul(read[:, :, :size], reach, out=self.answer)
        self.answer.view(-1, size, out).baddbmm_(attend.flatten(0, 1), flat)
        torch.mul(self.write.transpose(1, 2), to_end.mT[..., None], out=self.brought)
        memory.view(rows, -1, each, out).mul_(since_start[:, None, :, -1:])
        side_by_side.baddbmm_(qk[:, size:].mT, self.brought.view(rows, size, -1))
        return self.answer.view(*chunk[1].shape)


def _cannot_be_in_place(query: Tensor, *args: Tensor, cu_seqlens: Tensor | None = None, **options: Tensor | None) -> str | None:
    if query.device.type != "cpu":
        return f"query is on {query.device}, not on a CPU"
    if cu_seqlens is not None:
        return "cu_seqlens: it does not keep packed documents apart"
    return "a graph is being compiled" if torch.compiler.is_compiling() else None


def segment_sums(decay: Tensor) -> Tensor:
    """[..., C] -> [..., C, C]: decay_{j+1} + ... + decay_i for j <= i, and -inf above the diagonal.

    Each entry is summed on its own, not as a difference of two running sums: behind a gate of -80 such a difference
    keeps no digit of a gate of -1e-4, and its gradient none at all.
    """
    above = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).triu()
    gates = decay[..., :, None].masked_fill(above, 0)  # [.., i, j]: gate i where it lies behind j
    return gates.cumsum(-2).masked_fill(above.triu(1), float("-inf"))


def forgetting(logs: Tensor) -> Tensor:
    """exp(logs), exactly zero where less than 1e-13 (float64: 1e-35) would be left.

    Without the floor the products that follow fill with denormal numbers, which a CPU handles in microcode: at hard
    gates every form of the rule becomes several times slower, and no digit of the result depends on them.
    """
    floor = -80.0 if logs.dtype == torch.float64 else -30.0
    return F.threshold(logs, floor, float("-inf")).exp()


def _packed(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Documents laid apart so that each begins at a chunk, which keeps them apart for good, and gathered back."""
    bounds = cu_seqlens.to(query.device)
    lengths = bounds.diff()
    room = (lengths + chunk_size - 1) // chunk_size * chunk_size
    starts = room.cumsum(0) - room
    document = torch.repeat_interleave(lengths)
    place = torch.arange(query.shape[1], device=query.device) - bounds[:-1][document] + starts[document]
    total = int(room.sum())

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(1, total, *x.shape[2:]).index_copy(1, place, x)

    spans = [(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=False)]
    query, key, value, decay, beta = (spread(x) for x in (query, key, value, decay, beta))
    output, memories = _scan(query, key, value, decay, beta, state, chunk_size, spans)
    return output.index_select(1, place), memories


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain PyTorch form: the definition for one token, chunks for more. See the module's contract."""
    form = recurrent_gated_delta_rule if query.shape[1] == 1 else chunked_gated_delta_rule
    return form(query, key, value, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    sizes = [(2, 1, 1, 1, 8, 12), (1, 65, 2, 6, 16, 24), (2, 129, 1, 2, 12, 8), (1, 130, 2, 4, 8, 16)]
    for number, (batch, tokens, groups, heads, width, out) in enumerate(sizes):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        qk = [random(batch, tokens, groups, width).to(device, dtype) for _ in range(2)]
        value = random(batch, tokens, heads, out).to(device, dtype)
        wide = torch.promote_types(torch.float32, dtype)
        decay = -torch.exp(random(batch, tokens, heads) * 2 - 3).to(device, wide)
        options = {"decay": decay, "beta": random(batch, tokens, heads).sigmoid().to(device, wide)}
        if number == 3:
            options["cu_seqlens"] = torch.tensor([0, 1, 64, 67, 130], device=device)
        rows = 4 if number == 3 else batch
        if number != 1:
            options["state"] = random(rows, heads, width, out).to(device, wide)
        yield (*qk, value), options


backends.register("gated_delta_rule", "inplace", inplace_gated_delta_rule, _cannot_be_in_place, differentiable=False)
backends.register("gated_delta_rule", "torch", gated_delta_rule)
backends.register("gated_delta_rule", "recurrent", recurrent_gated_delta_rule)
backends.add_cases("gated_delta_rule", recurrent_gated_delta_rule, _cases)
