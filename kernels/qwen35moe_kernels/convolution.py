"""Short causal convolution and SiLU in Triton: forward, backward and one token at a time. See README.md for the tiling.

The contract is that of `short_convolution`: x [B, T, C], weight [C, W], state [B or documents, C, W-1], lengths [B],
cu_seqlens [documents + 1]; returns y [B, T, C] and the conv_state after the last token [B or documents, C, W-1], both in x's
dtype. Past a row's length y is zero and x is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS, _TOKENS_BACKWARD, _CHANNELS, _WARPS = 32, 16, 128, 8  # block of a program: 16 elements per thread, 8 in the backward
_PARTS = 128  # of the weight's gradient: with 64 blocks of channels, 8,192 programs
_TAPS = 8  # the loops over taps are unrolled; the backward has W^2 iterations


def unsupported(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None, or the reason why these kernels cannot run this call."""
    if weight.shape[-1] > _TAPS:
        return f"weight has {weight.shape[-1]} taps, the kernels take up to {_TAPS}"
    if x.shape[0] > 65535:
        return f"x has {x.shape[0]} rows, a grid holds 65535"
    return runtime.unsupported_device(x=x, weight=weight, state=state, lengths=lengths) or runtime.unsupported_dtype(
        *_FLOATS, x=x, weight=weight, state=state
    )


def short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the new conv_state; see the top of this file."""
    if torch.compiler.is_compiling() or runtime.needs_gradient(x, weight, state):
        return _operation(x, weight, state, lengths, cu_seqlens)
    return _forward(x, weight, state, lengths, cu_seqlens)


class _Call:
    """The arguments of a call in the layouts of the kernels."""

    def __init__(
        self, x: Tensor, weight: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        self.x = x if x.stride(-1) == 1 else x.contiguous()
        self.weight = weight.contiguous()
        self.batch, self.tokens, self.channels = x.shape
        self.taps = weight.shape[-1]
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.state = None if state is None else state.transpose(1, 2).contiguous()
        self.lengths, self.bounds, self.document = lengths, None, None
        if cu_seqlens is not None:
            self.bounds = cu_seqlens.to(x.device)
            token = torch.arange(self.tokens, device=x.device, dtype=self.bounds.dtype)
            self.document = torch.bucketize(token, self.bounds[1:], right=True, out_int32=True)
        self.block = min(_CHANNELS, runtime.power_of_two(self.channels))

    def pointers(self, *names: str) -> list[Tensor]:
        """Tensors by name; x in place of an absent one, which the kernels do not read."""
        tensors = [getattr(self, name) for name in names]
        return [self.x if tensor is None else tensor for tensor in tensors]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.channels, self.x.stride(0), self.x.stride(1)

    @property
    def flags(self) -> dict[str, Any]:
        return {"W": self.taps, "HAS_LENGTHS": self.lengths is not None, "PACKED": self.bounds is not None}

    def tiles(self, max_tokens: int) -> tuple[tuple[int, int, int], dict[str, int]]:
        """The grid over tokens, channels and rows, and its block sizes."""
        block = max_tokens if self.tokens > 1 else 1  # two compilations, not one for each power of two
        return (runtime.parts(self.tokens, block), runtime.parts(self.channels, self.block), self.batch), {
            "BT": block,
            "BC": self.block,
        }

    @property
    def per_row(self) -> tuple[int, int]:
        return self.rows, runtime.parts(self.channels, self.block)


def _forward(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels = runtime.kernels("convolution_kernels")

    call = _Call(x, weight, state, lengths, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = torch.empty(call.rows, call.channels, call.taps - 1, dtype=x.dtype, device=x.device)
    has_state = state is not None and call.taps > 1
    with runtime.on_device_of(x):
        if call.tokens == 1 and lengths is None and cu_seqlens is None:
            kernels.step_kernel[call.per_row](
                call.x, call.weight, call.x if state is None else state.contiguous(), y, after, call.channels, call.x.stride(0),
                W=call.taps, HAS_STATE=has_state, BC=call.block,
            )  # fmt: skip
            return y, after
        grid, blocks = call.tiles(_TOKENS)
        kernels.forward_kernel[grid](
            *call.pointers("x", "weight", "state", "lengths", "document", "bounds"), y, *call.sizes,
            **call.flags, HAS_STATE=has_state, **blocks, num_warps=_WARPS,
        )  # fmt: skip
        if call.taps > 1:
            kernels.conv_state_kernel[call.per_row](
                *call.pointers("x", "state", "lengths", "bounds"), after, *call.sizes,
                **call.flags, HAS_STATE=has_state, BC=call.block,
            )  # fmt: skip
    return y, after


def _backward(
    dy: Tensor, dafter: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and state (an empty tensor without a state)."""
    kernels = runtime.kernels("convolution_kernels")

    call = _Call(x, weight, state, lengths, cu_seqlens)
    dy, dafter = dy.contiguous(), dafter.transpose(1, 2).contiguous()
    (blocks_of_tokens, *others), blocks = call.tiles(_TOKENS_BACKWARD)
    grid = min(blocks_of_tokens, max(1, _PARTS // call.batch)), *others
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_sums = torch.empty(grid[2] * grid[0], call.taps, call.channels, dtype=torch.float32, device=x.device)
    dstate = _no_state(x) if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    has_state = state is not None and call.taps > 1
    with runtime.on_device_of(x):
        kernels.backward_kernel[grid](
            dy, dafter, *call.pointers("x", "weight", "state", "lengths", "document", "bounds"), dx, partial_sums, *call.sizes,
            **call.flags, HAS_STATE=has_state, **blocks, BW=runtime.power_of_two(call.taps), num_warps=_WARPS,
        )  # fmt: skip
        if has_state:
            kernels.state_gradient_kernel[call.per_row](
                dy, dafter, *call.pointers("x", "weight", "state", "lengths", "document", "bounds"), dstate, *call.sizes,
                **call.flags, BC=call.block,
            )  # fmt: skip
    return dx, partial_sums.sum(0).t().to(weight.dtype).contiguous(), dstate


def _no_state(x: Tensor) -> Tensor:
    return x.new_empty(0)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? state, Tensor? lengths, Tensor? cu_seqlens"
_operation = torch.library.custom_op(
    "qwen35moe_kernels::short_convolution", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
_gradient = torch.library.custom_op(
    "qwen35moe_kernels::short_convolution_backward", _backward, mutates_args=(),
    schema=f"(Tensor dy, Tensor dafter, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operation.register_fake
def _shapes(
    x: Tensor, weight: Tensor, state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, x.shape[-1], weight.shape[-1] - 1)


@_gradient.register_fake
def _gradient_shapes(
    dy: Tensor, dafter: Tensor, x: Tensor, weight: Tensor, state: Tensor | None, lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dstate = _no_state(x) if state is None else state.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dstate = _gradient(dy, dafter, *ctx.saved_tensors)
    return dx, dweight, None if ctx.saved_tensors[2] is None else dstate, None, None


_operation.register_autograd(_differentiate, setup_context=_save)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    options = {"before": runtime.place("cpu"), "missing": runtime.missing(), **runtime.FIRST_ORDER}
    register("short_convolution", "triton", short_convolution, unsupported, **options)
