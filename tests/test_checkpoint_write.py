"""Saving: published names, aligned tensors, lossless islands, and a folder that is never half old and half new."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwen35moe.checkpoint import CheckpointError, folder, read_headers, write
from qwen35moe.checkpoint.write import save_model, split
from qwen35moe.config import Config
from qwen35moe.model import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel
from tests import peer
from tests.memory import memory_taken
from tests.peer import FULL, LINEAR, odd_shape

MODEL = Qwen3_5MoeForCausalLM
LAYOUTS = ("grouped", "per_expert")


def drawn(seed: int = 1, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    changes = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "num_experts": 5, "num_experts_per_tok": 2,
               "tie_word_embeddings": False} | changes  # fmt: skip
    model = peer.ours(odd_shape(11, **changes))
    peer.draw(model, seed)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fsync only notes its file: what a killed process wrote survives it anyway, and no power cut is tried."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
                        if sys.platform == "linux" else None)  # fmt: skip
    return synced


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


def test_the_tying_that_is_written_is_the_model_s(tmp_path: Path) -> None:
    """Whoever unties a model by hand gets a checkpoint with a head, and a configuration that says so."""
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
    dense.save_pretrained(tmp_path / "dense", layout="per_expert")  # there are none: nothing to take apart
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
    """All whose size is a multiple of 64, as nearly every one of a published size is; the rest at its element size."""
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
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].to(expected[name].dtype), expected[name]) for name in found)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        drawn().save_pretrained(tmp_path / name)
    for file in files(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_views_and_transposed_weights_are_written_as_they_look(tmp_path: Path) -> None:
    model = drawn()
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.T.contiguous().T
    wide = torch.randn(3, *model.model.norm.weight.shape).bfloat16()
    model.model.norm.weight = nn.Parameter(wide[1])
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path)
    assert same(loaded(tmp_path), model)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_islands_are_written_as_they_were_stored_where_that_loses_nothing(stored: torch.dtype, tmp_path: Path) -> None:
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
    with torch.no_grad():  # one digit that bfloat16 has not
        again.model.layers[0].linear_attn.A_log[0] += 1e-6
    again.save_pretrained(tmp_path)
    header = read_headers(tmp_path)
    assert header.tensors[names[0]].dtype == "F32" and header.tensors[names[1]].dtype == code
    assert same(loaded(tmp_path), again)


def test_a_text_model_from_a_multimodal_configuration_is_saved_as_what_it_is(
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
    """What decides is the part `visual`, whatever the class."""
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


def test_what_cannot_be_saved_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(ValueError, match="layout='flat'"):
        drawn().save_pretrained(target, layout="flat")
    with torch.device("meta"):
        empty = MODEL(odd_shape_config())
    with pytest.raises(CheckpointError, match="meta device"):
        empty.save_pretrained(target)
    added = drawn()
    added.adapter = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="adapter.weight is no part of this architecture"):
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


# ------------------------------------------------------------------------------------------- replacing a checkpoint

FORMS = {"one file": "5GB", "three shards": "27KB", "many shards": "8KB"}


def shards(path: Path) -> int:
    return len(read_headers(path).files)


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_a_new_checkpoint_takes_the_place_of_the_old(old: str, new: str, tmp_path: Path) -> None:
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[old])
    others = {"tokenizer.json": "{}", "README.md": "mine", "adapter_model.safetensors": "x", "notes/a.txt": "b"}
    (tmp_path / "notes").mkdir()
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    for model in (second, first, second):  # over its own and over other names
        model.save_pretrained(tmp_path, max_shard_size=FORMS[new])
        assert same(loaded(tmp_path), model)
    assert {name: (tmp_path / name).read_text() for name in others} == others
    weights = [name for name in files(tmp_path) if name.startswith("model")]
    index = [] if new == "one file" else ["model.safetensors.index.json"]
    assert sorted(weights) == sorted([file.name for file in read_headers(tmp_path).files] + index)
    assert set(files(tmp_path)) == {*weights, "config.json", *(name.partition("/")[0] for name in others)}


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    drawn(1).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for size in ("5GB", "27KB", "5GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert same(loaded(tmp_path), model)


def test_links_of_a_hub_cache_are_replaced_and_not_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    first, second = drawn(1), drawn(2)
    first.save_pretrained(snapshot)
    for name in files(snapshot):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    before = {name: (blobs / name).read_bytes() for name in files(blobs)}
    assert same(loaded(snapshot), first)
    second.save_pretrained(snapshot)
    assert same(loaded(snapshot), second)
    assert {name: (blobs / name).read_bytes() for name in files(blobs)} == before


def test_generation_settings_are_written_or_left(tmp_path: Path) -> None:
    model = drawn()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    model.save_pretrained(tmp_path)
    assert loaded(tmp_path).generation_config == {"temperature": 0.5}
    model.generation_config = {"eos_token_id": [1, 2]}
    model.save_pretrained(tmp_path)
    assert loaded(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def test_two_saves_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    drawn(1).save_pretrained(tmp_path)
    with folder.replacing(tmp_path, b"{}", 0), pytest.raises(CheckpointError, match="another save"):
        drawn(2).save_pretrained(tmp_path)
    assert same(loaded(tmp_path), drawn(1))
    drawn(2).save_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------- interrupted replacements


def in_child(function: Callable[[], object]) -> int:
    """The exit code of a forked process that runs `function`: 0 when it returns anything but False."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool are not there
            os._exit(1 if function() is False else 0)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


STEPS = ("replace", "rename", "unlink", "fsync", "rmdir")


class Killer:
    """Counts the calls that change a folder and ends the process, without any cleaning up, before call number `at`."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0
        self.originals = {name: getattr(os, name) for name in STEPS}

    def __enter__(self) -> Killer:
        for name in STEPS:
            setattr(os, name, self._counted(self.originals[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return original(*args, **kwargs)

        return call


def save_and_die(model: Any, path: Path, size: str, at: int) -> None:
    with Killer(at):
        model.save_pretrained(path, max_shard_size=size)


def outcome_of(path: Path, *models: nn.Module) -> int:
    """Which of the models the folder holds; it must be one of them, whole."""
    found = loaded(path, weights="copy")
    return next(n for n, model in enumerate(models) if same(found, model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("old", ["one file", "three shards"])
@pytest.mark.parametrize("new", ["one file", "three shards"])
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(old: str, new: str, tmp_path: Path) -> None:
    """Killed before each of its steps in turn. The two differ in num_experts: weights and config.json belong together.

    After every kill: the folder loads and is one of the two; the next save over it works and leaves nothing behind.
    """
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path / "old", max_shard_size=FORMS[old])
    outcomes, status, at = [], -1, 0
    while status != 0:
        path = tmp_path / str(at)
        shutil.copytree(tmp_path / "old", path)
        status = in_child(lambda at=at, path=path: save_and_die(second, path, FORMS[new], at))
        assert status in (0, -signal.SIGKILL)
        outcomes.append(outcome_of(path, first, second))
        if at % 3 == 0:
            second.save_pretrained(path, max_shard_size=FORMS[old])
            assert outcome_of(path, first, second) == 1
            index = [] if old == "one file" else ["model.safetensors.index.json"]
            assert files(path) == sorted(["config.json", *index, *(f.name for f in read_headers(path).files)])
        at += 1
    assert outcomes == sorted(outcomes), "the old checkpoint came back after the new one had been there"
    assert outcomes.count(0) >= 5 and outcomes.count(1) >= 5 and len(outcomes) >= 11, outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_save_into_a_new_folder_leaves_nothing_that_loads_wrongly(tmp_path: Path) -> None:
    model = drawn(2)
    for at in range(0, 20, 2):
        path = tmp_path / str(at)
        assert in_child(lambda at=at, path=path: save_and_die(model, path, "27KB", at)) in (0, -signal.SIGKILL)
        try:
            assert outcome_of(path, model) == 0
        except CheckpointError as error:
            assert "neither" in str(error) or "no folder" in str(error)
        model.save_pretrained(path)
        assert files(path) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")
@pytest.mark.parametrize("form", ["one file", "three shards"])
def test_everything_is_on_the_disk_before_it_counts(
    form: str, tmp_path: Path, quick_disk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the call that makes the new checkpoint count is made, all of its files and their names have been flushed."""
    first, second = drawn(1), drawn(2)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[form])
    quick_disk.clear()
    flushed: list[list[str]] = []
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        flushed.append([Path(name).name for name in quick_disk])
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    second.save_pretrained(tmp_path, max_shard_size=FORMS[form])
    commit, rename_config = flushed[0], flushed[1]
    files = ["model.safetensors"] if form == "one file" else [f.name for f in read_headers(tmp_path).files]
    index = [] if form == "one file" else ["model.safetensors.index.json"]
    expected = [*files, *index, f"config.json.{read_headers(tmp_path).save_id}"]
    assert sorted(commit[:-1]) == sorted(expected) and commit[-1] == tmp_path.name
    assert rename_config[-1] == tmp_path.name and len(rename_config) > len(commit)


def test_another_config_json_counts_only_while_a_save_is_unfinished(tmp_path: Path) -> None:
    model = drawn(1)
    model.save_pretrained(tmp_path)
    header = read_headers(tmp_path)
    assert folder.config_file(header) == tmp_path / "config.json"
    waiting = tmp_path / f"config.json.{header.save_id}"
    waiting.write_text((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text("{}")
    assert folder.config_file(header) == waiting and same(loaded(tmp_path), model)
    waiting.unlink()
    (tmp_path / "config.json.0123456789abcdef").write_text("{}")  # of other weights
    assert folder.config_file(header) == tmp_path / "config.json"


def test_a_config_json_changed_by_hand_is_not_undone_by_an_unfinished_save(tmp_path: Path) -> None:
    """The old weights never name the configuration that a new save puts beside them, equal as the two may be."""
    model = drawn(1)
    model.save_pretrained(tmp_path)
    edited = json.loads((tmp_path / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    old = read_headers(tmp_path).save_id
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.os, "replace", interrupt)
        patch.setattr(folder.Replacement, "abandon", lambda self: None)
        model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("config.json.*"))) == 1 and read_headers(tmp_path).save_id == old
    assert loaded(tmp_path).config.text_config.rms_norm_eps == 1e-3


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", FORMS)
@pytest.mark.parametrize("call", ["write", "replace", "rename", "fsync"])
def test_an_error_while_saving_leaves_the_old_checkpoint_and_no_rest(
    call: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = drawn(1), drawn(2, num_experts=3)
    first.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "the disk failed")

    if call == "rename" and size == "one file":
        call = "replace"  # one file is not moved before it is the checkpoint
    monkeypatch.setattr(*((folder.Replacement, "write") if call == "write" else (folder.os, call)), fail)
    with pytest.raises(OSError, match="the disk failed"):
        second.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    monkeypatch.undo()
    assert same(loaded(tmp_path), first)
    if call != "replace":  # there it is the last step but one that fails, and what was moved stays until the next save
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    second.save_pretrained(tmp_path, max_shard_size=FORMS[size])
    assert same(loaded(tmp_path), second)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(1)
    first.save_pretrained(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="are needed beside the old files, 10 are free") as error:
        drawn(2).save_pretrained(tmp_path)
    assert error.value.errno == errno.ENOSPC and files(tmp_path) == before
    assert same(loaded(tmp_path), first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a forked process")
def test_a_disk_that_fills_up_while_saving(tmp_path: Path) -> None:
    """The operating system refuses to let a file grow beyond 10 KB: a real short write, then a real error."""
    first, second = drawn(1), drawn(2)
    first.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def save() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            second.save_pretrained(tmp_path)
        except OSError as error:
            return error.errno == errno.EFBIG
        return False

    assert in_child(save) == 0
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(1)
    first.save_pretrained(tmp_path)

    def read_only(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(folder.tempfile, "mkdtemp", read_only)
    with pytest.raises(PermissionError, match="read-only"):
        drawn(2).save_pretrained(tmp_path)
    assert same(loaded(tmp_path), first)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_takes_no_second_copy_of_the_weights(layout: str, tmp_path: Path) -> None:
    """A child process saves 60 MiB of experts within 8 MiB of further memory, having saved a small model before."""
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


def test_checks_of_this_file_can_fail(tmp_path: Path) -> None:
    """`same` sees a changed value, a dtype and a name."""
    model = drawn()
    other: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    twin = drawn()
    assert same(model, twin)
    twin.model.norm.weight.data[0] += 1
    assert not same(model, twin) and torch.equal(other["model.norm.weight"], model.model.norm.weight)
    assert not same(model, drawn(dtype=torch.float32))
