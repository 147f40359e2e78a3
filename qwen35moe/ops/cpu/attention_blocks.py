"""Causal attention on a CPU, a block of queries against a block of keys at a time. Contract in `ops.attention`.

    blocks       products in float32; keys and values in half precision are converted to float32 a block at a time
    bf16_blocks  products in bfloat16, for processors that have them

The query heads of a key head are rows of one product, and the key heads are its batch. A block of queries meets only the keys
up to its end; SDPA, which has no causal form for a part of the queries, computes the hidden scores of a cached chunk as well.
Softmax is exact, block by block (Milakov and Gimelshein 2018): at most 4 MB of scores exist at once. No backward.

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
from qwen35moe.ops.precision import wide_dtype
from qwen35moe.taps.active import ACTIVE as ACTIVE_TAPS

_ROWS = 256  # rows (queries times query heads) per key head and thread in a product, twice as many for long inputs
_KEYS = 512  # keys in a block: a block of scores is 0.5 MB for each key head
_GROUPS = 8  # key heads computed at once
_SCORES = 1 << 20  # scores for which all keys are one block: 4 MB
_SAMPLED = 16  # the estimate of a row's maximum reads one key of so many
_SMALL = 1 << 23  # products of numbers in the scores, below which all forms take well under a millisecond and SDPA runs
_LONG = 1024  # keys from which a block of queries has twice as many rows
# Kinds of calls, in which the forms are measured apart: queries and keys of the measurement.
_KINDS = {
    "one query, 4096 keys or more": (1, 4096), "few queries, 16 times as many keys or more": (4, 2048),
    "256 queries or more": (512, 512), "1536 queries or more": (2048, 2048),
}  # fmt: skip

_CHOSEN: dict[tuple[torch.dtype, int, str], str] = {}  # (dtype, width of a head, kind of call) -> the fastest form

Block = Callable[[Tensor, Tensor, Tensor, int, float, "_Buffers"], Tensor]


class _Buffers:
    """Memory that every block reuses: fresh pages cost as much as the softmax. dtype: of the arithmetic, float32 at least."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, valid until the name is taken again."""
        count = 1
        for size in shape:
            count *= size
        buffer = self.tensors.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self.tensors[name] = torch.empty(count, dtype=dtype or self.dtype, device="cpu")
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


def _widened(x: Tensor, name: str, buffers: _Buffers) -> Tensor:
    """Keys or values [G, keys, K] in float32, in memory in the order that they have: head or key first."""
    if x.dtype is buffers.dtype:
        return x
    if x.stride(0) < x.stride(1):
        x = x.transpose(0, 1)
        return buffers.take(name, tuple(x.shape)).copy_(x).transpose(0, 1)
    return buffers.take(name, tuple(x.shape)).copy_(x)


def _wide_block(query: Tensor, key: Tensor, value: Tensor, first: int, scale: float, buffers: _Buffers) -> Tensor:
    """Attention of a block of queries [G, R, m, K], the first at position `first`, to key [G, P, K] and value [G, P, V], with
    products in float32. Returns [G, R m, V] in float32."""
    G, R, m, K = query.shape
    q = buffers.take("query", (G, R, m, K)).copy_(query).mul_(scale).view(G, R * m, K)
    if q.shape[0] * q.shape[1] * key.shape[1] <= _SCORES:
        return _at_once(q, key, value, first, R, buffers)
    out = buffers.take("out", (*q.shape[:2], value.shape[-1])).zero_()
    largest = total = out.new_empty(0)
    for start in range(0, key.shape[1], _KEYS):
        k, v = (_widened(x[:, start : start + _KEYS], name, buffers) for x, name in ((key, "key"), (value, "value")))
        scores = torch.bmm(q, k.mT, out=buffers.take("scores", (*q.shape[:2], k.shape[1])))
        _hide(scores, first, start, R)
        maximum = scores.amax(-1, keepdim=True)
        if start == 0:  # every query attends to the first key, so that this maximum is finite
            largest, total = maximum, scores.sub_(maximum).exp_().sum(-1, keepdim=True)
        else:
            maximum = torch.maximum(largest, maximum)
            decrease = (largest - maximum).exp_()
            largest = maximum
            total.mul_(decrease).add_(scores.sub_(maximum).exp_().sum(-1, keepdim=True))
            out.mul_(decrease)
        torch.baddbmm(out, scores, v, out=out)
    return out.div_(total)


def _at_once(q: Tensor, key: Tensor, value: Tensor, first: int, repeats: int, buffers: _Buffers) -> Tensor:
    """As `_wide_block`, of scaled float32 queries [G, R m, K], with one softmax over all keys."""
    step = key.shape[1] if key.dtype is buffers.dtype else _KEYS  # what is converted to float32 at once
    scores = buffers.take("scores", (*q.shape[:2], key.shape[1]))
    for start in range(0, key.shape[1], step):
        keys = slice(start, start + step)
        torch.bmm(q, _widened(key[:, keys], "key", buffers).mT, out=scores[..., keys])
    _hide(scores, first, 0, repeats)
    torch.softmax(scores, -1, out=scores)
    out = buffers.take("out", (*q.shape[:2], value.shape[-1])).zero_()
    for start in range(0, key.shape[1], step):
        keys = slice(start, start + step)
        torch.baddbmm(out, scores[..., keys], _widened(value[:, keys], "value", buffers), out=out)  # torch.bmm is slower
    return out


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
        step = max(1, min(rows // repeats, max(64, tokens // 16)))  # a block's products with hidden keys are lost
        for start in range(0, tokens, step):
            part = q[heads, :, start : start + step]
            last = min(positions, first + start + part.shape[2])
            result = block(part, k[heads, :last], v[heads, :last], first + start, scale, buffers)
            o[heads, :, start : start + step] = result.view(*part.shape[:3], -1)


def _in_blocks(
    block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float, starts: int | Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    out, buffers = query.new_empty(*query.shape[:3], value.shape[-1]), _Buffers(wide_dtype(query))
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
        return "a tensor is a subclass, or a dispatch mode is active"
    return "autocast is enabled" if torch.is_autocast_enabled("cpu") else None


def _cannot_multiply_bf16(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    if query.dtype != torch.bfloat16:
        return f"query is {query.dtype}, not bfloat16"
    return _cannot(query, key, value, scale=scale, starts=starts, cu_seqlens=cu_seqlens, dropout=dropout)


def kind_of(query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None) -> str | None:
    """The kind of a call in `_KINDS`; None for those in which SDPA is as fast, or the difference too small to measure."""
    tokens, positions = query.shape[1], key.shape[1]
    if query.numel() * positions < _SMALL:
        return None
    if cu_seqlens is not None:
        tokens = positions = tokens // max(1, len(cu_seqlens) - 1)
    one, few, short, long = _KINDS
    if tokens >= 256:
        return long if tokens >= 1536 else short
    if tokens == 1:  # in float32 there is nothing to convert, and SDPA reads keys and values as fast
        return one if positions >= 4096 and query.dtype != torch.float32 else None
    return few if positions >= 16 * tokens else None


def _slower(name: str, query: Tensor, key: Tensor, cu_seqlens: Tensor | None) -> str | None:
    kind = kind_of(query, key, cu_seqlens)
    if kind is None:
        return "SDPA is as fast in small calls, and below 256 queries unless there are 16 times as many keys"
    best = fastest(query.dtype, query.shape[-1], kind)
    return None if best == name else f"{best} is as fast or faster for this dtype and number of queries on this machine"


def fastest(dtype: torch.dtype, width: int, kind: str) -> str:
    """The fastest form for heads of this width: measured once for each dtype, width and kind of call."""
    if not measured.allowed():
        return "torch"
    name = _CHOSEN.get((dtype, width, kind))
    if name is None:
        tokens, positions = _KINDS[kind]
        heads, groups = (8, 2) if tokens < _LONG else (2, 1)  # long calls take tenths of a second
        shapes = (tokens, heads), (positions, groups), (positions, groups)
        query, key, value = (torch.ones(1, *shape, width, dtype=dtype, device="cpu") for shape in shapes)
        forms = {"torch": sdpa_attention, "blocks": attention_blocks}
        if dtype == torch.bfloat16 and products.multiplies(dtype):
            forms["bf16_blocks"] = attention_bf16_blocks
        calls = {name: partial(_timed, form, query, key, value) for name, form in forms.items()}
        with torch.no_grad():
            name = measured.fastest("attention", f"{str(dtype)[6:]}, heads of width {width}, {kind}", calls)
        _CHOSEN[dtype, width, kind] = name
    return name


def _timed(form: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, number: int) -> Tensor:
    return form(query, key, value, scale=query.shape[-1] ** -0.5, starts=key.shape[1] - query.shape[1])


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
    """SDPA for small calls on a CPU, without going through the other forms: a cached token takes few microseconds."""
    if torch.compiler.is_compiling() or ACTIVE_TAPS or not query.is_cpu or kind_of(query, key, cu_seqlens) is not None:
        return None
    return "torch" if interpreter() is None and forward_ad._current_level < 0 else None


attention.pick = pick
