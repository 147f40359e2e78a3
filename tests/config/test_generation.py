"""config/generation.py: the defaults of generate(), beside transformers' class of that name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as TheirGenerationConfig

from qwen35moe.config import Config, GenerationConfig
from qwen35moe.config.generation import FIELDS
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.support.peer import odd_shape, ours


def test_settings_are_attributes_and_items() -> None:
    settings = GenerationConfig(temperature=0.7, top_k=None)
    assert settings == {"temperature": 0.7} and settings.temperature == settings["temperature"] == 0.7
    assert settings.top_k is None and settings.eos_token_id is None and not settings.do_sample
    settings.top_p = 0.9
    settings.temperature = None
    del settings.min_p
    assert settings == {"top_p": 0.9} and hasattr(settings, "num_beams") and not hasattr(settings, "top_q")
    assert repr(GenerationConfig(eos_token_id=list(range(99)))).startswith("GenerationConfig(eos_token_id=[0, 1, 2")
    assert "top_p" in dir(settings)
    assert hash(settings) == hash(GenerationConfig(top_p=0.9)) != hash(GenerationConfig(top_p=0.8))


def test_unknown_settings_suggest_the_right_one() -> None:
    with pytest.raises(TypeError, match="no setting 'temprature': did you mean 'temperature'"):
        GenerationConfig(temprature=0.7)
    settings = GenerationConfig({"chat_format": "chatml"})  # a key that some file has
    with pytest.raises(AttributeError, match="'max_new_token': did you mean 'max_new_tokens'"):
        settings.max_new_token = 3
    with pytest.raises(AttributeError, match="did you mean 'top_k'"):
        _ = settings.topk
    settings.chat_format = "raw"
    assert settings.chat_format == "raw" and settings.to_dict()["chat_format"] == "raw"


def test_every_setting_of_transformers_has_a_name_here() -> None:
    theirs = {name for name in TheirGenerationConfig().to_dict() if not name.startswith("_")}
    assert theirs <= set(FIELDS)


def test_methods_are_those_of_transformers() -> None:
    values: dict[str, Any] = {"temperature": 0.5, "eos_token_id": [3, 4], "do_sample": True}
    mine, theirs = GenerationConfig(**values), TheirGenerationConfig(**values)
    for change in ({"top_k": 5, "no_such": 1}, {"top_k": 6, "defaults_only": True}, {"top_k": None}):
        assert mine.update(**change) == theirs.update(**change)
        assert mine.top_k == theirs.top_k
    assert mine.update(own=1, allow_custom_entries=True) == {} and mine["own"] == 1
    mine.update({"other": 2, "own": None})
    assert mine["other"] == 2 and "own" not in mine
    mine.pop("other")
    expected = {name: value for name, value in theirs.to_dict().items() if value is not None}
    assert {**mine.to_diff_dict(), "transformers_version": expected["transformers_version"], "_from_model_config": None} == {
        "_from_model_config": None, **expected
    }
    assert mine.to_dict()["top_p"] is None and GenerationConfig.of(theirs).temperature == 0.5
    assert GenerationConfig.of(mine) is mine and GenerationConfig.from_dict(values, top_p=0.5).top_p == 0.5
    with pytest.raises(ValueError, match="transformers' or a dict, got str"):
        GenerationConfig.of("sampling")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c)), GenerationConfig.copy])
def test_copies_are_independent(copied: Any) -> None:
    first = GenerationConfig.from_model_config(Config.preset("35b-a3b"))
    second = copied(first)
    assert type(second) is GenerationConfig and second == first and second._from_model_config and not second.changed
    second.temperature = 0.3
    assert first.temperature is None and second.changed and not first.changed


def test_files(tmp_path: Path) -> None:
    settings = GenerationConfig(eos_token_id=[5, 6], temperature=0.25)
    settings.save_pretrained(tmp_path / "made")
    file = tmp_path / "made" / "generation_config.json"
    assert json.loads(file.read_text()) == {"eos_token_id": [5, 6], "temperature": 0.25}
    assert GenerationConfig.from_pretrained(tmp_path / "made") == GenerationConfig.from_pretrained(file) == settings
    assert TheirGenerationConfig.from_pretrained(tmp_path / "made").eos_token_id == [5, 6]
    for text, words in (("[1]", "not a JSON object"), ("{", "not a readable"), ("[" * 9999, "not a readable")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            GenerationConfig.from_pretrained(file)
    with pytest.raises(ValueError, match="not a readable"):
        GenerationConfig.from_pretrained(tmp_path / "none")


def test_a_model_has_one() -> None:
    case = odd_shape(3, eos_token_id=5)
    model = ours(case)
    ends = model.config.text_config.eos_token_id
    assert model.generation_config == {"eos_token_id": ends} == {"eos_token_id": 5}
    assert model.generation_config is model.generation_config
    assert model.generation_config._from_model_config
    model.config.text_config.eos_token_id = 7  # follows the configuration as long as nothing was set
    assert model.generation_config.eos_token_id == 7
    model.generation_config.temperature = 0.5
    model.config.text_config.eos_token_id = 8
    assert model.generation_config == {"eos_token_id": 7, "temperature": 0.5}
    model.generation_config = {"top_k": 3}
    assert type(model.generation_config) is GenerationConfig and model.generation_config.top_k == 3
    theirs = TheirGenerationConfig(top_k=4)
    model.generation_config = theirs
    assert model.generation_config is theirs
    assert copy.deepcopy(model).generation_config.top_k == 4


def test_it_is_saved_with_the_model(tmp_path: Path) -> None:
    model = ours(odd_shape(3))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()  # it would only repeat config.json
    for settings in (GenerationConfig(top_k=4), TheirGenerationConfig(top_k=4)):
        model.generation_config = settings
        model.save_pretrained(tmp_path)
        assert Qwen3_5MoeForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 4
    model.generation_config = {"top_k": 4}
    model.generation_config.clear()
    model.save_pretrained(tmp_path)
    assert Qwen3_5MoeForCausalLM.from_pretrained(tmp_path).generation_config.top_k is None
