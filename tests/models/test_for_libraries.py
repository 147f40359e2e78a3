"""Methods and attributes with transformers' names: the values, against transformers' model or written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qwen35moe.config import Config, ConfigError
from qwen35moe.models.device_map import DeviceMap
from qwen35moe.models.vision_language import Qwen3_5MoeForConditionalGeneration
from tests.integrations.common import KINDS, SIZES, VOCABULARY, tiny, tokens, twin
from tests.support.configs import TINY, nested
from tests.support.peer import relative_error


def multimodal(**top: Any) -> Any:
    return Qwen3_5MoeForConditionalGeneration(Config.from_dict(nested(TINY | SIZES, **top))).init_weights(seed=3).eval()


# ---------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [VOCABULARY + 10, VOCABULARY - 1])
def test_resizing_keeps_rows_and_answers(kind: str, rows: int, tmp_path: Any) -> None:
    model, own = tiny(kind), tiny(kind)
    returned = model.resize_token_embeddings(rows)
    kept = min(rows, VOCABULARY)
    before, after = own(tokens()).logits, model(tokens()).logits
    assert returned is model.get_input_embeddings() and after.shape[-1] == rows
    assert relative_error(after[..., :kept], before[..., :kept]) < 1e-5
    mean = own.model.embed_tokens.weight.mean(0)
    assert all(relative_error(row, mean) < 1e-5 for row in returned.weight[kept:])
    assert model.config.text_config.vocab_size == model.config.vocab_size == rows
    assert (model.lm_head.weight is returned.weight) == (kind == "tied")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, after)
    with pytest.raises(ValueError, match=str(rows)):
        model(torch.full((1, 2), rows))


def test_resizing_to_multiples_and_with_random_rows() -> None:
    model = tiny(dtype=torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(pad_to_multiple_of=64).weight.shape == (64, TINY["hidden_size"])
    grown = model.resize_token_embeddings(130, pad_to_multiple_of=32, mean_resizing=False)
    assert grown.weight.shape[0] == model.lm_head.out_features == 160 and grown.weight.dtype == torch.bfloat16
    assert not grown.weight.requires_grad and model.lm_head.weight.requires_grad
    assert grown.padding_idx == SIZES["pad_token_id"]
    assert grown.weight[64:].float().std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.1)
    for wrong in ({"new_num_tokens": 0}, {"new_num_tokens": 3.0}, {"new_num_tokens": 70, "pad_to_multiple_of": -1}):
        with pytest.raises(ValueError, match="whole number"):
            model.resize_token_embeddings(**wrong)


def test_only_plain_weights_are_resized() -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    wrapped, parametrized = tiny(), tiny()
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    nn.utils.parametrize.register_parametrization(parametrized.model.embed_tokens, "weight", Twice())
    for model in (wrapped, parametrized):
        with pytest.raises(ValueError, match="no plain weight.*merge"):
            model.resize_token_embeddings(70)
        assert model.config.vocab_size == VOCABULARY and model.model.embed_tokens.weight.shape[0] == VOCABULARY


def test_a_multimodal_model_is_resized(tmp_path: Any) -> None:
    for tied in (False, True):
        model = multimodal(tie_word_embeddings=tied)
        before = model(tokens()).logits
        model.resize_token_embeddings(VOCABULARY + 3)
        after = model(tokens()).logits
        assert relative_error(after[..., :VOCABULARY], before) < 1e-5
        assert (model.lm_head.weight is model.language_model.embed_tokens.weight) == tied
        model.save_pretrained(tmp_path / str(tied))
        assert torch.equal(type(model).from_pretrained(tmp_path / str(tied))(tokens()).logits, after)


def test_embedding_and_head_can_be_replaced() -> None:
    model, width = tiny("tied"), TINY["hidden_size"]
    model.set_input_embeddings(nn.Embedding(77, width))
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.config.vocab_size == 77
    head = nn.Linear(width, 77, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert model.config.tie_word_embeddings is False and model.config.text_config.tie_word_embeddings is False
    model.tie_weights()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    for wrong in (nn.Embedding(77, width + 1), nn.Identity()):
        with pytest.raises(ValueError, match=f"hidden_size = {width}"):
            model.set_input_embeddings(wrong)
        with pytest.raises(ValueError, match=f"hidden_size = {width}"):
            model.set_output_embeddings(wrong)
    with pytest.raises(ValueError, match="no head"):
        model.model.set_output_embeddings(head)


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_tied_names_are_those_that_share_a_parameter(kind: str) -> None:
    model, theirs = tiny(kind), twin(tiny(kind))
    assert model._tied_weights_keys == theirs._tied_weights_keys
    assert model.all_tied_weights_keys == getattr(theirs, "all_tied_weights_keys", model.all_tied_weights_keys)
    tied = kind == "tied"
    assert model.all_tied_weights_keys == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert model._keys_to_ignore_on_save == (["lm_head.weight"] if tied else None)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, TINY["hidden_size"]))
    assert model.all_tied_weights_keys == {}
    model.tie_weights()
    assert bool(model.all_tied_weights_keys) == tied
    assert multimodal(tie_word_embeddings=True).all_tied_weights_keys == {
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }


def test_the_configuration_may_be_assigned_what_training_libraries_assign() -> None:
    for config in (Config.from_dict(nested()), Config.from_dict(KINDS["tied"])):
        config.tie_word_embeddings = False
        config.vocab_size = 99  # type: ignore[misc]
        assert config.text_config.vocab_size == 99 and config.to_dict()["tie_word_embeddings"] is False
        assert config.text_config.tie_word_embeddings is False
        again = Config.from_dict(config.to_dict())
        assert again.vocab_size == 99 and again.tie_word_embeddings is False
        for name, wrong in (("vocab_size", 0), ("vocab_size", "9"), ("tie_word_embeddings", 1)):
            with pytest.raises(ConfigError, match=name):
                setattr(config, name, wrong)


# ---------------------------------------------------------------------------------------------------- checkpointing


def test_every_nth_layer_is_checkpointed() -> None:
    model = tiny(num_hidden_layers=5, layer_types=None)
    assert not model.is_gradient_checkpointing and model.supports_gradient_checkpointing
    for every, expected in ((1, [True] * 5), (2, [True, False, True, False, True]), (9, [True] + [False] * 4)):
        model.activation_checkpointing_enable(every_n_layers=every)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == expected
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    wrong: tuple[dict[str, Any], ...] = (
        {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}, {"gradient_checkpointing_kwargs": {"use": 1}},
        {"every_n_layers": 0}, {"offload": True},
    )  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match="not supported|no option|whole number"):
            model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing


def test_the_embedding_requires_a_gradient_until_it_is_disabled() -> None:
    model = tiny().requires_grad_(False)
    for _ in range(2):
        model.enable_input_require_grads()
    assert len(model.model.embed_tokens._forward_hooks) == 1
    assert model(tokens()).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(tokens()).logits.requires_grad and not model.model.embed_tokens._forward_hooks


# ---------------------------------------------------------------------------------------------------- what the model is


def test_the_decoder_is_found_and_replaced() -> None:
    model, other, pictures = tiny(), tiny(seed=2), multimodal()
    assert model.base_model is model.get_decoder() is model.model and model.model.base_model is model.model
    assert pictures.get_decoder() is pictures.model.get_decoder() is pictures.model.language_model
    assert pictures.base_model is pictures.model
    model.set_decoder(other.model)
    model.lm_head = other.lm_head
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_a_placed_model_has_a_device_map() -> None:
    model = tiny()
    assert not hasattr(model, "hf_device_map")
    cpu, meta = torch.device("cpu"), torch.device("meta")
    model.set_device_map(DeviceMap((cpu, meta), meta))
    assert model.hf_device_map == {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "meta", "model.norm": "meta", "lm_head": "meta",
    }  # fmt: skip
    cuda = DeviceMap((torch.device("cuda", 0), torch.device("cuda", 1)), torch.device("cuda", 1))
    assert set(cuda.by_module(multimodal()).items()) == {
        ("model.visual", 0), ("model.language_model.embed_tokens", 0), ("model.language_model.layers.0", 0),
        ("model.language_model.layers.1", 1), ("model.language_model.norm", 1), ("lm_head", 1),
    }  # fmt: skip
    model.set_device_map(None)
    assert not hasattr(model, "hf_device_map")


def test_constants() -> None:
    model, theirs = tiny(), twin(tiny())
    for name in ("main_input_name", "base_model_prefix", "supports_gradient_checkpointing", "_tied_weights_keys"):
        assert getattr(model, name) == getattr(theirs, name), name
    assert model.can_generate() and type(model).can_generate() and not model.model.can_generate()
    assert not (model.is_loaded_in_8bit or model.is_loaded_in_4bit or model.is_quantized or model.is_parallelizable)
    assert model.quantization_method is None and model.hf_quantizer is None
    assert model.get_memory_footprint() == 4 * model.num_parameters()
    assert model.num_parameters() == theirs.num_parameters()
    model.add_model_tags("a")
    model.add_model_tags(["b", "a"])
    assert model.model_tags == ["a", "b"] and tiny().model_tags is None
    model.warnings_issued["estimate_tokens"] = True
    assert tiny().warnings_issued == {}
