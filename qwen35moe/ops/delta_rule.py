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
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.attention_map import attention_map as attention_map
from qwen35moe.ops.attention_map import writers as writers
from qwen35moe.ops.cpu.delta_chunks import chunked_forward, plan
from qwen35moe.ops.cpu.delta_gradient import chunked_operator
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import widen, without_autocast

CHUNK = 32  # smaller chunks save C^2 work, larger ones launches: 32 is fastest on CPUs


@without_autocast
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
    """The same rule, a chunk of tokens at a time, differentiable once. See the module's contract; chunk_size is 8, 16,
    32, ... The equations are in `ops.delta_rule_chunks` and `ops.delta_rule_gradient`."""
    return chunked_operator(query, key, value, decay, beta, state, cu_seqlens, chunk_size)


def inplace_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked form without a backward, for which nothing is kept. See the module's contract."""
    if query.shape[1] == 1 and cu_seqlens is None:
        return _one_token(query, key, value, decay, beta, state)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return chunked_forward(plan(key, value, cu_seqlens, CHUNK), query, key, value, decay, beta, state, rows)


@without_autocast
def _one_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v, decay, beta = widen(query, key, value, decay, beta)
    answer, memory = one_token(torch.cat([q, k], dim=1), v[:, 0], decay[:, 0].exp(), beta[:, 0], _initial(state, q, v))
    return answer[:, None].to(value.dtype), memory


def one_token(qk: Tensor, v: Tensor, kept: Tensor, beta: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The definition's step, with one reading of the memory for both questions: S'^T q = (e^decay S)^T q + (k . q) write.

    qk [B, 2, G, K]: the query above the key, as given; v [B, H, V]; kept = e^decay and beta [B, H]; before [B, H, K, V];
    one dtype, float32 at least. Returns the output [B, H, V] and the memory after the token.
    """
    batch, heads, width, out = before.shape
    rows, groups = batch * heads, qk.shape[2]
    unit = l2_norm(qk).transpose(1, 2)[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(rows, 2, width)
    memory = before.reshape(rows, width, out) * kept.reshape(rows, 1, 1)
    by_query, by_key = torch.bmm(unit, memory).chunk(2, dim=1)
    write = torch.sub(v.reshape(rows, 1, out), by_key).mul_(beta.reshape(rows, 1, 1))
    query, key = unit.chunk(2, dim=1)
    answer = by_query.addcmul_(torch.linalg.vecdot(query, key)[..., None], write).mul_(width**-0.5)
    return answer.reshape(batch, heads, out), memory.baddbmm_(key.mT, write).view(before.shape)


def _cannot_be_in_place(query: Tensor, *args: Tensor, **options: Tensor | None) -> str | None:
    return "a graph is being compiled" if torch.compiler.is_compiling() else None


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


backends.register("gated_delta_rule", "chunked_cpu", inplace_gated_delta_rule, _cannot_be_in_place, differentiable=False)
backends.register("gated_delta_rule", "torch", gated_delta_rule)
backends.register("gated_delta_rule", "recurrent", recurrent_gated_delta_rule)
backends.add_cases("gated_delta_rule", recurrent_gated_delta_rule, _cases)
