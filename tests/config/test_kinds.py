"""Configurations as others have them: of transformers, dicts, parts; read by the decoder's names, assigned, copied, hostile."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe import Cache, Config, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeModel, Qwen3_5MoeVisionModel
from qwen35moe.config import ConfigError, TextConfig, VisionConfig
from qwen35moe.config.text_fields import TextFields
from tests.support.configs import TINY, TINY_DENSE, nested

KINDS = {"moe": TINY, "dense": TINY_DENSE, "moe vision": nested(), "dense vision": nested(TINY_DENSE)}


@pytest.mark.parametrize("kind", KINDS)
def test_to_transformers_and_back_is_the_same(kind: str) -> None:
    config = Config.from_dict(KINDS[kind])
    theirs = config.to_transformers()
    name = ("Qwen3_5Moe" if "moe" in kind else "Qwen3_5") + ("Config" if "vision" in kind else "TextConfig")
    assert type(theirs).__name__ == name
    sizes = theirs.get_text_config()
    assert (sizes.hidden_size, sizes.layer_types) == (config.hidden_size, list(config.layer_types))
    assert Config.of(theirs) == config
    assert TextConfig.of(theirs) == config.text_config
    assert TextConfig.of(config.text_config.to_transformers()) == config.text_config
    if config.vision_config is not None:
        assert VisionConfig.of(theirs) == config.vision_config
        assert VisionConfig.of(theirs.vision_config) == config.vision_config
        assert VisionConfig.of(config.vision_config.to_transformers()) == config.vision_config
        assert Config(text_config=theirs.text_config, vision_config=theirs.vision_config) == config


def test_a_nested_configuration_without_vision_gets_no_tower_from_transformers() -> None:
    for sizes in (TINY, TINY_DENSE):
        config = Config.from_dict(nested(sizes)).replace(vision_config=None)
        assert not config.is_flat and config.vision_config is None
        theirs = config.to_transformers()
        assert not hasattr(theirs, "vision_config") and Config.of(theirs) == config.text_only()


@pytest.mark.parametrize("name", Config.presets())
def test_every_published_size_is_the_same_in_transformers(name: str) -> None:
    config = Config.preset(name)
    assert Config.of(config.to_transformers()) == config


def kinds_of(config: Config) -> dict[str, Any]:
    return {
        "Config": config, "TextConfig": config.text_config, "dict": config.to_dict(), "text dict": config.text_config.to_dict(),
        "transformers": config.to_transformers(), "transformers text": config.text_config.to_transformers(),
    }  # fmt: skip


@pytest.mark.parametrize("cls, sizes", [(Qwen3_5MoeForCausalLM, TINY), (Qwen3_5ForCausalLM, TINY_DENSE)])
def test_a_model_and_a_cache_take_every_kind(cls: Any, sizes: dict[str, Any], tmp_path: Path) -> None:
    config, shapes = Config.from_dict(sizes), None
    for value in kinds_of(config).values():
        model = cls(value)
        assert shapes in (None, shapes := {name: tuple(p.shape) for name, p in model.named_parameters()})
        cache = Cache(value, 2)
        assert [type(layer).__name__ for layer in cache.layers] == [
            "KVCache" if kind == "full_attention" else "DeltaNetState" for kind in config.layer_types
        ]
        model.eval()(torch.tensor([[3, 4], [5, 6]]), cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        assert Cache.load(tmp_path / "cache.safetensors", value).lengths.tolist() == [2, 2]


def test_a_tower_takes_every_kind() -> None:
    config = Config.from_dict(nested())
    theirs = config.to_transformers()
    assert config.vision_config is not None
    for value in (config, config.vision_config, config.to_dict(), config.vision_config.to_dict(), theirs, theirs.vision_config):
        assert Qwen3_5MoeVisionModel(value).config == config.vision_config
    assert Qwen3_5MoeModel(theirs).config == config
    for text_only in (Config.from_dict(TINY), TextConfig(**TINY), TINY, TextConfig(**TINY).to_transformers()):
        with pytest.raises(ConfigError, match="no vision_config"):
            Qwen3_5MoeVisionModel(text_only)


def test_what_is_no_configuration_is_refused_in_one_line() -> None:
    import transformers

    other = transformers.LlamaConfig()
    for value, words in (
        ("somewhere", "Config.from_pretrained"), (Path("somewhere"), "Config.from_pretrained"), (3, "a whole number"),
        (None, "null"), (transformers.Qwen3_5MoeConfig, "is a class"), (TextConfig, "is a class"), (other, "llama"),
        (VisionConfig(), "vision tower"), (torch.nn.Linear(2, 3), "Linear"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as error:
            Qwen3_5MoeForCausalLM(value)
        assert len(str(error.value)) < 500
    # transformers' defaults do not compose: its tower has an out_hidden_size of another model
    with pytest.raises(ConfigError, match="out_hidden_size = 3584 must equal text_config.hidden_size = 2048"):
        Config.of(transformers.Qwen3_5MoeConfig())


# ------------------------------------------------------------------------------------------------- reading and assigning


def test_every_field_of_the_decoder_is_read_on_the_whole_configuration() -> None:
    own = {"model_type", "tie_word_embeddings"}
    fields = {name for name in TextConfig.__dataclass_fields__ if name not in own}
    assert fields == {name for name in vars(TextFields) if not name.startswith("_")}
    for sizes in KINDS.values():
        config = Config.from_dict(sizes)
        for name in fields:
            assert getattr(config, name) == getattr(config.text_config, name), name
    config = Config.from_dict(nested())
    assert (config.hidden_size, config.num_attention_heads, config.num_experts) == (24, 6, 7)
    assert not hasattr(config, "depth") and not hasattr(config, "hidden_sise")
    assert config.name_or_path == "" and config.return_dict


def test_what_training_scripts_assign_is_accepted_checked_and_saved() -> None:
    values: dict[str, tuple[Any, Any]] = {  # a value, and one that is refused
        "use_cache": (False, 0), "output_router_logits": (True, "yes"), "router_aux_loss_coef": (0.02, -1.0),
        "vocab_size": (70, 0), "dtype": (torch.bfloat16, "int8"), "initializer_range": (0.5, float("nan")),
        "bos_token_id": (3, 2.0), "eos_token_id": ([3, 4], "x"), "pad_token_id": (0, True), "tie_word_embeddings": (True, 1),
    }  # fmt: skip
    for sizes in KINDS.values():
        config = Config.from_dict(sizes)
        for name, (good, bad) in values.items():
            setattr(config, name, good)
            with pytest.raises(ConfigError, match=name):
                setattr(config, name, bad)
            kept = "bfloat16" if name == "dtype" else good
            assert getattr(config, name) == getattr(config.text_config, name) == kept
        assert Config.from_dict(json.loads(config.to_json_string())) == config
    for name, neutral, other in (
        ("pretraining_tp", 1, 2), ("output_hidden_states", False, True), ("output_attentions", None, True),
        ("return_dict", True, False),
    ):  # fmt: skip
        setattr(config, name, neutral)
        with pytest.raises(ConfigError, match=f"{name} = {other} is not supported"):
            setattr(config, name, other)
    assert config.vision_config is not None
    with pytest.raises(ConfigError, match="use_cache cannot be assigned"):
        config.vision_config.use_cache = False
    with pytest.raises(ConfigError, match="num_experts cannot be assigned.*config.replace.*tie_word_embeddings"):
        config.num_experts = 3


def test_an_assigned_coefficient_and_vocabulary_reach_the_model() -> None:
    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(TINY)
    ids = torch.arange(9)[None]
    losses = []
    for coefficient in (0.0, 0.5):
        model.config.router_aux_loss_coef = coefficient
        out = model(ids, labels=ids, output_router_logits=True)
        losses.append(out.loss.double() - coefficient * out.aux_loss.double())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_misspelt_keyword_suggests_the_field_and_help_shows_the_defaults() -> None:
    for cls, name, meant in (
        (TextConfig, "hidden_sise", "hidden_size"), (TextConfig, "num_expert", "num_experts"),
        (VisionConfig, "num_head", "num_heads"), (Config, "text_conf", "text_config"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{cls.__name__} has no field '{name}': did you mean {meant}"):
            cls(**{name: 3})
        shown = str(inspect.signature(cls))
        assert "unset" not in shown and "args" not in shown and meant in shown
    assert "hidden_size: 'int' = 2048 (dense: 4096)" in str(inspect.signature(TextConfig))
    assert "num_experts: 'int' = 256 (dense: 0)" in str(inspect.signature(TextConfig))
    with pytest.raises(ConfigError, match="keywords only"):
        TextConfig(TINY)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------ as a value


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_a_value_that_is_copied_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    config = Config.from_dict(KINDS[kind])
    config._name_or_path = "somewhere"
    config.use_cache = False
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and copied.name_or_path == "somewhere" and copied.hidden_size == 24
        with pytest.raises(ConfigError, match="replace"):
            copied.num_experts = 3
    deep = copy.deepcopy(config)
    deep.use_cache = True
    assert deep != config and not config.use_cache
    assert config != "somewhere" and config != config.to_dict()
    config.save_pretrained(tmp_path / "new" / "folder")
    assert Config.from_pretrained(tmp_path / "new" / "folder") == config
    assert Config.of(json.loads((tmp_path / "new" / "folder" / "config.json").read_text())) == config
    with pytest.raises(TypeError, match="unhashable"):  # some of its fields may be assigned
        hash(config)
    for reading in (Config.from_pretrained, config.save_pretrained):
        with pytest.raises(ConfigError, match="empty"):
            reading("")


# ------------------------------------------------------------------------------------------------------ hostile values

HOSTILE: tuple[Any, ...] = (
    True, 10**400, -(10**400), 10**5000, float("nan"), float("inf"), -1, 0.5, "3", "x" * 10**6, [], [[]], {}, {"a": {"b": 1}},
    None, [10**5000] * 3, b"3", 3 + 0j,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["moe", "dense vision"])
def test_a_hostile_value_is_read_as_what_it_is_or_refused_in_a_short_message(kind: str) -> None:
    def keys(part: dict[str, Any]) -> list[str]:
        return list(part)

    whole = Config.from_dict(KINDS[kind]).to_dict()
    parts = [whole, *(whole[name] for name in ("text_config", "vision_config") if name in whole)]
    for part in parts:
        for key in keys(part):
            kept = part[key]
            for value in HOSTILE:
                part[key] = value
                try:
                    read = Config.from_dict(whole)
                except ConfigError as error:
                    assert len(str(error)) < 2000, (key, type(value))
                else:
                    assert Config.from_dict(read.to_dict()) == read, (key, value)
            part[key] = kept


def test_a_grid_of_positions_that_is_no_square_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_position_embeddings = 60 must be a square number.*49"):
        VisionConfig(num_position_embeddings=60)
