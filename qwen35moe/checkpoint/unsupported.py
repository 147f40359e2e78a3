"""Recognises unsupported quantised formats, by config.json and by the names of their tensors, and refuses them."""

from __future__ import annotations

from qwen35moe.config import Config

from .blocks import BLOCK, SCALE
from .dtypes import FLOATS
from .headers import Header
from .problems import CheckpointError, shown

# The last part of a tensor name that no unquantised or block-FP8 checkpoint has -> the formats that use it.
_LAST_PARTS = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors", "weight_shape": "compressed-tensors",
    "weight_zero_point": "compressed-tensors", "weight_global_scale": "compressed-tensors (NVFP4)",
    "weight_scale": "compressed-tensors or ModelOpt", "weight_scale_2": "ModelOpt (NVFP4)",
    "input_scale": "ModelOpt or static FP8", "input_global_scale": "compressed-tensors (NVFP4)",
    "absmax": "bitsandbytes", "SCB": "bitsandbytes", "scales": "MLX, GPTQ or AWQ", "biases": "MLX",
    "gate_up_proj_blocks": "MXFP4", "down_proj_blocks": "MXFP4",
}  # fmt: skip


def refuse_unsupported(config: Config, header: Header) -> None:
    """CheckpointError if the checkpoint is quantised in any format other than block-FP8."""
    reasons: list[str] = []
    settings = config.quantization_config or {}
    if settings:
        method, block = settings.get("quant_method"), settings.get("weight_block_size")
        keys = [key for key in ("quant_algo", "format", "bits") if key in settings]
        detail = "".join(f", {key}={shown(str(settings[key]), 60)}" for key in keys)
        if method != "fp8":
            reasons.append(f"config.json: quant_method={shown(repr(method), 60)}{detail}")
        elif block is not None and block != [BLOCK, BLOCK]:
            reasons.append(f"config.json: quant_method='fp8' with weight_block_size={shown(str(block), 60)}")
    counts: dict[str, int] = {}
    for name in header.tensors:
        last = name[name.rfind(".") + 1 :]
        if last in _LAST_PARTS:
            counts[last] = counts.get(last, 0) + 1
    reasons += [f"{count} tensors *.{last} ({_LAST_PARTS[last]})" for last, count in counts.items()]
    if reasons:
        raise CheckpointError(
            f"{header.folder} has an unsupported quantised format: {'; '.join(reasons)}. Supported are weights stored as "
            f"{', '.join(FLOATS)}, and block-FP8 (F8_E4M3 with *.weight{SCALE} per {BLOCK} x {BLOCK} block), as in the "
            "published repositories of this family: use one of those"
        )
