"""Every own kernel compiles for a Hopper GPU at the sizes of Qwen3.5-35B-A3B, without one, and spills nothing.

The blocks and warps are those that the launches take; a kernel that needs more registers than a program may have spills
to memory, which is the first thing to be lost by an innocent change.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.support.compile_triton import Kernel, Usage, compiled

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton's wheel brings ptxas for Linux only", allow_module_level=True)

SIZES = {"W": 4, "G": 16, "H": 32, "K": 128, "V": 128}  # C = 8192
NUMBERS = ("T", "N", "C", "V", "x_row", "x_token")
WIDE = ("dweight", "memory", "memory_after", "A_log", "dt_bias", "norm_weight")


def kernel(module: str, name: str, arguments: str, warps: int = 4, single: str = "", **constants: Any) -> Kernel:
    """Activations in bfloat16. single: arguments that are float32 here. What is a size is a multiple of 16, but for T."""
    types = {}
    for argument in arguments.split():
        if argument in NUMBERS:
            types[argument] = "i32"
        elif argument == "eps":
            types[argument] = "fp32"
        else:
            of = {"lengths": "i64", "bounds": "i64", "document": "i32"}
            wide = argument in WIDE or argument in single.split()
            types[argument] = "*" + of.get(argument, "fp32" if wide else "bf16")
    aligned = tuple(argument for argument in types if argument not in ("T", "N", "eps"))
    return Kernel(f"qwen35moe_kernels.{module}_kernels", name, types, constants, warps, aligned=aligned)


def kernels() -> list[Kernel]:
    from qwen35moe_kernels import convolution, gated_norm, step

    found = []
    flags: dict[str, Any] = {"W": SIZES["W"], "HAS_LENGTHS": False, "BC": convolution._CHANNELS}
    rows = "x weight state lengths document bounds"
    sizes = "T C x_row x_token"
    for options in ({"PACKED": True}, {"PACKED": False, "HAS_LENGTHS": True}):
        plain = flags | options
        full = plain | {"HAS_STATE": True}
        block = {"warps": convolution._WARPS}
        found += [
            kernel("convolution", "forward_kernel", f"{rows} y {sizes}", **block, **full, BT=convolution._TOKENS),
            kernel("convolution", "backward_kernel", f"dy dafter {rows} dx dweight {sizes}", **block, **full,
                   BT=convolution._TOKENS_BACKWARD),
        ]  # fmt: skip
    found += [
        kernel("convolution", "last_inputs_kernel", f"x state lengths bounds after {sizes}", **full),
        kernel("convolution", "state_gradient_kernel", f"dy dafter {rows} dstate {sizes}", **plain),
        kernel("convolution", "step_kernel", "x weight state y after C x_row", W=4, HAS_STATE=True, BC=flags["BC"]),
    ]
    width = SIZES["V"]
    found += [
        kernel("gated_norm", "forward_kernel", "x gate weight y N V eps", R=gated_norm._NUMBERS // width, BV=width,
               single="weight"),
        kernel("gated_norm", "backward_kernel", "dy x gate weight dx dgate dweight N V eps", BV=width,
               R=gated_norm._NUMBERS_BACKWARD // width, single="weight"),
    ]  # fmt: skip
    tensors = "qkv gate a b inputs memory conv_weight A_log dt_bias norm_weight y inputs_after memory_after eps"
    for columns in (width, step._COLUMNS):
        whole = columns == width
        warps = step._warps(SIZES["K"] * columns)
        found.append(
            kernel("step", "step_kernel", tensors, warps, "" if whole else "y", **SIZES, BK=SIZES["K"], BV=columns,
                   WHOLE=whole)
        )  # fmt: skip
    return found


def test_they_compile_for_hopper_and_spill_nothing() -> None:
    usage = compiled(kernels())
    assert len(usage) == 11
    assert not [each for each in usage if each.local], usage
    assert max(each.shared for each in usage) <= 48 << 10, usage  # more must be asked for, and an older GPU has no more


def test_the_check_can_fail() -> None:
    first = kernels()[0]
    with pytest.raises(RuntimeError, match=r"\['y'\] given and not taken"):
        compiled([Kernel(first.module, first.name, {k: v for k, v in first.types.items() if k != "y"}, first.constants)])


def table(usage: list[Usage]) -> str:
    """`python -m tests.triton.test_compile` prints it."""
    return "\n".join(f"{each.name:24}{each.registers:5} registers{each.shared:7} bytes shared" for each in usage)


if __name__ == "__main__":
    print(table(compiled(kernels())))
