"""The Auto classes choose as transformers' do, and refuse what they cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35moe
from qwen35moe.checkpoint.tiny import tiny_config
from qwen35moe.config import ConfigError

AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
KINDS: dict[str, dict[str, Any]] = {"moe": {}, "dense": {"dense": True}, "moe vision": {"vision": True},
                                    "dense vision": {"vision": True, "dense": True}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_the_one_that_transformers_takes(kind: str, tmp_path: Path) -> None:
    import transformers

    config = tiny_config(layers=2, **KINDS[kind])
    theirs = config.to_transformers()
    suffix = "ForConditionalGeneration" if config.vision_config else "ForCausalLM"
    model = getattr(qwen35moe, ("Qwen3_5Moe" if "moe" in kind else "Qwen3_5") + suffix)(config)
    model.save_pretrained(tmp_path)
    for name in AUTO:
        with torch.device("meta"):
            try:
                expected = type(getattr(transformers, name).from_config(theirs)).__name__
            except (ValueError, AttributeError):
                expected = None
        auto = getattr(qwen35moe, name)
        if expected is None or (name == "AutoModelForMultimodalLM" and config.vision_config is None):
            for door, value in ((auto.from_config, config), (auto.from_pretrained, tmp_path)):
                with pytest.raises(ConfigError, match="text only: use AutoModelForCausalLM"):
                    door(value)
            continue
        for form in (config, config.to_dict(), theirs):
            with torch.device("meta"):
                assert type(auto.from_config(form)).__name__ == expected
        assert type(auto.from_pretrained(tmp_path, device_map="meta", torch_dtype="auto")).__name__ == expected


def test_configurations_come_with_changes_and_by_model_type() -> None:
    config = qwen35moe.AutoConfig.from_pretrained("tiny", num_experts_per_tok=2, trust_remote_code=True, revision="main")
    assert config.num_experts_per_tok == 2 and config.name_or_path == "tiny" and config.vision_config is not None
    assert qwen35moe.AutoConfig.for_model("qwen3_5_moe_text", num_experts=32).num_experts == 32
    model = qwen35moe.AutoModelForCausalLM.from_pretrained("tiny", config=config)
    assert model.model.layers[0].mlp.gate.top_k == 2
    for call, words in (
        (lambda: qwen35moe.AutoConfig.from_pretrained("tiny", num_expert=2), "did you mean 'num_experts'"),
        (lambda: qwen35moe.AutoConfig.from_pretrained("tiny", return_unused_kwargs=True), "return_unused_kwargs"),
        (lambda: qwen35moe.AutoConfig.from_pretrained(""), "give a folder"),
        (lambda: qwen35moe.AutoConfig.for_model("llama"), "llama"),
        (lambda: qwen35moe.AutoModelForCausalLM.from_pretrained("tiny", quantization_config={}), "torchao"),
        (lambda: qwen35moe.AutoModelForCausalLM.from_pretrained("nowhere"), "there is no folder nowhere"),
        (lambda: qwen35moe.AutoTokenizer.from_pretrained("tiny", use_fasst=True), "use_fasst"),
        (lambda: qwen35moe.AutoTokenizer.from_pretrained("nowhere"), "there is no folder nowhere"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=words) as error:
            call()
        assert "load_model" not in str(error.value)


def test_an_auto_class_has_no_objects() -> None:
    for name in (*AUTO, "AutoConfig", "AutoTokenizer", "AutoProcessor"):
        with pytest.raises(TypeError, match=rf"{name} is not made itself: call {name}.from_pretrained"):
            getattr(qwen35moe, name)()


def test_calls_have_transformers_defaults() -> None:
    tokenizer = qwen35moe.AutoTokenizer.from_pretrained("tiny", padding_side="left", use_fast=True)
    assert isinstance(tokenizer("And God said")["input_ids"], list) and tokenizer.padding_side == "left"
    processor = qwen35moe.AutoProcessor.from_pretrained("tiny", trust_remote_code=True)
    assert isinstance(processor.tokenizer("And God said")["input_ids"], list)
    assert isinstance(qwen35moe.load_processor("tiny").tokenizer("And God said")["input_ids"], torch.Tensor)
