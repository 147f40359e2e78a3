"""Checkpoints round-trip between transformers and this library bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel, Qwen3_5TextModel
from tests.support import peer
from tests.support.checkpoints import FP32_PARAMETERS
from tests.support.peer import FULL, LINEAR, Case, odd_shape

VISION = dict(depth=2, hidden_size=24, intermediate_size=36, num_heads=2, num_position_embeddings=16)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_disk")


def moe(tied: bool) -> Case:
    return odd_shape(21, num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], num_experts=5, num_experts_per_tok=2,
                     tie_word_embeddings=tied)  # fmt: skip


def dense(tied: bool) -> Case:
    return odd_shape(22, dense=True, num_hidden_layers=2, layer_types=[LINEAR, FULL], tie_word_embeddings=tied)


def load_theirs(cls: Any, path: Path, dtype: torch.dtype) -> Any:
    """transformers' model; asserts that it has read every weight and no other tensor is left."""
    model, info = cls.from_pretrained(path, dtype=dtype, attn_implementation="eager", experts_implementation="eager",
                                      output_loading_info=True)  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def agree(ours: nn.Module, theirs: nn.Module, fp32_rounded_to: torch.dtype | None = None) -> None:
    """All weights are equal bit by bit. fp32_rounded_to: the dtype in which transformers keeps the parameters kept in fp32."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith(FP32_PARAMETERS) and fp32_rounded_to is not None:
            value = value.to(fp32_rounded_to)
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


def classes(case: Case) -> tuple[Any, Any]:
    import transformers

    if case.dense:
        return Qwen3_5ForCausalLM, transformers.Qwen3_5ForCausalLM
    return Qwen3_5MoeForCausalLM, transformers.Qwen3_5MoeForCausalLM


CASES = {"moe": moe, "dense": dense}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "9KB"), (torch.bfloat16, "5GB")])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CASES)
def test_checkpoints_saved_by_transformers_are_read(
    family: str, tied: bool, dtype: torch.dtype, size: str, tmp_path: Path
) -> None:
    case = CASES[family](tied)
    our_class, their_class = classes(case)
    theirs = peer.theirs(case)
    peer.draw(theirs, 3)
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    ours = our_class.from_pretrained(tmp_path)
    assert ours.dtype == dtype and ours.config.text_config.tie_word_embeddings is tied
    agree(ours, theirs, dtype)
    assert not ours.loading_report.left_out and not ours.loading_report.converted
    assert (ours.loading_report.files > 1) == (size == "9KB")


@pytest.mark.parametrize(("layout", "size"), [("grouped", "9KB"), ("per_expert", "5GB")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CASES)
def test_ours_to_transformers_and_back(
    family: str, tied: bool, dtype: torch.dtype, layout: str, size: str, tmp_path: Path
) -> None:
    case = CASES[family](tied)
    our_class, their_class = classes(case)
    ours = peer.ours(case, dtype=torch.float32)
    peer.draw(ours, 4)
    ours = ours.to(dtype)
    ours.save_pretrained(tmp_path / "ours", layout=layout, max_shard_size=size)
    theirs = load_theirs(their_class, tmp_path / "ours", dtype)
    agree(ours, theirs, dtype)
    assert type(theirs).__name__ == type(ours).__name__
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    again = our_class.from_pretrained(tmp_path / "theirs", dtype_policy="transformers")
    agree(again, theirs, dtype)
    if dtype == torch.float32:
        agree(again, ours)
    # Saving over the checkpoint of transformers:
    ours.save_pretrained(tmp_path / "theirs", layout=layout, max_shard_size=size)
    agree(our_class.from_pretrained(tmp_path / "theirs"), ours)
    agree(ours, load_theirs(their_class, tmp_path / "theirs", dtype), dtype)


def test_the_configuration_round_trips_through_transformers(tmp_path: Path) -> None:
    case = moe(True)
    ours = peer.ours(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(classes(case)[1], tmp_path / "ours", torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    first, second = (Config.from_pretrained(tmp_path / name).text_config.to_dict() for name in ("ours", "theirs"))
    different = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert different <= {"dtype", "mtp_num_hidden_layers"}, different


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("is_dense", [True, False])
def test_the_text_model_is_loaded_from_a_multimodal_checkpoint(is_dense: bool, tied: bool, tmp_path: Path) -> None:
    import transformers

    case = dense(tied) if is_dense else moe(tied)
    name = "Qwen3_5" if is_dense else "Qwen3_5Moe"
    text = {key: value for key, value in case.text.items() if key != "model_type"}
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    config_class = getattr(transformers, name + "Config")
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    both = getattr(transformers, name + "ForConditionalGeneration")(config)
    peer.draw(both, 6)
    both.save_pretrained(tmp_path / "both", max_shard_size="60KB")
    our_class, their_class = classes(case)
    ours = our_class.from_pretrained(tmp_path / "both")
    visual = sum(key.startswith("model.visual.") for key in both.state_dict())
    assert ours.loading_report.left_out == {"model.visual.*": visual} and visual == 12 * 2 + 9
    expected = both.state_dict()
    actual = {key.replace("model.", "model.language_model.", 1): value for key, value in ours.state_dict().items()}
    assert actual.keys() == {key for key in expected if not key.startswith("model.visual.")}
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())
    agree(ours, their_class.from_pretrained(tmp_path / "both", dtype=torch.float32))
    # Saved again, it is a text-only checkpoint for both libraries.
    ours.save_pretrained(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"].endswith("_text")
    agree(ours, load_theirs(their_class, tmp_path / "text", torch.float32))


def test_bare_text_models(tmp_path: Path) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel as TheirDense
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextModel as TheirMoe

    for case, our_class, their_class in ((moe(False), Qwen3_5MoeTextModel, TheirMoe),
                                         (dense(False), Qwen3_5TextModel, TheirDense)):  # fmt: skip
        theirs = peer.theirs(case).model
        peer.draw(theirs, 1)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = our_class.from_pretrained(tmp_path / "theirs")
        agree(ours, theirs)
        for layout in ("grouped", "per_expert"):
            ours.save_pretrained(tmp_path / "ours", layout=layout)
            agree(ours, load_theirs(their_class, tmp_path / "ours", torch.float32))


@pytest.mark.parametrize("family", CASES)
def test_loaded_models_give_the_same_logits(family: str, tmp_path: Path) -> None:
    """Logits of both libraries from one folder, with the parameters kept in fp32 rounded alike."""
    case = CASES[family](False)
    our_class, their_class = classes(case)
    theirs = peer.theirs(case)
    peer.draw(theirs, 8)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = case.ids()

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    expected = logits(load_theirs(their_class, tmp_path, torch.float32))
    peer.assert_close(logits(our_class.from_pretrained(tmp_path, dtype=torch.float32)), expected, 1e-5)
