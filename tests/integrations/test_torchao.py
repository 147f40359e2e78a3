"""torchao: weight-only int8 and int4 on every linear layer and, unfused, on every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe.checkpoint import CheckpointError
from tests.integrations.common import cached_logits, tiny, tokens
from tests.support.peer import relative_error

pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

# Widths that are multiples of a group of 16 weights, which int4 needs.
MIXED = {"hidden_size": 48, "linear_key_head_dim": 16, "linear_value_head_dim": 32, "eos_token_id": None}
WIDTHS: dict[str, dict[str, Any]] = {
    "dense": MIXED | {"intermediate_size": 64},
    "experts": MIXED | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
}
WIDTHS["tied"] = WIDTHS["experts"]
FORMATS = {
    "int8": (Int8WeightOnlyConfig, {}, 0.01),
    "int4": (IntxWeightOnlyConfig, {"weight_dtype": torch.int4, "granularity": PerGroup(16)}, 0.15),
}


def quantised(format: str, kind: str, unfused: bool) -> tuple[Any, Any]:
    """The quantised model, and one whose plain weights have the values of the quantised ones."""
    model, plain = tiny(kind, **WIDTHS[kind]), tiny(kind, **WIDTHS[kind])
    for one in (model, plain):
        if unfused and kind != "dense":
            one.unfuse_experts()
    config, settings, bound = FORMATS[format]
    quantize_(model, config(**settings))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight: Any = module.weight
            assert type(weight.data) is not Tensor, f"{name} was not quantised"
            target = plain.get_submodule(name)
            if target.weight is plain.get_input_embeddings().weight:  # only the head is quantised
                plain.set_output_embeddings(nn.Linear(*target.weight.shape[::-1], bias=False))
                target = plain.lm_head
            assert relative_error(weight.dequantize(), module_before(kind, unfused, name)) < bound
            with torch.no_grad():
                target.weight.copy_(weight.dequantize())
    return model.eval(), plain.eval()


def module_before(kind: str, unfused: bool, name: str) -> Tensor:
    model = tiny(kind, **WIDTHS[kind])
    if unfused and kind != "dense":
        model.unfuse_experts()
    return model.get_submodule(name).weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("kind", "unfused"), [("experts", False), ("experts", True), ("tied", False), ("dense", False)])
@torch.no_grad()
def test_a_quantised_model_computes_with_its_quantised_values(format: str, kind: str, unfused: bool, tmp_path: Path) -> None:
    model, plain = quantised(format, kind, unfused)
    whole = plain(tokens()).logits
    assert relative_error(model(tokens()).logits, whole) < 1e-4
    assert relative_error(tiny(kind, **WIDTHS[kind])(tokens()).logits, whole) > 1e-3  # it is quantised
    assert relative_error(cached_logits(model, model.new_cache(2)), whole) < 1e-4
    assert torch.equal(model.generate(tokens(), max_new_tokens=3), plain.generate(tokens(), max_new_tokens=3))
    loss = [m(tokens(), labels=tokens(), output_logits=keep).loss for m in (model, plain) for keep in (True, False)]
    assert all(value.item() == pytest.approx(loss[2].item(), rel=1e-4) for value in loss)
    with pytest.raises(CheckpointError, match="save the model before it is quantised"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())
    with pytest.raises(ValueError, match="no plain weight"):
        model.resize_token_embeddings(70)


@torch.no_grad()
def test_quantised_unfused_experts_keep_no_second_copy() -> None:
    """The grouped parameters, of which the Linears were views, are not held by the model any more."""
    model, _ = quantised("int8", "experts", unfused=True)
    block = model.model.layers[0].mlp.experts
    held = [value for value in vars(block).values() if isinstance(value, Tensor | nn.Module)]
    assert not [p for value in held if isinstance(value, nn.Module) for p in value.parameters()]
    with pytest.raises(ValueError, match="quantised"):
        model.fuse_experts()
