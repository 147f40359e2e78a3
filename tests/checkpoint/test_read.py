"""Loading: every layout, name, dtype and device gives the same weights; one error reports everything that is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.checkpoint import CheckpointError, fill, load_model
from qwen35moe.config import Config, ConfigError
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel
from tests.support import peer
from tests.support.checkpoints import FP32_PARAMETERS, per_expert, write
from tests.support.memory import memory_taken
from tests.support.peer import FULL, LINEAR, Case, odd_shape

MODEL = Qwen3_5MoeForCausalLM
Tensors = dict[str, Tensor]


def case(**changes: Any) -> Case:
    return odd_shape(11, **{"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "num_experts": 5,
                            "num_experts_per_tok": 2, "tie_word_embeddings": False} | changes)  # fmt: skip


def weights(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """The weights of a drawn model by name; those kept in fp32 are float32."""
    model = peer.ours(case)
    peer.draw(model, 5)
    return {name: value.clone() for name, value in model.to(dtype).state_dict().items()}


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): value for name, value in tensors.items()}


def assert_weights(model: torch.nn.Module, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value.dtype if dtype is None else dtype
        if name.endswith(FP32_PARAMETERS):
            wanted = torch.promote_types(torch.float32, wanted)
        assert actual[name].dtype == wanted, name
        assert torch.equal(actual[name], value.to(wanted)), name


@pytest.fixture(scope="module")
def bf16() -> tuple[Case, Tensors]:
    return case(), weights(case(), torch.bfloat16)


# ------------------------------------------------------------------------------------------------ layouts and names


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("how", ["map", "copy"])
@pytest.mark.parametrize("layout", ["grouped", "per_expert", "one layer each", "gate_up grouped, down per expert"])
def test_every_layout_gives_the_same_weights(
    layout: str, how: str, shards: int, bf16: tuple[Case, Tensors], tmp_path: Path
) -> None:
    of, tensors = bf16
    keep = {
        "grouped": lambda name: True,
        "per_expert": lambda name: False,
        "one layer each": lambda name: ".0." in name,
        "gate_up grouped, down per expert": lambda name: name.endswith("gate_up_proj"),
    }[layout]
    folder = write(tmp_path, per_expert(tensors, keep), of.text, shards)
    model = MODEL.from_pretrained(folder, weights=how)
    assert_weights(model, tensors)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    report = model.loading_report
    assert report.stacked == {"grouped": 0, "per_expert": 4}.get(layout, 2) and report.files == shards
    # No dtype is converted, and only stacked parameters take new memory.
    assert not report.converted and not report.left_out
    assert (report.mapped, report.copied) == ((len(tensors) - report.stacked, 0) if how == "map" else
                                              (0, len(tensors) - report.stacked))  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model.", ""])
@pytest.mark.parametrize("head", ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"])
def test_every_prefix_is_read(prefix: str, head: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    on_disk = renamed(tensors, lambda name: head if name == "lm_head.weight" else prefix + name.removeprefix("model."))
    assert_weights(MODEL.from_pretrained(write(tmp_path, on_disk, of.text)), tensors)


def test_the_text_model_is_loaded_from_a_multimodal_checkpoint(
    bf16: tuple[Case, Tensors], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of, tensors = bf16
    extra = {"model.visual.pos_embed.weight": torch.ones(4, 3), "visual.patch_embed.proj.bias": torch.ones(3),
             "vision_tower.merger.norm.bias": torch.ones(2), "mtp.fc.weight": torch.ones(2, 4),
             "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 4),
             "model.language_model.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    on_disk = renamed(tensors, lambda name: name.replace("model.", "model.language_model.", 1)) | extra
    config = {"model_type": "qwen3_5_moe", "text_config": of.text, "tie_word_embeddings": False,
              "vision_config": {"out_hidden_size": of.text["hidden_size"]}}  # fmt: skip
    with caplog.at_level(logging.INFO):
        model = MODEL.from_pretrained(write(tmp_path, on_disk, config, shards=2))
    assert_weights(model, tensors)
    left_out = {"model.visual.*": 3, "mtp.*": 2, "*rotary_emb.inv_freq": 1}
    assert model.loading_report.left_out == left_out
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("qwen35moe.checkpoint")]
    assert len(messages) == 1 and all(name in messages[0] and str(count) in messages[0] for name, count in left_out.items())


def test_a_bare_text_model_reports_that_the_head_is_left_out(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = Qwen3_5MoeTextModel.from_pretrained(write(tmp_path, tensors, of.text))
    expected = {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}
    assert_weights(model, expected)
    assert model.loading_report.left_out == {"lm_head.weight": 1} and "lm_head.weight" in str(model.loading_report)


def test_dense_models(tmp_path: Path) -> None:
    of = odd_shape(4, dense=True, tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    on_disk = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    assert_weights(Qwen3_5ForCausalLM.from_pretrained(write(tmp_path, on_disk, of.text)), tensors)
    with pytest.raises(ConfigError, match="Qwen3_5MoeForCausalLM is for MoE"):
        MODEL.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- tying


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    of = case(tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    without = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    for on_disk in (without, tensors, {name: value for name, value in tensors.items() if "embed" not in name}):
        model = MODEL.from_pretrained(write(tmp_path, on_disk, of.text))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_weights(model, tensors)


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path: Path) -> None:
    of = case(tie_word_embeddings=True)
    tensors = weights(of, torch.bfloat16)
    other = tensors["lm_head.weight"].clone()
    other[-1, -1] += 1
    with pytest.raises(CheckpointError, match="tied but different.*lm_head.weight.*tie_word_embeddings=False"):
        MODEL.from_pretrained(write(tmp_path, tensors | {"lm_head.weight": other}, of.text))
    # The advice of the message works:
    untied = Config.from_pretrained(tmp_path).replace(tie_word_embeddings=False)
    assert torch.equal(MODEL.from_pretrained(tmp_path, config=untied).lm_head.weight, other)
    # The same values in another dtype are the same head.
    write(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"].float()}, of.text)
    assert MODEL.from_pretrained(tmp_path).lm_head.weight is not None
    write(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1]}, of.text)
    with pytest.raises(CheckpointError, match="tied but different"):
        MODEL.from_pretrained(tmp_path)


def test_an_untied_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    of = case()
    tensors = {name: value for name, value in weights(of).items() if name != "lm_head.weight"}
    advice = r"missing: lm_head.weight.*tie_word_embeddings is false.*replace\("
    with pytest.raises(CheckpointError, match=advice) as error:
        MODEL.from_pretrained(write(tmp_path, tensors, of.text))
    assert len(error.value.problems) == 1
    tied = Config.from_pretrained(tmp_path).replace(tie_word_embeddings=True)
    model = MODEL.from_pretrained(tmp_path, config=tied)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


# ----------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["map", "copy"])
def test_auto_is_the_stored_dtype_and_some_parameters_stay_fp32(stored: torch.dtype, how: str, tmp_path: Path) -> None:
    tensors = {name: value.to(stored) for name, value in weights(case()).items()}  # all of them, as in Qwen3.6
    model = MODEL.from_pretrained(write(tmp_path, tensors, case().text), weights=how)
    assert_weights(model, tensors, stored)
    assert model.dtype == stored and model.loading_report.dtype == stored and not model.loading_report.converted


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32, "torch.float64", torch.float16])
@pytest.mark.parametrize("how", ["map", "copy"])
def test_a_requested_dtype_converts(dtype: Any, how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    model = MODEL.from_pretrained(write(tmp_path, per_expert(tensors), of.text), dtype=dtype, weights=how)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert_weights(model, tensors, wanted)
    ordinary = sum(not name.endswith(FP32_PARAMETERS) for name in tensors)
    converted = {} if wanted == torch.bfloat16 else {f"BF16 -> {str(wanted)[6:]}": ordinary}
    assert model.loading_report.converted == converted


def test_tensors_of_another_dtype_are_converted_and_counted(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.mlp.gate.weight"
    model = MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].float()}, of.text))
    assert_weights(model, tensors)
    assert model.loading_report.converted == {"F32 -> bfloat16": 1}


def test_the_stored_dtype_takes_precedence_over_the_configuration_with_a_note(tmp_path: Path) -> None:
    folder = write(tmp_path, weights(case()), case().text | {"dtype": "bfloat16"})
    model = MODEL.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert "config.json has dtype bfloat16, most weights are torch.float32" in str(model.loading_report)
    assert MODEL.from_pretrained(folder, dtype="bfloat16").loading_report.notes == []


def test_modules_keep_the_stored_dtype_of_parameters_kept_in_fp32(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.linear_attn.dt_bias"
    model = MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].bfloat16()}, of.text))
    mixer = model.model.layers[0].linear_attn
    assert mixer.stored_dtypes == {"A_log": torch.float32, "dt_bias": torch.bfloat16}
    assert mixer.norm.stored_dtypes == {"weight": torch.float32}


@pytest.mark.parametrize("how", ["map", "copy"])
def test_the_transformers_policy_rounds_parameters_kept_in_fp32(how: str, bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    rounded = {n: v.bfloat16().float() if n.endswith(FP32_PARAMETERS) else v for n, v in tensors.items()}
    assert not torch.equal(rounded["model.layers.0.linear_attn.A_log"], tensors["model.layers.0.linear_attn.A_log"])
    assert_weights(MODEL.from_pretrained(folder, dtype_policy="transformers", weights=how), rounded)
    assert_weights(MODEL.from_pretrained(folder, weights=how), tensors)
    wide = MODEL.from_pretrained(folder, dtype=torch.float32, dtype_policy="transformers", weights=how)
    assert_weights(wide, tensors, torch.float32)  # rounding to float32 changes nothing


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": torch.int32}, {"dtype": "half float"},
                                     {"weights": "mmap"}, {"dtype_policy": "hf"}])  # fmt: skip
def test_errors_name_the_valid_choices(options: dict[str, Any], tmp_path: Path) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}=.*one of"):
        load_model(MODEL, tmp_path, **options)


# ----------------------------------------------------------------------------------------------------------- errors


def problems_of(folder: Path, cls: Any = MODEL, **options: Any) -> set[tuple[str, str]]:
    with pytest.raises(CheckpointError) as caught:
        cls.from_pretrained(folder, **options)
    return {(problem.kind, problem.subject) for problem in caught.value.problems}


def test_one_error_reports_everything(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    tensors = per_expert(tensors)
    experts = "model.layers.0.mlp.experts"
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    del tensors[f"{experts}.3.up_proj.weight"]
    tensors[f"{experts}.5.up_proj.weight"] = tensors[f"{experts}.4.up_proj.weight"]
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].T
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] = torch.ones(
        1, of.text["hidden_size"]).to(torch.float8_e4m3fn)  # fmt: skip
    tensors["model.layers.9.norm.weight"] = torch.ones(2)
    tensors["base_model.lora_A.weight"] = torch.ones(2)
    tensors["model.language_model.layers.1.input_layernorm.weight"] = torch.ones(of.text["hidden_size"])
    folder = write(tmp_path, tensors, of.text, shards=2)
    (folder / "generation_config.json").write_text("[1]")
    twice = {"model.layers.1.input_layernorm.weight", "model.language_model.layers.1.input_layernorm.weight"}
    problems = problems_of(folder)
    assert {problem for problem in problems if problem[0] != "stored twice"} == {
        ("missing", "layers.1.self_attn.q_norm.weight"),
        ("missing", "layers.0.mlp.experts.3.up_proj.weight"),
        ("unexpected", f"{experts}.5.up_proj.weight"),
        ("wrong shape", "model.layers.0.mlp.gate.weight"),
        ("wrong dtype", "model.norm.weight"),
        ("scale missing", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("unexpected", "model.layers.9.norm.weight"),
        ("unexpected", "base_model.lora_A.weight"),
        ("not a JSON object", "generation_config.json"),
    }
    assert [subject in twice for kind, subject in problems if kind == "stored twice"] == [True]


def test_grouped_and_per_expert_together_are_refused(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    both = per_expert(tensors) | {name: tensors[name] for name in tensors if ".0.mlp.experts." in name}
    names = {f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")}
    assert problems_of(write(tmp_path, both, of.text)) == {("stored twice", name) for name in names}
    # One expert beside the grouped tensor is enough.
    one = tensors | {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(1)}
    problems = problems_of(write(tmp_path, one, of.text))
    assert problems == {("stored twice", "model.layers.1.mlp.experts.gate_up_proj")}


def test_a_missing_shard_is_one_problem_and_not_one_per_tensor(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, per_expert(tensors), of.text, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert problems_of(folder) == {("missing file", "model-00002-of-00003.safetensors")}
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"x" * 100)
    assert problems_of(folder) == {("bad header", "model-00002-of-00003.safetensors")}


def test_a_truncated_file_is_reported(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    file = write(tmp_path, tensors, of.text) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert problems_of(tmp_path) == {("cut off", "model.safetensors")}


def test_the_error_folds_layers_and_has_both_shapes(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    config = of.text | {"num_hidden_layers": 4, "layer_types": of.text["layer_types"] * 2, "moe_intermediate_size": 4}
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(write(tmp_path, tensors, config))
    text = str(caught.value)
    width, inner, experts = (of.text[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    assert f"missing: layers.{{2-3}}.input_layernorm.weight: [{width}] (2 tensors)" in text
    assert (f"wrong shape: model.layers.{{0-1}}.mlp.experts.down_proj: on disk [{experts}, {width}, {inner}], "
            f"the model has [{experts}, {width}, 4] (2 tensors)") in text  # fmt: skip
    assert len(text.splitlines()) <= 22


def test_swapped_axes_are_recognised(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    name = "model.layers.0.linear_attn.conv1d.weight"
    with pytest.raises(CheckpointError, match="last two axes are swapped .MLX"):
        MODEL.from_pretrained(write(tmp_path, tensors | {name: tensors[name].transpose(1, 2)}, of.text))


def test_no_memory_is_allocated_for_a_checkpoint_that_does_not_fit(
    bf16: tuple[Case, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors | {"model.strange": torch.ones(1)}, of.text)
    for name in ("map_file", "new_memory", "read_into", "view_of"):
        monkeypatch.setattr(fill, name, lambda *_, **__: pytest.fail("memory was allocated"))
    assert problems_of(folder) == {("unexpected", "model.strange")}


def test_a_configuration_of_absurd_size_is_refused_without_allocation(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    config = of.text | {"vocab_size": 10**6, "moe_intermediate_size": 10**5}
    folder = write(tmp_path / "absurd", tensors, config)
    other = write(tmp_path / "other", tensors, of.text | {"vocab_size": 7})

    def refused(path: Path) -> None:
        assert ("wrong shape", "model.embed_tokens.weight") in problems_of(path)

    assert memory_taken(lambda: refused(folder), lambda: refused(other)) < 4 * 2**20


def test_a_folder_without_a_configuration(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    (write(tmp_path, tensors, of.text) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        MODEL.from_pretrained(tmp_path)
    assert_weights(MODEL.from_pretrained(tmp_path, config=Config.from_dict(of.text)), tensors)
    outside = tmp_path.parent / "outside.json"
    outside.write_text(json.dumps(of.text))
    (tmp_path / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the folder"):
        MODEL.from_pretrained(tmp_path)


def test_generation_settings_are_loaded(bf16: tuple[Case, Tensors], tmp_path: Path) -> None:
    of, tensors = bf16
    folder = write(tmp_path, tensors, of.text)
    without = MODEL.from_pretrained(folder).generation_config
    assert without == {} and not without.changed  # config.json names no token ids
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    assert MODEL.from_pretrained(folder).generation_config == {"temperature": 0.7}
