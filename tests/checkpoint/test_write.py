"""Saving: published names, aligned tensors, lossless dtypes, and a folder that is never half old and half new."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwen35moe.checkpoint import CheckpointError, read_headers, write
from qwen35moe.checkpoint.write import save_model, split
from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel
from tests.support import peer
from tests.support.memory import memory_taken
from tests.support.peer import FULL, LINEAR, odd_shape

MODEL = Qwen3_5MoeForCausalLM
LAYOUTS = ("grouped", "per_expert")
pytestmark = pytest.mark.usefixtures("quick_disk")


def drawn(seed: int = 1, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    changes = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "num_experts": 5, "num_experts_per_tok": 2,
               "tie_word_embeddings": False} | changes  # fmt: skip
    model = peer.ours(odd_shape(11, **changes))
    peer.draw(model, seed)
    return model.to(dtype)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def loaded(path: Path, **options: Any) -> Any:
    return MODEL.from_pretrained(path, **options)


def files(path: Path) -> list[str]:
    return sorted(os.listdir(path))


# --------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16])
def test_saved_and_loaded_equals_the_original(layout: str, size: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = drawn(dtype=dtype)
    model.save_pretrained(tmp_path, layout=layout, max_shard_size=size)
    assert same(loaded(tmp_path), model)
    assert same(loaded(tmp_path, weights="copy"), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"] and config["model_type"] == "qwen3_5_moe_text"
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "vision_config" not in config
    assert files(tmp_path)[0] == "config.json" and not [name for name in files(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(tied: bool, tmp_path: Path) -> None:
    model = drawn(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in read_headers(tmp_path).tensors) is not tied
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    again = loaded(tmp_path)
    assert same(again, model) and (again.lm_head.weight is again.model.embed_tokens.weight) is tied


def test_the_written_configuration_has_the_tying_of_the_model(tmp_path: Path) -> None:
    """A model that was untied by hand is saved with its head and tie_word_embeddings = false."""
    model = drawn(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(tmp_path)
    assert same(loaded(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_other_classes(tmp_path: Path) -> None:
    text = drawn().model
    text.save_pretrained(tmp_path / "text")
    assert same(Qwen3_5MoeTextModel.from_pretrained(tmp_path / "text"), text)
    assert "model.embed_tokens.weight" in read_headers(tmp_path / "text").tensors
    dense = peer.ours(odd_shape(4, dense=True))
    peer.draw(dense, 0)
    dense.save_pretrained(tmp_path / "dense", layout="per_expert")  # a dense model has no experts
    assert same(Qwen3_5ForCausalLM.from_pretrained(tmp_path / "dense"), dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_those_of_the_configuration(layout: str, tmp_path: Path) -> None:
    model = drawn()
    model.save_pretrained(tmp_path, layout=layout, max_shard_size="30KB")
    config = Config.from_pretrained(tmp_path)
    expected = {t.name: t.shape for t in config.tensor_shapes(experts=layout)}
    header = read_headers(tmp_path)
    assert {name: t.shape for name, t in header.tensors.items()} == expected
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == header.nbytes
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert all(file.stat().st_size <= 30_000 + 20_000 for file in header.files)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_start_at_multiples_of_64_bytes(layout: str, tmp_path: Path) -> None:
    """All whose size is a multiple of 64 (nearly all of published sizes); the others are aligned to their element size."""
    model = drawn(hidden_size=64, moe_intermediate_size=32)
    model.save_pretrained(tmp_path, layout=layout, max_shard_size="40KB")
    header = read_headers(tmp_path)
    assert len(header.files) > 2
    odd = 0
    for tensor in header.tensors.values():
        if tensor.nbytes % 64 == 0:
            assert tensor.offset % 64 == 0, tensor
        else:
            odd += 1
            assert tensor.offset % (tensor.nbytes // tensor.numel) == 0, tensor
    assert odd >= 3 and min(t.offset % 64 for t in header.tensors.values()) == 0
    for parameter in loaded(tmp_path).parameters():
        assert parameter.data_ptr() % (64 if parameter.nbytes % 64 == 0 else parameter.element_size()) == 0


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    model = drawn()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        actual = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name].to(expected[name].dtype), expected[name]) for name in actual)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        drawn().save_pretrained(tmp_path / name)
    for file in files(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_views_and_transposed_weights_are_written_by_value(tmp_path: Path) -> None:
    model = drawn()
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.T.contiguous().T
    wide = torch.randn(3, *model.model.norm.weight.shape).bfloat16()
    model.model.norm.weight = nn.Parameter(wide[1])
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert same(loaded(tmp_path), model)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_parameters_kept_in_fp32_are_written_in_their_stored_dtype_if_lossless(stored: torch.dtype, tmp_path: Path) -> None:
    code = {torch.bfloat16: "BF16", torch.float32: "F32"}[stored]
    model = drawn()
    names = [n for n in model.state_dict() if n.endswith(("A_log", "dt_bias", "linear_attn.norm.weight"))]
    assert len(names) == 3
    mixer = model.model.layers[0].linear_attn
    mixer.stored_dtypes.update(A_log=stored, dt_bias=stored)
    mixer.norm.stored_dtypes.update(weight=stored)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(tmp_path)
    assert {read_headers(tmp_path).tensors[name].dtype for name in names} == {code}
    again = loaded(tmp_path)
    assert same(again, model) and again.model.layers[0].linear_attn.stored_dtypes["A_log"] == stored
    with torch.no_grad():  # a digit that bfloat16 cannot represent
        again.model.layers[0].linear_attn.A_log[0] += 1e-6
    again.save_pretrained(tmp_path)
    header = read_headers(tmp_path)
    assert header.tensors[names[0]].dtype == "F32" and header.tensors[names[1]].dtype == code
    assert same(loaded(tmp_path), again)


def test_a_text_model_from_a_multimodal_configuration_is_saved_as_text_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = odd_shape(11).text | {"tie_word_embeddings": True}
    vision = {"out_hidden_size": text["hidden_size"]}
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    model = MODEL(Config.from_dict(nested))
    peer.draw(model, 0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe_text" and "vision_config" not in config
    assert same(loaded(tmp_path), model)
    again = loaded(tmp_path)
    again.loading_report.left_out["mtp.*"] = 785
    with caplog.at_level(logging.INFO):
        again.save_pretrained(tmp_path)
    assert "its checkpoint also had mtp.* (785 tensors)" in caplog.text


def test_a_model_with_a_vision_tower_keeps_the_nested_form(tmp_path: Path) -> None:
    """The part `visual` decides, for any class."""
    text = odd_shape(11).text
    vision = {"out_hidden_size": text["hidden_size"]}
    nested = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision, "tie_word_embeddings": False}

    class Both(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config
            self.model = nn.Module()
            self.model.language_model = Qwen3_5MoeTextModel(config.text_only())
            self.model.visual = nn.Linear(3, 5)
            self.lm_head = nn.Linear(text["hidden_size"], text["vocab_size"], bias=False)

    model = Both(Config.from_dict(nested))
    save_model(model, tmp_path)
    assert read_headers(tmp_path).tensors.keys() == model.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe" and config["vision_config"]["out_hidden_size"] == text["hidden_size"]
    from qwen35moe.checkpoint import load_model

    again = load_model(Both, tmp_path)
    assert same(again, model) and not again.loading_report.left_out


def test_sizes_and_shards() -> None:
    assert [write.bytes_of(size) for size in (7, "7", "7B", "5GB", "500 MiB", "1.5kb", "2TB")] == [
        7, 7, 7, 5 * 10**9, 500 * 2**20, 1500, 2 * 10**12]  # fmt: skip
    for wrong in ("", "GB", "-5GB", "5XB", 0, "0.1", "nan", None):
        with pytest.raises(ValueError, match="max_shard_size"):
            write.bytes_of(wrong)  # type: ignore[arg-type]
    entries = [write.Entry.of(str(n), torch.zeros(n), torch.float32) for n in (3, 3, 9, 1, 1, 1, 1)]
    assert [[e.name for e in shard] for shard in split(entries, 24)] == [["3", "3"], ["9"], ["1", "1", "1", "1"]]


def test_an_invalid_save_is_refused_before_a_file_is_changed(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(ValueError, match="layout='flat' must be one of"):
        drawn().save_pretrained(target, layout="flat")
    with torch.device("meta"):
        empty = MODEL(odd_shape_config())
    with pytest.raises(CheckpointError, match="meta device"):
        empty.save_pretrained(target)
    added = drawn()
    added.adapter = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="adapter.weight is not part of this architecture"):
        added.save_pretrained(target)
    small = drawn()
    small.model.norm.weight = nn.Parameter(small.model.norm.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(CheckpointError, match="float8_e4m3fn; weights are saved as"):
        small.save_pretrained(target)
    assert not target.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        drawn().save_pretrained(tmp_path / "file")


def odd_shape_config() -> Config:
    return Config.from_dict(odd_shape(11).text)


# ---------------------------------------------------------------------------------------------------------- memory


def in_child(function: Callable[[], object]) -> int:
    """The exit code of a forked process that runs `function`: 0 when it returns anything but False."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool do not exist in the child
            os._exit(1 if function() is False else 0)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_makes_no_second_copy_of_the_weights(layout: str, tmp_path: Path) -> None:
    """A child process saves 60 MiB of experts within 8 MiB of extra memory, after it has saved a small model."""
    sizes = dict(hidden_size=1024, moe_intermediate_size=1024, num_experts=10, num_experts_per_tok=2)
    text = odd_shape(11).text | sizes | dict(num_hidden_layers=1, layer_types=[FULL])
    model: Any = MODEL(Config.from_dict(text)).to(torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.nbytes + experts.down_proj.nbytes == 60 * 2**20
    small = drawn()

    def save(one: Any, name: str) -> None:
        one.save_pretrained(tmp_path / name, layout=layout)

    assert memory_taken(lambda: save(model, "large"), lambda: save(small, "small")) < 8 * 2**20
    assert same(loaded(tmp_path / "large"), model)


def test_the_helper_same_detects_differences(tmp_path: Path) -> None:
    """`same` detects a changed value, dtype or name."""
    model = drawn()
    other: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    twin = drawn()
    assert same(model, twin)
    twin.model.norm.weight.data[0] += 1
    assert not same(model, twin) and torch.equal(other["model.norm.weight"], model.model.norm.weight)
    assert not same(model, drawn(dtype=torch.float32))
