"""Causal attention on a CPU, a block of queries against a block of keys at a time. Contract in `ops.attention`.

    blocks       products in float32; keys and values in half precision are converted to float32 a block at a time
    bf16_blocks  products in bfloat16, for processors that have them

The query heads of a key head are rows of one product, and the key heads are its batch. A block of queries meets only the keys
up to its end, whereas SDPA on a CPU computes up to 512 keys behind it, in bfloat16 too with products in float32 on processors
without AMX. Softmax is exact, block by block (Milakov and Gimelshein 2018): no [T, P] tensor exists. No backward.

Which of them runs in place of SDPA is measured on this machine: see `fastest`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from qwen35moe.backends import measured
from qwen35moe.backends.transforms import forward_ad, interpreter
from qwen35moe.ops.attention import attention
from qwen35moe.ops.cpu import products
from qwen35moe.ops.cpu.attention import sdpa_attention
from qwen35moe.taps.active import ACTIVE as ACTIVE_TAPS

_ROWS = 256  # rows (queries times query heads) per key head and thread in a product, twice as many for long inputs
_KEYS = 512  # keys in a block: a block of scores is 0.5 MB for each key head
_GROUPS = 8  # key heads computed at once
_SAMPLED = 16  # the estimate of a row's maximum reads one key of so many
_FEW = 128  # queries per document, below which SDPA runs
_SMALL = 1 << 26  # products of numbers in the scores, below which all forms take a few milliseconds and SDPA runs
_LONG = 1024  # queries from which the forms are measured again
_HALF = (torch.bfloat16, torch.float16)

_CHOSEN: dict[tuple[torch.dtype, int, bool], str] = {}  # (dtype, width of a head, whether long) -> the fastest form

Block = Callable[[Tensor, Tensor, Tensor, int, float, "_Buffers"], Tensor]


class _Buffers:
    """Memory that every block reuses: fresh pages cost as much as the softmax."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor, valid until the name is taken again."""
        count = 1
        for size in shape:
            count *= size
        buffer = self.tensors.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self.tensors[name] = torch.empty(count, dtype=dtype, device="cpu")
        return buffer[:count].view(shape)


def _hide(scores: Tensor, first: int, start: int, repeats: int) -> None:
    """-inf in the scores [G, R m, keys] of the keys from position `start` on that lie behind a query, of which the first is at
    position `first`."""
    hidden = start + scores.shape[-1] - first - 1  # keys behind the first query
    if hidden > 0:
        m = scores.shape[1] // repeats
        query = torch.arange(first, first + m, device="cpu")[:, None]
        behind = torch.arange(start, start + scores.shape[-1], device="cpu")[-hidden:] > query
        scores.unflatten(1, (repeats, m))[..., -behind.shape[-1] :].masked_fill_(behind, float("-inf"))


def _wide_block(query: Tensor, key: Tensor, value: Tensor, first: int, scale: float, buffers: _Buffers) -> Tensor:
    """Attention of a block of queries [G, R, m, K], the first at position `first`, to key [G, P, K] and value [G, P, V], with
    products in float32. Returns [G, R m, V] in float32."""
    G, R, m, K = query.shape
    positions, V = value.shape[1:]
    q = buffers.take("query", (G, R, m, K)).copy_(query).mul_(scale).view(G, R * m, K)
    out = buffers.take("out", (G, R * m, V))
    largest = total = q.new_empty(0)
    for start in range(0, positions, _KEYS):
        k, v = (x[:, start : start + _KEYS] for x in (key, value))
        if k.dtype != torch.float32:
            k, v = (buffers.take(name, tuple(x.shape)).copy_(x) for name, x in (("key", k), ("value", v)))
        scores = torch.bmm(q, k.mT, out=buffers.take("scores", (G, R * m, k.shape[1])))
        _hide(scores, first, start, R)
        maximum = scores.amax(-1, keepdim=True)
        if start == 0:  # every query attends to the first key, so that this maximum is finite
            largest, total = maximum, scores.sub_(maximum).exp_().sum(-1, keepdim=True)
            out.zero_()  # torch.bmm is slower than torch.baddbmm
        else:
            maximum = torch.maximum(largest, maximum)
            decrease = (largest - maximum).exp_()
            largest = maximum
            total.mul_(decrease).add_(scores.sub_(maximum).exp_().sum(-1, keepdim=True))
            out.mul_(decrease)
        torch.baddbmm(out, scores, v, out=out)
    return out.div_(total)


def _bf16_block(query: Tensor, key: Tensor, value: Tensor, first: int, scale: float, buffers: _Buffers) -> Tensor:
    """As `_wide_block`, with products in bfloat16.

    Scores are rounded to bfloat16, as in eager attention, but as differences from about the row's maximum, so that those of
    large weights lose little: the estimate is the largest of the query's score with its own key and with a sample of the keys
    before the block. The sums over blocks of keys are in float32.
    """
    G, R, m, K = query.shape
    positions, V = value.shape[1:]
    low = torch.bfloat16
    q = buffers.take("query", (G, R, m, K), low).copy_(query).view(G, R * m, K)
    own = key[:, first : first + m]
    own = torch.nn.functional.pad(own, (0, 0, 0, m - own.shape[1]))  # queries of padding may lie behind the last key
    largest = (q.view(G, R, m, K) * own[:, None]).sum(-1).view(G, R * m, 1)
    if first:
        largest = torch.maximum(largest, torch.bmm(q, key[:, :first:_SAMPLED].mT).amax(-1, keepdim=True))
    shift = (-scale * largest).to(low)
    out = buffers.take("out", (G, R * m, V))
    part = buffers.take("part", (G, R * m, V), low)
    total = out.new_zeros(())
    for start in range(0, positions, 2 * _KEYS):
        k, v = (x[:, start : start + 2 * _KEYS] for x in (key, value))
        scores = buffers.take("scores", (G, R * m, k.shape[1]), low).copy_(shift)
        torch.baddbmm(scores, q, k.mT, alpha=scale, out=scores)
        _hide(scores, first, start, R)
        total = total + scores.exp_().sum(-1, keepdim=True, dtype=torch.float32)
        torch.bmm(scores, v, out=part)
        out.copy_(part) if start == 0 else out.add_(part)
    if not torch.isfinite(total).all():  # a score far above the estimate
        return _wide_block(query, key, value, first, scale, _Buffers())
    return out.div_(total)


def _one_row(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, first: int, scale: float, block: Block, buffers: _Buffers
) -> None:
    """query [T, H, K], the first at position `first`, key [P, G, K], value [P, G, V]; writes out [T, H, V]."""
    tokens, (positions, groups) = query.shape[0], key.shape[:2]
    repeats = query.shape[1] // groups
    q, o = (x.unflatten(1, (groups, repeats)).permute(1, 2, 0, 3) for x in (query, out))
    k, v = key.transpose(0, 1), value.transpose(0, 1)
    for g in range(0, groups, _GROUPS):
        heads = slice(g, g + _GROUPS)
        rows = _ROWS * max(1 + (positions >= _LONG), torch.get_num_threads() // min(groups, _GROUPS))
        step = max(1, rows // repeats)
        for start in range(0, tokens, step):
            part = q[heads, :, start : start + step]
            last = min(positions, first + start + part.shape[2])
            result = block(part, k[heads, :last], v[heads, :last], first + start, scale, buffers)
            o[heads, :, start : start + step] = result.view(*part.shape[:3], -1)


def _in_blocks(
    block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float, starts: int | Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    out, buffers = query.new_empty(*query.shape[:3], value.shape[-1]), _Buffers()
    firsts = starts.tolist() if isinstance(starts, Tensor) else [starts] * len(query)
    for q, k, v, o, first in zip(query, key, value, out, firsts, strict=True):
        if cu_seqlens is None:
            _one_row(q, k, v, o, first, scale, block, buffers)
        else:
            for start, end in pairwise(cu_seqlens.tolist()):
                document = slice(start, end)
                _one_row(q[document], k[document], v[document], o[document], 0, scale, block, buffers)
    return out


def _cannot(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    if dropout:
        return "it has no dropout"
    if query.dtype is torch.float64 or not query.dtype is key.dtype is value.dtype:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, not all float32 or half precision"
    if not products.plain(query, key, value):
        return "a tensor is a subclass, or a mode sees torch's operators"
    return "autocast is enabled" if torch.is_autocast_enabled("cpu") else None


def _cannot_multiply_bf16(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    if query.dtype != torch.bfloat16:
        return f"query is {query.dtype}, not bfloat16"
    return _cannot(query, key, value, scale=scale, starts=starts, cu_seqlens=cu_seqlens, dropout=dropout)


def _slower(name: str, query: Tensor, key: Tensor, cu_seqlens: Tensor | None) -> str | None:
    tokens = query.shape[1] // (1 if cu_seqlens is None else max(1, len(cu_seqlens) - 1))
    if tokens < _FEW:
        return f"{tokens} queries per document, SDPA is as fast below {_FEW}"
    if query.numel() * min(key.shape[1], tokens) < _SMALL:
        return "a small call, in which SDPA is as fast"
    best = fastest(query.dtype, query.shape[-1], tokens)
    return None if best == name else f"{best} is as fast or faster for this dtype and number of queries on this machine"


def fastest(dtype: torch.dtype, width: int, tokens: int) -> str:
    """The fastest form for heads of this width: measured once for each dtype and width, and again for long inputs."""
    if not measured.allowed():
        return "torch"
    kind = (dtype, width, tokens >= _LONG)
    if kind not in _CHOSEN:
        size = _LONG if kind[2] else _LONG // 2
        query, key, value = (torch.ones(1, size, heads, width, dtype=dtype, device="cpu") for heads in (4, 2, 2))
        forms = {"torch": sdpa_attention, "blocks": attention_blocks}
        if dtype == torch.bfloat16 and products.multiplies(dtype):
            forms["bf16_blocks"] = attention_bf16_blocks
        calls = {name: partial(_timed, form, query, key, value) for name, form in forms.items()}
        title = f"{str(dtype)[6:]}, heads of width {width}, {'' if kind[2] else 'fewer than '}{_LONG} queries"
        with torch.no_grad():
            _CHOSEN[kind] = measured.fastest("attention", title + (" or more" if kind[2] else ""), calls)
    return _CHOSEN[kind]


def _timed(form: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    return form(query, key, value, scale=query.shape[-1] ** -0.5)


def _blocks_slower(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    return _slower("blocks", query, key, cu_seqlens)


def _bf16_blocks_slower(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    if not products.multiplies(torch.bfloat16):
        return "oneDNN has no bfloat16 products on this processor"
    return _slower("bf16_blocks", query, key, cu_seqlens)


@attention.implementation(
    "bf16_blocks", _cannot_multiply_bf16, before="torch", slower=_bf16_blocks_slower, skips=("scores",), differentiable=False,
    device="cpu", compiles=False, transforms=(),
)
def attention_bf16_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """Blocks with products in bfloat16 and sums over the blocks in float32. No backward."""
    return _in_blocks(_bf16_block, query, key, value, scale, starts, cu_seqlens)


@attention.implementation(
    "blocks", _cannot, before="torch", slower=_blocks_slower, skips=("scores",), differentiable=False, device="cpu",
    compiles=False, transforms=(),
)
def attention_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """Blocks with products in float32. No backward."""
    return _in_blocks(_wide_block, query, key, value, scale, starts, cu_seqlens)


def pick(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    """SDPA for few queries on a CPU, without going through the other forms: a cached token takes few microseconds."""
    if torch.compiler.is_compiling() or ACTIVE_TAPS or query.shape[1] >= _FEW or not query.is_cpu:
        return None
    return "torch" if interpreter() is None and forward_ad._current_level < 0 else None


attention.pick = pick
