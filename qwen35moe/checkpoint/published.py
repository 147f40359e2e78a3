"""The tensors of a published repository by name, shape and dtype, from the configuration alone.

The fields of `Layout` are the ways in which repositories differ. The published ones (2026):

    Qwen3.5 bf16          decoder grouped, MTP per expert, A_log and norm F32     QWEN35
    Qwen3.6, 3.8 bf16     both grouped, everything BF16                           QWEN36
    FP8 of either         both per expert, block-FP8 (see block_fp8.py)           QWEN35.quantised(), QWEN36.quantised()
    saved by transformers per expert, no mtp.*                                    TRANSFORMERS
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qwen35moe.config import Config
from qwen35moe.config.parameters import TensorShape

from .blocks import BLOCK, FP8, SCALE, scale_shape
from .problems import CheckpointError

MAX_EXPERTS = 1_000_000  # of all layers together, if every expert has its own tensors

# Modules whose weights an FP8 repository quantises, in the decoder and in the MTP head. Router, gates, convolution,
# embedding, head, vision tower and the rest keep their dtype.
_QUANTISED = re.compile(
    r"(?:^|\.)layers\.\d+\."
    r"(?:self_attn\.[qkvo]_proj|linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj)"
    r"|mlp\.(?:experts\.\d+\.|shared_expert\.)?(?:gate|up|down)_proj)\.weight$"
)


@dataclass(frozen=True)
class Layout:
    """How a repository stores a model.

    experts, mtp_experts: "grouped" or "per_expert"; fp32_stored_as: the stored dtype of `A_log` and
    `linear_attn.norm.weight`; fp8: block-FP8, which is always per expert; vision, mtp: whether that part is stored.
    """

    experts: str = "grouped"
    mtp_experts: str = "per_expert"
    fp32_stored_as: str = "F32"
    fp8: bool = False
    vision: bool = True
    mtp: bool = True

    def __post_init__(self) -> None:
        if self.fp8 and "grouped" in (self.experts, self.mtp_experts):
            raise ValueError("block-FP8 repositories store single experts: the layout must be per_expert, not grouped")

    def quantised(self) -> Layout:
        """The FP8 repository beside this one."""
        return replace(self, experts="per_expert", mtp_experts="per_expert", fp8=True)


QWEN35 = Layout()
QWEN36 = Layout(mtp_experts="grouped", fp32_stored_as="BF16")
TRANSFORMERS = Layout(experts="per_expert", mtp=False)


def tensors(config: Config, layout: Layout = QWEN35) -> Iterator[TensorShape]:
    """Every tensor of a repository of `config`, in the order of the modules; a scale follows its weight."""
    stored = config.tensor_shapes(vision=layout.vision, mtp=layout.mtp, experts=layout.experts,
                                  mtp_experts=layout.mtp_experts, fp32_stored_as=layout.fp32_stored_as)  # fmt: skip
    for tensor in stored:
        if layout.fp8 and is_quantised(tensor.name):
            yield tensor._replace(dtype=FP8)
            yield TensorShape(tensor.name + SCALE, scale_shape(tensor.shape), "BF16")
        else:
            yield tensor


def check_experts(config: Config, stored: int) -> None:
    """CheckpointError if the list of all single experts would be out of proportion to the `stored` tensors.

    The largest published model has 47,104 experts in all its layers; the config.json of a small file may state 10^12.
    """
    text = config.text_config
    layers = text.num_hidden_layers + text.mtp_num_hidden_layers
    if layers * text.num_experts > max(MAX_EXPERTS, stored):
        raise CheckpointError(
            f"config.json describes {text.num_experts:,} experts in each of {layers:,} layers, but {stored:,} tensors are "
            f"stored; at most {MAX_EXPERTS:,} single experts in all are supported"
        )


def is_quantised(name: str) -> bool:
    """Whether an FP8 repository quantises the weight of this name."""
    return ".visual." not in name and _QUANTISED.search(name) is not None


def quantization_config(config: Config, layout: Layout) -> dict[str, Any]:
    """quantization_config of an FP8 repository, with the list of every matrix that is not quantised.

    Programs that rely on the list rather than on the files need it complete; it follows the rule of Qwen3.5-27B-FP8.
    """
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "weight_per_tensor": False,
        "act_per_tensor": False,
        "modules_to_not_convert": sorted(_unquantised(tensors(config, layout))),
    }


def _unquantised(stored: Iterable[TensorShape]) -> Iterator[str]:
    for tensor in stored:
        if tensor.name.endswith(".weight") and len(tensor.shape) > 1 and not is_quantised(tensor.name):
            yield tensor.name.removesuffix(".weight")
