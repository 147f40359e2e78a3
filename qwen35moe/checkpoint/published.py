"""What the files of a published repository hold: every tensor by name, shape and dtype, from the configuration alone.

Repositories differ in four things, which are the fields of `Layout`. Known ones (facts of 2026):

    Qwen3.5 bf16          decoder grouped, MTP per expert, islands F32        QWEN35
    Qwen3.6, 3.8 bf16     both grouped, everything BF16                       QWEN36
    FP8 of either         both per expert, block-FP8, islands as above        QWEN35.quantised(), QWEN36.quantised()
    saved by transformers per expert, no mtp.*                                TRANSFORMERS

Block-FP8: a weight [R, C] is F8_E4M3, beside it `weight_scale_inv` BF16 [ceil(R / 128), ceil(C / 128)]. See block_fp8.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qwen35moe.config import Config
from qwen35moe.config.parameters import TensorShape

from .blocks import BLOCK, SCALE, scale_shape
from .problems import CheckpointError

MAX_EXPERTS = 1_000_000  # of all layers, where each has tensors of its own

# Modules whose weights an FP8 repository quantises, in the decoder and in the MTP head. Everything else, first of all
# router, gates, convolution, embedding, head and the vision tower, stays as it is.
_QUANTISED = re.compile(
    r"(?:^|\.)layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj)"
    r"|mlp\.(?:experts\.\d+\.|shared_expert\.)?(?:gate|up|down)_proj)\.weight$"
)


@dataclass(frozen=True)
class Layout:
    """How a repository stores a model. experts, mtp_experts: "grouped" or "per_expert"; islands: the dtype of `A_log` and
    `linear_attn.norm.weight`; fp8: block-FP8, which is always per expert; vision, mtp: whether that part is there."""

    experts: str = "grouped"
    mtp_experts: str = "per_expert"
    islands: str = "F32"
    fp8: bool = False
    vision: bool = True
    mtp: bool = True

    def __post_init__(self) -> None:
        if self.fp8 and "grouped" in (self.experts, self.mtp_experts):
            raise ValueError("block-FP8 repositories store experts one by one: the layout is per_expert, not grouped")

    def quantised(self) -> Layout:
        """The FP8 repository beside this one."""
        return replace(self, experts="per_expert", mtp_experts="per_expert", fp8=True)


QWEN35 = Layout()
QWEN36 = Layout(mtp_experts="grouped", islands="BF16")
TRANSFORMERS = Layout(experts="per_expert", mtp=False)


def tensors(config: Config, layout: Layout = QWEN35) -> Iterator[TensorShape]:
    """Every tensor of a repository of `config`, in the order of the modules; a scale follows its weight."""
    stored = config.tensor_shapes(vision=layout.vision, mtp=layout.mtp, experts=layout.experts,
                                  mtp_experts=layout.mtp_experts, islands=layout.islands)  # fmt: skip
    for tensor in stored:
        if layout.fp8 and is_quantised(tensor.name):
            yield tensor._replace(dtype="F8_E4M3")
            yield TensorShape(tensor.name + SCALE, scale_shape(tensor.shape), "BF16")
        else:
            yield tensor


def check_experts(config: Config, stored: int) -> None:
    """CheckpointError where naming every single expert would take a list out of all proportion to `stored` tensors.

    The largest published model has 47,104 experts in all its layers; a config.json may claim 10^12 for a small file.
    """
    text = config.text_config
    layers = text.num_hidden_layers + text.mtp_num_hidden_layers
    if layers * text.num_experts > max(MAX_EXPERTS, stored):
        raise CheckpointError(
            f"config.json describes {text.num_experts:,} experts in each of {layers:,} layers, beside {stored:,} stored "
            f"tensors; at most {MAX_EXPERTS:,} in all are handled one by one"
        )


def is_quantised(name: str) -> bool:
    """Whether an FP8 repository quantises the weight of this name."""
    return ".visual." not in name and _QUANTISED.search(name) is not None


def quantization_config(config: Config, layout: Layout) -> dict[str, Any]:
    """What config.json of an FP8 repository says. The list names every matrix that stays as it is.

    Programs that trust the list rather than the files need it complete; it is the one of Qwen3.5-27B-FP8 by rule.
    """
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "modules_to_not_convert": sorted(_left_alone(tensors(config, layout))),
    }


def _left_alone(stored: Iterable[TensorShape]) -> Iterator[str]:
    for tensor in stored:
        if tensor.name.endswith(".weight") and len(tensor.shape) > 1 and not is_quantised(tensor.name):
            yield tensor.name.removesuffix(".weight")
