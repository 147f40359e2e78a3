"""save_pretrained with transformers' keywords: each does the same as ours, changes nothing, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.checkpoint.tiny import tiny_config
from qwen35moe.compat.saving import SAVING


def made(**changes: Any) -> Qwen3_5MoeForCausalLM:
    return Qwen3_5MoeForCausalLM(tiny_config(layers=2).replace(**changes)).init_weights(seed=4).eval()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_keyword_of_transformers_does_the_same_as_ours(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(save_directory=tmp_path / "one", max_shard_size="100KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "one").state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "two", is_main_process=False)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_values_of_a_state_dict_are_written(tied: bool, tmp_path: Path) -> None:
    model = made(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = {name: value * 2 + 1 for name, value in model.state_dict().items()}
    if tied:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.save_pretrained(tmp_path / "all", state_dict=values)
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "all").state_dict(), values)
    assert same(model.state_dict(), before), "the model itself is not changed"
    if tied:
        del values["lm_head.weight"]  # as accelerate gathers it
        model.save_pretrained(tmp_path / "once", state_dict=values)
        assert same(load_file(tmp_path / "once" / "model.safetensors"), load_file(tmp_path / "all" / "model.safetensors"))
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    assert same(Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "own").state_dict(), before)
    narrow = {name: value.to(torch.bfloat16) for name, value in values.items()}
    model.save_pretrained(tmp_path / "narrow", state_dict=narrow)
    assert Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16


def test_a_state_dict_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = made()
    values = model.state_dict()
    del values["model.norm.weight"]
    other = made(hidden_size=72).state_dict()
    for tensors, words in (
        (values, "lacks 'model.norm.weight'"),
        ({**model.state_dict(), "score.weight": torch.ones(2)}, "has unknown 'score.weight'"),
        (other, "other shapes of.* more"), ({}, "lacks .* more"),
        ({f"module.{name}": value for name, value in model.state_dict().items()}, "has unknown 'module"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            model.save_pretrained(tmp_path / "x", state_dict=tensors)
        assert len(str(error.value)) < 700
    assert not (tmp_path / "x").exists()


NEUTRAL: dict[str, Any] = {
    "safe_serialization": True, "save_function": torch.save, "save_peft_format": True, "save_original_format": True,
    "token": "x", "push_to_hub": False, "private": False, "create_pr": False, "distributed_checkpoint": False,
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "safe_serialization": (False, "safetensors"), "push_to_hub": (True, "upload_folder"), "repo_id": ("a/b", "upload_folder"),
    "commit_message": ("x", "upload_folder"), "private": (True, "upload_folder"), "create_pr": (True, "upload_folder"),
    "variant": ("fp16", "folder"), "distributed_checkpoint": (True, "state_dict"),
}  # fmt: skip


def test_neutral_keywords_change_nothing(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "neutral", **NEUTRAL)
    model.save_pretrained(tmp_path / "none", **{k.name: None for k in SAVING if k.name != "save_directory"}, state_dict=None)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(same(load_file(tmp_path / name / "model.safetensors"), plain) for name in ("neutral", "none"))


def test_other_values_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = made()
    for name, (value, way_out) in REFUSED.items():
        with pytest.raises(ValueError, match=rf"save_pretrained\({name}=.*not supported: .*{way_out}"):
            model.save_pretrained(tmp_path / "x", **{name: value})
    with pytest.raises(TypeError, match="no keyword 'max_shard': did you mean 'max_shard_size'"):
        model.save_pretrained(tmp_path / "x", max_shard="1GB")
    for path in ("", None, 3):
        with pytest.raises(ValueError, match="save_pretrained.*name a folder"):
            model.save_pretrained(path)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
    assert {keyword.name for keyword in SAVING} == {"save_directory"} | {*NEUTRAL} | {*REFUSED}
