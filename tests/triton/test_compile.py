"""Every own kernel compiles for a Hopper GPU at the sizes of Qwen3.5-35B-A3B, without one, and spills nothing.

The blocks and warps are those of the launches. A kernel that needs more registers than a program may have spills to memory, a
regression that a small change can cause.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.support.compile_triton import Kernel, Usage, compiled

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton's wheel brings ptxas for Linux only", allow_module_level=True)

SIZES = {"W": 4, "G": 16, "H": 32, "K": 128, "V": 128}  # C = 8192
HIDDEN, HEAD, EXPERTS, TOP_K = 2048, 256, 256, 8
STRIDES = tuple(f"{x}_{axis}" for x in ("query", "key", "value") for axis in ("row", "token", "head"))
INTEGERS = ("T", "rows", "C", "V", "D", "N", "E", "H", "G", "K", "HALF", "P", "PARTS", "x_row", "x_token", *STRIDES)
FLOAT32 = ("dweight", "recurrent_state", "recurrent_state_after", "A_log", "dt_bias", "norm_weight")


def kernel(module: str, name: str, arguments: str, warps: int = 4, single: str = "", **constants: Any) -> Kernel:
    """Activations are bfloat16. single: further arguments in float32. All sizes but T and rows are multiples of 16."""
    types = {}
    for argument in arguments.split():
        if argument in INTEGERS or argument in FUSED_INTEGERS:
            types[argument] = "i32"
        elif argument in ("eps", "sign", "scale"):
            types[argument] = "fp32"
        else:
            integers = {"lengths": "i64", "starts": "i64", "bounds": "i64", "document": "i32", "indices": "i64"}
            wide = argument in FLOAT32 or argument in single.split()
            types[argument] = "*" + integers.get(argument, "fp32" if wide else "bf16")
    aligned = tuple(argument for argument in types if argument not in ("T", "rows", "N", "PARTS", "eps", "sign", "scale"))
    return Kernel(f"qwen35moe_kernels.{module}_kernels", name, types, constants, warps, aligned=aligned)


def kernels() -> list[Kernel]:
    from qwen35moe_kernels import convolution, gated_norm, step

    compilations = []
    flags: dict[str, Any] = {"W": SIZES["W"], "HAS_LENGTHS": False, "BC": convolution._CHANNELS}
    inputs = "x weight state lengths document bounds"
    sizes = "T C x_row x_token"
    for options in ({"PACKED": True}, {"PACKED": False, "HAS_LENGTHS": True}):
        plain = flags | options
        full = plain | {"HAS_STATE": True}
        block = {"warps": convolution._WARPS}
        compilations += [
            kernel("convolution", "forward_kernel", f"{inputs} y {sizes}", **block, **full, BT=convolution._TOKENS),
            kernel("convolution", "backward_kernel", f"dy dafter {inputs} dx dweight {sizes}", **block, **full,
                   BT=convolution._TOKENS_BACKWARD, BW=SIZES["W"]),
        ]  # fmt: skip
    compilations += [
        kernel("convolution", "conv_state_kernel", f"x state lengths bounds after {sizes}", **full),
        kernel("convolution", "state_gradient_kernel", f"dy dafter {inputs} dstate {sizes}", **plain),
        kernel("convolution", "step_kernel", "x weight state y after C x_row", W=4, HAS_STATE=True, BC=flags["BC"]),
    ]
    width = SIZES["V"]
    compilations += [
        kernel("gated_norm", "forward_kernel", "x gate weight y rows V eps", BR=gated_norm._ELEMENTS // width, BV=width,
               single="weight"),
        kernel("gated_norm", "backward_kernel", "dy x gate weight dx dgate dweight rows V eps", BV=width,
               BR=gated_norm._ELEMENTS_BACKWARD // width, single="weight"),
    ]  # fmt: skip
    tensors = "qkv gate a b conv_state recurrent_state conv_weight A_log dt_bias norm_weight"
    tensors += " y conv_state_after recurrent_state_after active eps"
    for columns in (width, step._COLUMNS):
        whole = columns == width
        warps = step._warps(SIZES["K"] * columns)
        compilations.append(
            kernel("step", "step_kernel", tensors, warps, "" if whole else "y", **SIZES, BK=SIZES["K"], BV=columns,
                   WHOLE=whole, IN_PLACE=True)
        )  # fmt: skip
    return [*compilations, *decoder_kernels(), *decode_attention_kernels()]


def decode_attention_kernels() -> list[Kernel]:
    """One token over a cache in parts, and over one of a single part."""
    strides = " ".join(STRIDES).replace("query_token ", "")
    arguments = f"query key value starts out sums scale P {strides}"
    sizes = {"R": 8, "K": HEAD, "V": HEAD, "BR": 16, "BK": HEAD, "BV": HEAD, "BN": 32, "CHUNK": 128}
    kinds = [kernel("decode_attention", "part_kernel", arguments, single="sums" if one else "out sums", **sizes, ONE=one)
             for one in (False, True)]  # fmt: skip
    join = kernel("decode_attention", "join_kernel", "parts_of sums out PARTS", single="parts_of sums", V=HEAD, BV=HEAD, BP=64)
    return [*(replace(kind, stages=2) for kind in kinds), join]


def decoder_kernels() -> list[Kernel]:
    """The norms of the residual stream and of heads, the rotation, and the router's choice for one token and for many."""
    from qwen35moe_kernels import norm, router

    result = []
    for width in (HIDDEN, HEAD):
        for name, tensors in (("forward_kernel", "x weight y"), ("backward_kernel", "dy x weight dx dweight")):
            block = {"BR": norm._ELEMENTS // width, "BD": width}
            result.append(kernel("norm", name, f"{tensors} rows D x_row eps", single="dweight", **block))
    rotated = f"query key cos sin query_after key_after T H G K HALF sign {' '.join(STRIDES[:6])}"
    result.append(kernel("rotary", "rotary_kernel", rotated, 1, "cos sin", BK=HEAD, BHALF=32))
    for tokens in (1, router._ELEMENTS // EXPERTS):
        shape = {"TOP_K": TOP_K, "BN": tokens, "BE": EXPERTS, "BK": TOP_K}
        result.append(kernel("router", "choose_kernel", "logits indices weights N E", **shape))
    return [*result, *fused_kernels()]


FUSED_INTEGERS = ("F1", "F2", "F3", "F4", "F", "size", "gate_row")


def fused_kernels() -> list[Kernel]:
    """The fused kernels of a decoded token."""
    from qwen35moe_kernels import linear, norm, sigmoid_gate

    projections = linear._block(HIDDEN, linear._COLUMNS)
    swiglu = linear._block(HIDDEN, linear._COLUMNS_TWO)
    sizes = " ".join(f"{name}{number}" for name in "wyF" for number in (1, 2, 3, 4)).replace("F1", "rows F1")
    rotated = f"query key cos sin query_weight key_weight query_after key_after T H G K HALF eps {' '.join(STRIDES[:6])}"
    return [
        kernel("linear", "projections_kernel", f"x {sizes}", projections.pop("num_warps"), D=HIDDEN, **projections),
        kernel("linear", "swiglu_kernel", "x gate_weight up_weight y rows F", swiglu.pop("num_warps"), D=HIDDEN, **swiglu),
        kernel("linear", "silu_mul_kernel", "gate up y size", B=linear._ELEMENTS),
        kernel("norm", "add_kernel", "residual change weight total y rows D eps", BR=norm._ELEMENTS // HIDDEN, BD=HIDDEN),
        kernel("rotary", "norm_rotary_kernel", rotated, 1, "cos sin", BK=HEAD, BHALF=32),
        kernel("sigmoid_gate", "gate_kernel", "x gate y rows V x_row gate_row", BR=sigmoid_gate._ELEMENTS // HEAD, BV=HEAD),
        kernel("shared_expert", "add_kernel", "residual routed shared x gate_weight out D", BD=HIDDEN),
    ]


@pytest.mark.slow  # `test_launches` compiles the launches of a call in every leg
def test_kernels_compile_for_hopper_without_spills() -> None:
    usage = compiled(kernels())
    assert len(usage) == 28
    assert not [kernel for kernel in usage if kernel.local], usage
    assert max(kernel.shared for kernel in usage) <= 48 << 10, usage  # what every GPU gives without a request for more


def test_a_missing_argument_type_is_an_error() -> None:
    first = kernels()[0]
    with pytest.raises(RuntimeError, match=r"\['y'\] are not both arguments of the kernel and in types or constants"):
        compiled([Kernel(first.module, first.name, {k: v for k, v in first.types.items() if k != "y"}, first.constants)])


def table(usage: list[Usage]) -> str:
    """`python -m tests.triton.test_compile` prints it."""
    return "\n".join(f"{kernel.name:24}{kernel.registers:5} registers{kernel.shared:7} bytes shared" for kernel in usage)


if __name__ == "__main__":
    print(table(compiled(kernels())))
