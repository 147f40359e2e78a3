"""Peers: transformers' functions and layer class, fla and causal_conv1d, each only if it is installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.delta.scenarios import Answer, Scenario

_MODELING = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"


def optional(name: str) -> Any:
    """The module, or None if its package is not installed; a broken installation raises."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        return None


def modeling() -> Any:
    """transformers' modelling file of this architecture, None without transformers."""
    library = optional("transformers")
    if library is None:
        return None
    library.logging.set_verbosity_error()  # a warning per missing kernel otherwise
    return importlib.import_module(_MODELING)


def rule(function: Any, values: dict[str, Tensor]) -> Answer:
    """Call transformers' or fla's rule, which have one signature."""
    out, state = function(
        values["query"], values["key"], values["value"], g=values["decay"], beta=values["beta"],
        initial_state=values.get("state"), output_final_state=True, use_qk_l2norm_in_kernel=True,
    )
    return {"out": out, "recurrent_state": state}


def fla_rule(scenario: Scenario, device: str) -> tuple[Any, str | None]:
    """(fla's function for this scenario, None) or (None, the reason why it cannot run)."""
    ops = optional("fla.ops.gated_delta_rule")
    if ops is None:
        return None, "flash-linear-attention is not installed"
    if not device.startswith("cuda"):
        return None, "flash-linear-attention runs on a GPU only"
    decode = scenario.tokens == 1
    return (ops.fused_recurrent_gated_delta_rule if decode else ops.chunk_gated_delta_rule), None


def convolution(function: Any, x: Tensor, weight: Tensor) -> Answer:
    """Call transformers' or causal_conv1d's function, which take [B, C, T], on x [B, T, C]."""
    return {"out": function(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)}


def layers(ours: list[Any], text: Any) -> tuple[list[Any], Any]:
    """transformers' layers on the storage of our weights, if the dtypes agree, and the configuration of their cache."""
    import transformers

    names = ("hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    names += ("linear_value_head_dim", "linear_conv_kernel_dim", "rms_norm_eps", "num_hidden_layers")
    options: dict[str, Any] = {name: getattr(text, name) for name in names}
    options["layer_types"] = list(text.layer_types)
    config = transformers.Qwen3_5MoeTextConfig(**options)
    theirs = []
    for index, layer in enumerate(ours):
        with torch.device("meta"):
            other = modeling().Qwen3_5MoeGatedDeltaNet(config, index)
        dtype = layer.in_proj_qkv.weight.dtype
        other.load_state_dict({n: p.detach().to(dtype) for n, p in layer.state_dict().items()}, assign=True)
        theirs.append(other.requires_grad_())
    return theirs, config
