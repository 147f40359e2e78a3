"""The other side: transformers' own functions and layer class, fla and causal_conv1d, each only where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.delta.situations import Answer, Situation

_MODELING = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"


def optional(name: str) -> Any:
    """The module, or None where its package is not installed; a broken install raises."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        return None


def modeling() -> Any:
    """transformers' file of this architecture, None without transformers."""
    library = optional("transformers")
    if library is None:
        return None
    library.logging.set_verbosity_error()  # a warning per missing kernel otherwise
    return importlib.import_module(_MODELING)


def rule(function: Any, values: dict[str, Tensor]) -> Answer:
    """transformers' and fla's rules have one signature."""
    out, memory = function(
        values["query"], values["key"], values["value"], g=values["decay"], beta=values["beta"],
        initial_state=values.get("state"), output_final_state=True, use_qk_l2norm_in_kernel=True,
    )
    return {"out": out, "memory": memory}


def fla_rule(situation: Situation, device: str) -> tuple[Any, str | None]:
    """fla's function for this situation, or the reason why there is none."""
    ops = optional("fla.ops.gated_delta_rule")
    if ops is None:
        return None, "flash-linear-attention is not installed"
    if not device.startswith("cuda"):
        return None, "flash-linear-attention runs on a GPU only"
    one = situation.tokens == 1
    return (ops.fused_recurrent_gated_delta_rule if one else ops.chunk_gated_delta_rule), None


def convolution(function: Any, x: Tensor, weight: Tensor) -> Answer:
    """Channels before tokens, as transformers and causal_conv1d have it, from and to tokens before channels."""
    return {"out": function(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)}


def layers(ours: list[Any], text: Any) -> tuple[list[Any], Any]:
    """transformers' layers on the same memory as ours, where the dtypes agree, and the configuration of their cache."""
    import transformers

    names = ("hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    names += ("linear_value_head_dim", "linear_conv_kernel_dim", "rms_norm_eps", "num_hidden_layers")
    options: dict[str, Any] = {name: getattr(text, name) for name in names}
    options["layer_types"] = list(text.layer_types)
    config = transformers.Qwen3_5MoeTextConfig(**options)
    found = []
    for index, layer in enumerate(ours):
        with torch.device("meta"):
            other = modeling().Qwen3_5MoeGatedDeltaNet(config, index)
        dtype = layer.in_proj_qkv.weight.dtype
        other.load_state_dict({n: p.detach().to(dtype) for n, p in layer.state_dict().items()}, assign=True)
        found.append(other.requires_grad_())
    return found, config
