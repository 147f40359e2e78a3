"""The chunked gated delta rule in Triton, forward and backward, as one operation of torch.library each way.

    qwen35moe_kernels::delta_rule        query, key, value, decay, beta, state, cu_seqlens -> output, final state, and the
                                         tensors of the backward: (I + a)^-1, running sums, inverse norms, states, writes
    qwen35moe_kernels::delta_rule_back   -> the gradients of query, key, value, decay, beta and state

delta_rule_forward.py and delta_rule_backward.py hold the equations. Nothing waits for the device: the table of the chunks of
packed documents is computed on the device, with room for the largest possible number of chunks. Letters and shapes are those
of the operation `gated_delta_rule`; M is the length of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

CHUNK = 64
WIDEST = 256  # a program holds [K, 32] elements of the recurrent state in registers
WIDEST_FLOAT32_BACK = 64  # `queries_back` in float32 at K = 128 takes 288 KiB of shared memory; a Hopper GPU has 227
_DTYPES = (torch.float32, torch.bfloat16)


class Sizes(NamedTuple):
    """Sizes for which a kernel is compiled. KP: K rounded up to a power of two, at least 16, as tl.dot requires."""

    G: int
    H: int
    K: int
    V: int
    KP: int


def sizes(key: Tensor, value: Tensor) -> Sizes:
    width = key.shape[-1]
    return Sizes(key.shape[2], value.shape[2], width, value.shape[-1], _power_of_two(width))


def _power_of_two(width: int, most: int = 1 << 30) -> int:
    return min(most, max(16, 1 << (width - 1).bit_length()))


class Blocks(NamedTuple):
    """Columns of V in a program, by kernel, and the options of `queries_back` and `keys_back`."""

    outputs: int
    attend: int
    recur: int  # also of `recur_back`
    back: int
    options: dict[str, int]


def blocks(value: Tensor) -> Blocks:
    """The blocks for a call. docs/reference/kernels.md has the registers and spills on each architecture.

    A Hopper GPU multiplies from shared memory. On others the operands take registers too, so that blocks are smaller; ptxas
    12.8 and 12.9 then give `queries_back` and `keys_back` 32 registers and spill everything, unless a limit is set.
    """
    hopper, half = runtime.hopper(value), value.dtype == torch.bfloat16
    columns = (128 if hopper else 64, 128, 32, 64 if hopper else 32) if half else (32, 32, 32, 16)
    options = {"num_warps": 8, "num_stages": 1}
    if value.is_cuda and not hopper and torch.version.hip is None:
        options["maxnreg"] = 255
    return Blocks(*(_power_of_two(value.shape[-1], most) for most in columns), options)


class Chunks(NamedTuple):
    """The chunks of rows of one length, or of packed documents, which need the tables (see `chunks`)."""

    rows: int
    count: int
    bounds: Tensor | None = None  # [documents + 1]
    first: Tensor | None = None  # [documents]: index of the first chunk of each document
    spans: Tensor | None = None  # [count, 2]: begin and end of each chunk; unused ones are empty


def chunk_count(batch: int, tokens: int, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(rows, upper bound of the number of chunks). The bound follows from sizes alone: a document adds at most one chunk."""
    if cu_seqlens is None:
        return batch, batch * ((tokens + CHUNK - 1) // CHUNK)
    documents = cu_seqlens.shape[0] - 1
    return documents, tokens // CHUNK + documents


def chunks(batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Chunks:
    """The chunks of a call. The tables are computed on the device; the host does not read cu_seqlens."""
    rows, count = chunk_count(batch, tokens, cu_seqlens)
    if cu_seqlens is None:
        return Chunks(rows, count)
    bounds = cu_seqlens.to(device, torch.int64).contiguous()
    counts = (bounds.diff() + CHUNK - 1) // CHUNK
    ends = counts.cumsum(0)
    first = ends - counts
    index = torch.arange(count, device=device)
    document = torch.searchsorted(ends, index, right=True).clamp_max(rows - 1)
    begin = bounds[document] + (index - first[document]) * CHUNK
    end = torch.minimum(begin + CHUNK, bounds[document + 1])
    return Chunks(rows, count, bounds, first, torch.stack([begin, end], dim=-1))


def _rows(x: Tensor) -> Tensor:
    """x [B, T, heads, width] with one stride for the tokens of the whole batch, as a view of a projection has."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op("qwen35moe_kernels::delta_rule", mutates_args=())
def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward, which returns the tensors of `_outputs`. query, key [B, T, G, K], value [B, T, H, V], decay, beta [B, T, H],
    state [rows, H, K, V], cu_seqlens [documents + 1]."""
    kernels = runtime.kernels("delta_rule_forward")

    output, final, inverse, sums, norms, states, writes = results = _outputs(query, key, value, cu_seqlens)
    (batch, tokens), size = query.shape[:2], sizes(key, value)
    layout, total = chunks(batch, tokens, cu_seqlens, query.device), batch * tokens
    query, key, value = _rows(query), _rows(key), _rows(value)
    decay, beta = decay.contiguous(), beta.contiguous()
    initial = None if state is None else state.float().contiguous()
    packed, widen = cu_seqlens is not None, runtime.interpreted()
    q_strides, k_strides, v_strides = query.stride()[1:3], key.stride()[1:3], value.stride()[1:3]
    block = blocks(value)
    with runtime.on_device_of(query):
        kernels.prepare[layout.count, size.H](
            query, key, decay, beta, inverse, sums, norms, layout.spans, tokens, total, *q_strides, *k_strides,
            size.G, size.H, size.K, size.KP, 32, packed, widen, num_warps=2,
        )  # fmt: skip
        kernels.recur[layout.rows * size.H, -(-size.V // block.recur)](
            key, value, beta, inverse, sums, norms, initial, states, writes, final, layout.bounds, layout.first, tokens, total,
            *k_strides, *v_strides, *size, block.recur, CHUNK, packed, initial is not None, widen, num_warps=4, num_stages=2,
        )  # fmt: skip
        kernels.outputs[layout.count, size.H, -(-size.V // block.outputs)](
            query, key, sums, norms, states, writes, output, layout.spans, tokens, total, *q_strides, *k_strides, size.K**-0.5,
            *size, block.outputs, CHUNK, packed, widen, num_warps=4,
        )  # fmt: skip
    return results


@delta_rule.register_fake
def _outputs(
    query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised: output, final state, (I + a)^-1 [B, T, H, M], sums of the decays [2, B, T, H], inverse norms
    [2, B, T, G], the state before each chunk [chunks, H, K, V], writes [B, T, H, V].

    States and writes have the dtype of the inputs, in which they are multiplied.
    """
    (batch, tokens, heads, out), (groups, width) = value.shape, key.shape[2:]
    rows, count = chunk_count(batch, tokens, others[-1])
    wide = torch.float32
    return (
        value.new_empty(value.shape),
        value.new_empty(rows, heads, width, out, dtype=wide),
        value.new_empty(batch, tokens, heads, CHUNK),
        value.new_empty(2, batch, tokens, heads, dtype=wide),
        value.new_empty(2, batch, tokens, groups, dtype=wide),
        value.new_empty(count, heads, width, out),
        value.new_empty(value.shape),
    )


@torch.library.custom_op("qwen35moe_kernels::delta_rule_back", mutates_args=())
def delta_rule_back(
    d_output: Tensor, d_final: Tensor, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, cu_seqlens: Tensor | None,
    inverse: Tensor, sums: Tensor, norms: Tensor, states: Tensor, writes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, decay, beta and state, from those of the output and of the final state."""
    kernels = runtime.kernels("delta_rule_backward")

    d_query, d_key, d_value, d_decay, d_beta, d_initial = results = _gradients(d_output, d_final, query, key, value)
    (batch, tokens), size = query.shape[:2], sizes(key, value)
    layout, total = chunks(batch, tokens, cu_seqlens, query.device), batch * tokens
    query, key, value = _rows(query), _rows(key), _rows(value)
    beta, d_output, d_final = beta.contiguous(), d_output.contiguous(), d_final.contiguous()
    d_writes, d_states = torch.empty_like(writes), torch.empty_like(states)
    d_units = torch.empty(key.shape, dtype=torch.float32, device=key.device)
    packed, widen = cu_seqlens is not None, runtime.interpreted()
    q_strides, k_strides, v_strides = query.stride()[1:3], key.stride()[1:3], value.stride()[1:3]
    block, scale = blocks(value), size.K**-0.5
    with runtime.on_device_of(query):
        kernels.attend_back[layout.count, size.H, -(-size.V // block.attend)](
            query, key, sums, norms, d_output, d_writes, layout.spans, tokens, total, *q_strides, *k_strides, scale,
            *size, block.attend, CHUNK, packed, widen, num_warps=4,
        )  # fmt: skip
        kernels.recur_back[layout.rows * size.H, -(-size.V // block.recur)](
            query, key, beta, inverse, sums, norms, d_output, d_writes, d_final, d_states, d_initial, layout.bounds,
            layout.first, tokens, total, *q_strides, *k_strides, scale, *size, block.recur, CHUNK, packed, widen,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        kernels.queries_back[layout.count, size.G](
            query, key, sums, norms, states, writes, d_output, d_query, d_units, d_decay, layout.spans, tokens, total,
            *q_strides, *k_strides, scale, *size, block.back, CHUNK, packed, widen, **block.options,
        )  # fmt: skip
        kernels.keys_back[layout.count, size.G](
            key, value, beta, sums, norms, states, writes, d_writes, d_states, d_units, d_key, d_value, d_decay, d_beta,
            layout.spans, tokens, total, *k_strides, *v_strides, *size, block.back, CHUNK, packed, widen, **block.options,
        )  # fmt: skip
    return results


@delta_rule_back.register_fake
def _gradients(
    d_output: Tensor, d_final: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gates = value.new_empty(value.shape[:3], dtype=torch.float32)
    return (
        query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape),
        gates, torch.empty_like(gates), d_final.new_empty(d_final.shape),
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, decay, beta, state, cu_seqlens = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, beta, cu_seqlens, *output[2:])
    ctx.decay_dtype, ctx.state_dtype = decay.dtype, None if state is None else state.dtype
    ctx.final_shape = output[1].shape


def _back(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    query, key, value, beta, *saved = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(value)
    if d_final is None:
        d_final = value.new_zeros(ctx.final_shape, dtype=torch.float32)
    d_query, d_key, d_value, d_decay, d_beta, d_state = delta_rule_back(
        d_output, d_final, query, key, value, beta, *saved
    )
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return d_query, d_key, d_value, d_decay.to(ctx.decay_dtype), d_beta.to(beta.dtype), d_state, None


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "the Triton delta rule has no second derivative: choose backends.use(gated_delta_rule='recurrent') for it"
    )


delta_rule.register_autograd(_back, setup_context=_keep)
delta_rule_back.register_autograd(_no_second_derivative)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operation `gated_delta_rule` in float32 or bfloat16; decay, beta and the recurrent state are float32 inside."""
    output, final, *_ = delta_rule(query, key, value, decay, beta, state, cu_seqlens)
    return output, final


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> str | None:
    """None, or the reason why these kernels cannot run this call. cu_seqlens may be on the host."""
    floats = {"query": query, "key": key, "value": value, "decay": decay, "beta": beta, "state": state}
    if reason := runtime.unsupported_device(**floats):
        return reason
    if reason := runtime.unsupported_dtype(*_DTYPES, **floats):
        return reason
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}: the kernels take one dtype"
    if key.shape[-1] > WIDEST:
        return f"keys are {key.shape[-1]} wide: a program holds the state of keys up to {WIDEST} wide"
    if query.dtype == torch.float32 and key.shape[-1] > WIDEST_FLOAT32_BACK and runtime.needs_gradient(*floats.values()):
        return f"float32 keys are {key.shape[-1]} wide: with a gradient, shared memory suffices up to {WIDEST_FLOAT32_BACK}"
    return "query has no tokens" if query.shape[1] == 0 else None


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms; in the interpreter, where it is the slowest, behind them."""
    missing = runtime.missing()
    register(
        "gated_delta_rule", "triton", None if missing else gated_delta_rule, unsupported,
        before=runtime.place("chunked_cpu"), missing=missing, **runtime.FIRST_ORDER,
    )  # fmt: skip
