"""from_pretrained and from_config with transformers' keywords: each does the same as ours, changes nothing, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen35moe import Config, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
from qwen35moe.checkpoint.tiny import tiny_config
from qwen35moe.compat import TABLE
from qwen35moe.compat.loading import LOADING
from tests.support.floors import ROOT

CLS = Qwen3_5MoeForCausalLM
IDS = torch.tensor([[7, 3, 11, 250, 6], [1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = CLS(tiny_config(layers=3, changes={"layer_types": ["linear_attention", "full_attention", "linear_attention"]}))
    model.init_weights(seed=3).to(torch.bfloat16).save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_keyword_of_transformers_does_the_same_as_ours(folder: Path) -> None:
    plain = CLS.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16 and not plain.training and plain.name_or_path == str(folder)
    assert plain.config.name_or_path == str(folder)
    for value in (torch.float32, "float32"):
        wide = CLS.from_pretrained(pretrained_model_name_or_path=folder, torch_dtype=value)
        assert wide.dtype == torch.float32 and torch.equal(wide.lm_head.weight, plain.lm_head.weight.float())
    for value in ("auto", "balanced", "sequential", "cpu", {"": "cpu"}, torch.device("cpu"), None):
        assert torch.equal(logits(CLS.from_pretrained(folder, device_map=value)), logits(plain))
    assert all(p.is_meta for p in CLS.from_pretrained(folder, device_map="meta").parameters())
    assert all(p.is_meta for p in CLS.from_pretrained(folder, device_map={"": "meta"}).parameters())
    eager = CLS.from_pretrained(folder, attn_implementation="eager", torch_dtype="float32")
    assert eager.model.layers[1].self_attn.__dict__["backend_choices"] == {"attention": "eager"}
    assert (logits(eager) - logits(wide)).abs().max() < 1e-5 * logits(wide).abs().max()
    actual = CLS.from_pretrained(folder, attn_implementation={"text_config": "sdpa", "vision_config": "sdpa"})
    assert torch.equal(logits(actual), logits(plain))
    for name in ("token", "use_auth_token", "cache_dir"):  # without effect on a folder, as in transformers
        assert torch.equal(logits(CLS.from_pretrained(folder, **{name: "x"}, local_files_only=True)), logits(plain))
    assert torch.equal(logits(CLS.from_pretrained(folder.parent, subfolder="model", revision="main")), logits(plain))
    model = CLS.from_pretrained(folder, generation_config=GenerationConfig(max_new_tokens=3))
    assert model.generate(IDS, eos_token_id=[]).shape == (2, 8)


def test_fields_of_the_configuration_are_keywords(folder: Path) -> None:
    model = CLS.from_pretrained(
        folder, output_router_logits=True, router_aux_loss_coef=0.25, rope_theta=5000.0, use_cache=False
    )
    assert (model.config.router_aux_loss_coef, model.config.text_config.rope.rope_theta) == (0.25, 5000.0)
    assert model(IDS).router_logits is not None and not model.config.use_cache
    whole = Config.from_pretrained(folder)
    for config in (whole, whole.text_config, whole.to_dict(), whole.to_transformers()):
        other = CLS.from_pretrained(folder, config=config, num_experts_per_tok=1)
        assert other.config.num_experts_per_tok == 1 and other.model.layers[0].mlp.gate.top_k == 1
    with pytest.raises(TypeError, match="no keyword 'num_expert': did you mean 'num_experts'"):
        CLS.from_pretrained(folder, num_expert=3)


def test_loading_info_is_that_of_transformers(folder: Path) -> None:
    result: Any = CLS.from_pretrained(folder, output_loading_info=True)
    model, info = result
    assert isinstance(model, CLS)
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    result = CLS.from_pretrained("tiny", output_loading_info=True)
    assert result[1]["unexpected_keys"] == {"model.visual.*"}


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (True, False), "code_revision": ("main",), "low_cpu_mem_usage": (True, False),
    "weights_only": (True,), "offload_folder": ("somewhere",), "offload_state_dict": (True,), "offload_buffers": (False,),
    "resume_download": (True,), "tqdm_class": (object,), "adapter_name": ("default",), "_from_auto": (True,),
    "_from_pipeline": ("text-generation",), "_commit_hash": ("abc",), "_fast_init": (True,), "use_safetensors": (True,),
    "from_tf": (False,), "from_flax": (False,), "ignore_mismatched_sizes": (False,), "load_in_8bit": (False,),
    "load_in_4bit": (False,), "adapter_kwargs": ({},), "experts_implementation": ("grouped_mm", "batched_mm"), "tp_size": (1,),
    "output_hidden_states": (False,), "output_attentions": (False,),
    "use_flash_attention_2": (False,), "use_kernels": (False,), "allow_all_kernels": (False,),
}  # fmt: skip


def test_neutral_keywords_change_nothing(folder: Path) -> None:
    plain = logits(CLS.from_pretrained(folder))
    width = max(len(values) for values in NEUTRAL.values())
    for index in range(width):  # all at once
        neutral = {name: values[min(index, len(values) - 1)] for name, values in NEUTRAL.items()}
        assert torch.equal(logits(CLS.from_pretrained(folder, **neutral)), plain)
    assert torch.equal(logits(CLS.from_pretrained(folder, **{keyword.name: None for keyword in LOADING if keyword.name !=
                                                            "pretrained_model_name_or_path"})), plain)  # fmt: skip


REFUSED: dict[str, tuple[Any, str]] = {
    "attn_implementation": ("flex_attention", "use_backends"), "use_safetensors": (False, "safetensors"),
    "from_tf": (True, "safetensors"), "from_flax": (True, "safetensors"), "gguf_file": ("x.gguf", "convert"),
    "variant": ("fp16", "folder"), "ignore_mismatched_sizes": (True, "ignore="), "state_dict": ({}, "load_state_dict"),
    "key_mapping": ({"a": "b"}, "load_state_dict"), "quantization_config": ({"load_in_4bit": True}, "torchao"),
    "load_in_8bit": (True, "torchao"), "load_in_4bit": (True, "torchao"), "max_memory": ({0: "1GB"}, "device="),
    "experts_implementation": ("eager", "use_backends"), "use_flash_attention_2": (True, "attn_implementation"),
    "output_hidden_states": (True, "forward call"), "output_attentions": (True, "forward call"),
    "use_kernels": (True, "backends"), "kernel_config": ({"a": 1}, "backends"), "allow_all_kernels": (True, "no code"),
    "fusion_config": ({"a": 1}, "backends"), "distributed_config": ("x", "device_map"), "device_mesh": ("x", "device_map"),
    "tp_plan": ("auto", "device_map"), "tp_size": (2, "device_map"), "proxies": ({"http": "x"}, "HTTPS_PROXY"),
    "mirror": ("x", "HF_ENDPOINT"), "adapter_kwargs": ({"a": 1}, "peft"),
}  # fmt: skip


def test_other_values_are_refused_with_the_way_out(folder: Path) -> None:
    for name, (value, way_out) in REFUSED.items():
        with pytest.raises(ValueError, match=rf"from_pretrained\({name}=.*not supported: .*{way_out}") as error:
            CLS.from_pretrained(folder, **{name: value})
        assert len(str(error.value)) < 400
    for name in ("torch_dtyp", "device_mp", "trust_remotecode"):
        with pytest.raises(TypeError, match=f"from_pretrained.* no keyword '{name}': did you mean"):
            CLS.from_pretrained(folder, **{name: 1})
    for path in ("", None, 3):
        with pytest.raises(ValueError, match="name a folder"):
            CLS.from_pretrained(path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="torch_dtype=torch.float64 and dtype=torch.float32"):
        CLS.from_pretrained(folder, dtype=torch.float32, torch_dtype=torch.float64)
    with pytest.raises(ValueError, match="revision='v1' needs a name on the Hub"):
        CLS.from_pretrained(folder, revision="v1")
    for inside in ("../model", "/model"):
        with pytest.raises(ValueError, match="subfolder=.*must be a path inside"):
            CLS.from_pretrained(folder, subfolder=inside)
    with pytest.raises(ValueError, match=r"subfolder=x of owner/name on the Hub.*snapshot_download"):
        CLS.from_pretrained("owner/name", subfolder="x")


def test_every_row_of_the_tables_is_tried_here() -> None:
    same = {"pretrained_model_name_or_path", "torch_dtype", "device_map", "use_auth_token", "attn_implementation"}
    assert {keyword.name for keyword in LOADING} == same | {*NEUTRAL} | {*REFUSED}
    for method in ("from_pretrained", "save_pretrained"):
        for keyword in TABLE[method]:
            path, _, test = keyword.tested_by.partition("::")
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), keyword.name


def test_a_dict_of_devices_places_whole_layers(folder: Path) -> None:
    """The second device is "meta", as in test_device_map."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    placed = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers": "meta",
        "model.norm": "meta",
        "lm_head": "cpu",
    }
    model = CLS.from_pretrained(folder, device_map=placed)
    for name, parameter in model.named_parameters():
        first = "embed_tokens" in name or "layers.0." in name or "lm_head" in name
        assert parameter.device == (cpu if first else meta), name
    assert model.device_map is not None and model.device_map.layers == (cpu, meta, meta) and model.device_map.head == cpu
    tower = Qwen3_5MoeForConditionalGeneration(tiny_config(vision=True)).place({"": "cpu"})
    assert {p.device for p in tower.parameters()} == {cpu}
    tied = CLS(tiny_config(layers=2).replace(tie_word_embeddings=True))
    assert tied.place({"model": "cpu", "lm_head": "cpu"}).device == cpu
    for wrong, words in (
        ({"model": "cpu"}, "no device for lm_head.weight"), ({"": "cpu", "model.layer.0": "cpu"}, "has no such module"),
        ({"": "cpu", "model.layers.1.mlp": "meta"}, "layers.1.mlp.*a layer stays whole"), ({"": "disk"}, "disk"),
        ({"": "cpu", "model.norm": "meta"}, "norm.weight on meta, which must be on cpu"),
        ("gpu", "'gpu' is no device"), (["cpu", "x" * 999], "is no device"), ({"": "cpu", "lm_head": "disk"}, "disk"),
        (object(), "is no"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            CLS.from_pretrained(folder, device_map=wrong)


def test_loading_inside_a_mode_gives_the_model_that_trains_outside(folder: Path) -> None:
    plain = CLS.from_pretrained(folder, dtype=torch.float32)
    for mode in (
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("cpu"),
    ):
        with mode():  # type: ignore[operator]
            model = CLS.from_pretrained(folder, dtype=torch.float32)
        assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
        assert torch.equal(logits(model), logits(plain))
    model(IDS, labels=IDS).loss.backward()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)  # conftest restores it
        model = CLS.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and model.model.layers[0].linear_attn.A_log.dtype == torch.float32
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight.bfloat16())


# -------------------------------------------------------------------------------------------------------- from_config


def test_from_config_draws_in_the_dtype_that_is_asked_for() -> None:
    config = tiny_config(layers=2)
    for form in (config, config.to_dict(), config.to_transformers()):
        torch.manual_seed(2)
        plain = CLS(form)
        for keywords, dtype in (({}, torch.float32), ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
                                ({"dtype": "float64"}, torch.float64), ({"dtype": "auto"}, torch.float32)):  # fmt: skip
            torch.manual_seed(2)
            model = CLS.from_config(form, attn_implementation="sdpa", trust_remote_code=True, **keywords)
            assert model.dtype == dtype and torch.equal(model.lm_head.weight, plain.lm_head.weight.to(dtype))
    torch.manual_seed(2)
    assert torch.equal(CLS._from_config(config, dtype=torch.bfloat16).lm_head.weight, plain.lm_head.weight.bfloat16())
    assert CLS.from_config(config, num_experts=3).config.num_experts == 3
    dense = Qwen3_5ForCausalLM.from_config(tiny_config(dense=True), attn_implementation="eager")
    assert isinstance(dense, nn.Module) and dense.model.layers[3].self_attn.__dict__["backend_choices"] == {
        "attention": "eager"
    }
    for wrong in ("int8", "nothing", torch.int64):
        with pytest.raises(ValueError, match="dtype="):
            CLS.from_config(config, dtype=wrong)
    with pytest.raises(TypeError, match="from_config.* no keyword 'torch_dtyp'"):
        CLS.from_config(config, torch_dtyp=1)
