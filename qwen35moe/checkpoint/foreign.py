"""Quantised formats that are not read, told by config.json and by the names of their tensors, in one clear refusal."""

from __future__ import annotations

from qwen35moe.config import Config

from .blocks import BLOCK, SCALE
from .dtypes import FLOATS
from .headers import Header
from .problems import CheckpointError, shown

# The last part of a name that no unquantised or block-FP8 checkpoint has -> who writes it.
_MARKS = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors", "weight_shape": "compressed-tensors",
    "weight_zero_point": "compressed-tensors", "weight_global_scale": "compressed-tensors (NVFP4)",
    "weight_scale": "compressed-tensors or ModelOpt", "weight_scale_2": "ModelOpt (NVFP4)",
    "input_scale": "ModelOpt or static FP8", "input_global_scale": "compressed-tensors (NVFP4)",
    "absmax": "bitsandbytes", "SCB": "bitsandbytes", "scales": "MLX, GPTQ or AWQ", "biases": "MLX",
    "gate_up_proj_blocks": "MXFP4", "down_proj_blocks": "MXFP4",
}  # fmt: skip


def refuse_foreign(config: Config, header: Header) -> None:
    """CheckpointError when the checkpoint is quantised in a way other than block-FP8."""
    found: list[str] = []
    said = config.quantization_config or {}
    if said:
        method, block = said.get("quant_method"), said.get("weight_block_size")
        detail = "".join(f", {key}={shown(str(said[key]), 60)}" for key in ("quant_algo", "format", "bits") if key in said)
        if method != "fp8":
            found.append(f"config.json: quant_method={shown(repr(method), 60)}{detail}")
        elif block is not None and block != [BLOCK, BLOCK]:
            found.append(f"config.json: quant_method='fp8' with weight_block_size={shown(str(block), 60)}")
    marks: dict[str, int] = {}
    for name in header.tensors:
        last = name[name.rfind(".") + 1 :]
        if last in _MARKS:
            marks[last] = marks.get(last, 0) + 1
    found += [f"{count} tensors *.{last} ({_MARKS[last]})" for last, count in marks.items()]
    if found:
        raise CheckpointError(
            f"{header.folder} is quantised in a way that is not read: {'; '.join(found)}. Read are weights stored as "
            f"{', '.join(FLOATS)}, and block-FP8 (F8_E4M3 with *.weight{SCALE} per {BLOCK} x {BLOCK} block), as in the "
            "published repositories of this family: take one of those"
        )
