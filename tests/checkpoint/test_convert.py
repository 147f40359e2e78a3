"""`qwen35moe convert`: every layout to every other, bit for bit, in bounded memory, without dropping a tensor."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35moe.checkpoint import CheckpointError, names, read_headers
from qwen35moe.checkpoint import convert as module
from qwen35moe.checkpoint.convert import convert
from qwen35moe.checkpoint.published import QWEN35, Layout
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from qwen35moe.cli import main
from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.checkpoint.test_published import dequantised_from_bytes, raw
from tests.support.memory import memory_taken
from tests.support.peer import generator

EXPERTS = ("grouped", "per_expert")
FP32_PARAMETERS = ("A_log", "dt_bias", "linear_attn.norm.weight")
CONFIG = tiny_config(mtp=True, vision=True, changes={"hidden_size": 144, "vocab_size": 2070})
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint in each layout: "grouped/per_expert" (decoder / MTP) and so on, and "fp8"."""
    root = tmp_path_factory.mktemp("layouts")

    def folder(name: str) -> Path:
        path = root / name.replace("/", "-")
        if not path.exists():
            parts = name.split("/")
            layout = QWEN35.quantised() if name == "fp8" else Layout(experts=parts[0], mtp_experts=parts[1])
            write_tiny(path, CONFIG, layout, max_shard_size="700KB")
        return path

    return folder


def stored(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and raw(first[n]) == raw(second[n]) for n in first
    )


def equal_files(first: Path, second: Path) -> bool:
    names = sorted(os.listdir(first))
    return names == sorted(os.listdir(second)) and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("new", [f"{a}/{b}" for a in EXPERTS for b in EXPERTS])
@pytest.mark.parametrize("old", [f"{a}/{b}" for a in EXPERTS for b in EXPERTS])
def test_every_layout_converts_to_every_other(old: str, new: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The result equals, byte for byte, a checkpoint that was written in that layout: vision, MTP, config, tokenizer."""
    layout, mtp_layout = new.split("/")
    convert(folders(old), tmp_path / "new", layout=layout, mtp_layout=mtp_layout, max_shard_size="700KB")
    assert equal_files(tmp_path / "new", folders(new))


def test_without_options_a_checkpoint_is_copied(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("grouped/per_expert", "per_expert/grouped", "fp8"):
        convert(folders(name), tmp_path / name, max_shard_size="700KB")
        assert equal_files(tmp_path / name, folders(name))
    convert(folders("per_expert/per_expert"), tmp_path / "both", layout="grouped", max_shard_size="700KB")
    assert equal_files(tmp_path / "both", folders("grouped/grouped"))  # the MTP head follows


@pytest.mark.parametrize("chunk", [module.CHUNK, 4096])
@pytest.mark.parametrize("layout", EXPERTS)
def test_fp8_is_dequantised(
    layout: str, chunk: int, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the bytes of the file, decoded number by number; in one chunk and in many."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    convert(folders("fp8"), tmp_path / "new", layout=layout, dtype="bfloat16")
    old, new = stored(folders("fp8")), stored(tmp_path / "new")
    config = Config.from_pretrained(tmp_path / "new")
    assert config.quantization_config is None and "quantization_config" not in (tmp_path / "new" / "config.json").read_text()
    shapes = {t.name: t.shape for t in config.tensor_shapes(mtp=True, experts=layout, mtp_experts=layout)}
    assert {name: tuple(value.shape) for name, value in new.items()} == shapes
    checked = 0
    for name, value in old.items():
        if value.dtype is not torch.float8_e4m3fn:
            assert name.endswith("_scale_inv") or torch.equal(value, new[name])
            continue
        single = names.expert_of(names.canonical(name) or "")
        if single is None or layout == "per_expert":
            actual = new[name]
        else:
            whole = name.partition(".experts.")[0] + ".experts."
            if single[2] == "down_proj":
                actual = new[whole + "down_proj"][single[1]]
            else:
                actual = new[whole + "gate_up_proj"][single[1]].chunk(2)[single[2] == "up_proj"]
        if single is None or single[1] == 3:  # the independent form is slow
            expected = dequantised_from_bytes(raw(value), raw(old[name + "_scale_inv"]), (value.shape[0], value.shape[1]))
            assert torch.equal(actual, expected.float().bfloat16()), name
            checked += 1
    assert checked == 3 * 3 + 4 + 4 * 3 + 4 * 3 + 4 + 3 + 3  # GDN, attention, expert 3, shared expert; the MTP head


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.float64])
def test_dtypes(dtype: Any, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """All tensors are converted; parameters kept in fp32 are never narrowed."""
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    convert(folders("grouped/per_expert"), tmp_path / "new", dtype=dtype)
    old, new = stored(folders("grouped/per_expert")), stored(tmp_path / "new")
    assert old.keys() == new.keys()
    for name, value in new.items():
        fp32 = name.endswith(FP32_PARAMETERS)
        assert value.dtype == (old[name].dtype if fp32 and wanted.itemsize == 2 else wanted), name
        assert torch.equal(value, old[name].to(value.dtype)), name
    assert Config.from_pretrained(tmp_path / "new").dtype == str(wanted).removeprefix("torch.")
    convert(tmp_path / "new", tmp_path / "back", dtype="bfloat16")
    for name, value in stored(tmp_path / "back").items():
        if not name.endswith(FP32_PARAMETERS):
            assert torch.equal(value, new[name].to(torch.bfloat16))
        else:
            assert value.dtype == (torch.float32 if wanted.itemsize > 2 else new[name].dtype)


def test_a_subset_of_layers(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers 3, 0, 2 in this order: the same numbers with new names, and a model that runs."""
    kept = [3, 0, 2]
    for name in ("grouped/per_expert", "fp8"):
        convert(folders(name), tmp_path / "new", layers=kept, max_shard_size="300KB")
        old, new = stored(folders(name)), stored(tmp_path / "new")
        for key, value in new.items():
            head, layers, tail = key.partition("language_model.layers.")
            number, _, rest = tail.partition(".")
            before = f"{head}{layers}{kept[int(number)]}.{rest}" if layers else key
            assert raw(old[before]) == raw(value) and old[before].dtype == value.dtype
        dropped = sum(key.startswith("model.language_model.layers.1.") for key in old)
        assert len(new) == len(old) - dropped
        config = Config.from_pretrained(tmp_path / "new")
        assert config.text_config.layer_types == ("full_attention", "linear_attention", "linear_attention")
        listed = (config.quantization_config or {}).get("modules_to_not_convert", [])
        expected = {key.removesuffix(".weight") for key, value in new.items()
                    if value.dim() > 1 and value.dtype is torch.bfloat16 and not key.endswith("scale_inv")}  # fmt: skip
        assert name != "fp8" or set(listed) == expected
    convert(folders("grouped/per_expert"), tmp_path / "new", layers=kept)
    whole = Qwen3_5MoeForCausalLM.from_pretrained(folders("grouped/per_expert"), dtype=torch.float32)
    part = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    layers = list(whole.model.layers)
    assert all(
        torch.equal(value, layers[kept[n]].state_dict()[key])
        for n, layer in enumerate(part.model.layers)
        for key, value in layer.state_dict().items()
    )
    assert part(torch.randint(0, 2000, (1, 9), generator=generator(0))).logits.isfinite().all()


def test_transformers_reads_what_was_converted(folders: Callable[[str], Path], tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    convert(folders("fp8"), tmp_path / "new", layout="grouped", dtype="bfloat16", layers=[1, 3])
    theirs = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    expected = {name: value for name, value in stored(tmp_path / "new").items() if not name.startswith("mtp.")}
    actual = theirs.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value.bfloat16()) for name, value in expected.items())


# --------------------------------------------------------------------------------------------- side files, forms, memory


def test_side_files_are_copied_but_weights_and_links_are_not(folders: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders("grouped/grouped"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("free")
    for name in (".gitattributes", "pytorch_model.bin", "old.safetensors", "pytorch_model.bin.index.json"):
        (source / name).write_text("no")
    (source / "assets").mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "leak.txt").symlink_to(tmp_path / "secret")
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("stays")
    convert(source, target, layout="per_expert")
    kept = {"chat_template.jinja", "LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(os.listdir(target)) == kept | {"mine.txt", "config.json", "model.safetensors"}
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)


def test_a_folder_is_converted_in_place(folders: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folders("grouped/grouped"), tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "one", layout="per_expert", max_shard_size="700KB")
    assert same(stored(tmp_path / "one"), stored(folders("per_expert/per_expert")))
    assert (tmp_path / "one" / "tokenizer.json").exists()


def test_a_stored_copy_of_a_tied_head_stays(tmp_path: Path) -> None:
    config = tiny_config(changes={"tie_word_embeddings": True})
    write_tiny(tmp_path / "old", config)
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "old", tmp_path / "new")
    assert same(stored(tmp_path / "new"), tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the page counts of /proc")
@pytest.mark.parametrize("layout", EXPERTS)
def test_memory_does_not_grow_with_the_checkpoint(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts 38 MiB of experts within 8 MiB of extra memory, in a process that has converted a small model before."""

    def written(name: str, **changes: Any) -> Config:
        config = tiny_config(layers=1, changes=changes)
        drawn = {t.name: torch.zeros(t.shape, dtype=torch.bfloat16) for t in config.tensor_shapes(experts=layout)}
        (tmp_path / name).mkdir()
        save_file(drawn, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
        return config

    written("small")
    config = written("large", hidden_size=1024, moe_intermediate_size=800)
    experts = [t.shape for t in config.tensor_shapes(experts=layout) if ".experts." in t.name]
    assert sum(2 * math.prod(shape) for shape in experts) > 37 * 2**20
    other = EXPERTS[layout == "grouped"]
    monkeypatch.setattr(module, "CHUNK", 2**20)

    def run(name: str) -> None:
        convert(tmp_path / name, tmp_path / f"new {name}", layout=other)

    assert memory_taken(lambda: run("large"), lambda: run("small")) < 8 * 2**20
    assert len(read_headers(tmp_path / "new large").tensors) == len(list(config.tensor_shapes(experts=other)))


# --------------------------------------------------------------------------------------------------------------- errors


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    shutil.copytree(source, target)
    tensors = stored(source)
    edit(tensors)
    for file in target.glob("model*"):
        file.unlink()
    save_file(tensors, target / "model.safetensors")
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target


LAYER = "model.language_model.layers.0."
EDITS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": ("grouped/grouped", lambda t: t.pop(LAYER + "linear_attn.A_log"), "missing: layers.0.linear_attn.A_log"),
    "missing expert": ("per_expert/grouped", lambda t: t.pop(LAYER + "mlp.experts.2.up_proj.weight"),
                       "missing: layers.0.mlp.experts.2.up_proj.weight"),
    "unexpected": ("grouped/grouped", lambda t: t.update({LAYER + "mlp.extra.weight": torch.zeros(3)}),
                   "unexpected: model.language_model.layers.0.mlp.extra.weight"),
    "unknown": ("grouped/grouped", lambda t: t.update({"audio.x": torch.zeros(3)}), "unexpected: audio.x: not a tensor name"),
    "ninth expert": ("per_expert/grouped", lambda t: t.update({LAYER + "mlp.experts.8.up_proj.weight": torch.zeros(3)}),
                     "unexpected: model.language_model.layers.0.mlp.experts.8.up_proj.weight"),
    "shape": ("grouped/grouped", lambda t: t.update({LAYER + "linear_attn.A_log": torch.zeros(3)}), "on disk [3]"),
    "integers": ("grouped/grouped", lambda t: t.update({LAYER + "linear_attn.A_log": torch.zeros(4, dtype=torch.int32)}),
                 "I32; supported are"),
    "twice": ("grouped/grouped", lambda t: t.update({"lm_head.x": torch.zeros(2), "model.lm_head.x": torch.zeros(2)}),
              "stored twice"),
    "no scale": ("fp8", lambda t: t.pop(LAYER + "mlp.experts.0.up_proj.weight_scale_inv"), "scale missing"),
    "scales of another shape": ("fp8", lambda t: t.update({LAYER + "linear_attn.in_proj_z.weight_scale_inv": torch.ones(7, 1)}),
                                "F32 [7, 1] for a weight [112, 144] in blocks of 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_errors_name_the_tensor(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    source, edit, message = EDITS[name]
    old = edited(folders(source), tmp_path / "old", edit)
    for options in ({}, {"dtype": "bfloat16"}, {"layout": "per_expert"}):
        with pytest.raises(CheckpointError) as error:
            convert(old, tmp_path / "new", **options)
        assert message in str(error.value) and not (tmp_path / "new").exists()


def test_invalid_arguments_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    fp8, plain, new = folders("fp8"), folders("grouped/grouped"), tmp_path / "new"
    with pytest.raises(CheckpointError, match="cannot be grouped: .*use --layout per_expert, or a dtype"):
        convert(fp8, new, layout="grouped")
    for wrong, message in (
        ({"layers": [4]}, "layers=.4. must be one or more different numbers out of 0 ... 3"),
        ({"layers": []}, "one or more"),
        ({"layers": [1, 1]}, "different numbers"),
        ({"layout": "flat"}, "layout='flat'"),
        ({"mtp_layout": "flat"}, "mtp_layout='flat'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"max_shard_size": "0"}, "max_shard_size"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(plain, new, **wrong)
    other = edited(plain, tmp_path / "other", lambda t: None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quantised by 'gptq'; supported are block-FP8"):
        convert(other, new)
    assert not new.exists()


def test_a_file_that_shrinks_while_it_is_read_leaves_the_old_checkpoint(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders("grouped/grouped"), tmp_path / "old")
    shutil.copytree(folders("fp8"), tmp_path / "new")
    original, count = module.stored_numbers, 0

    def shrinking(tensor: Any, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == 30:
            os.truncate(tensor.file, tensor.offset)
        return original(tensor, *rest)

    monkeypatch.setattr(module, "stored_numbers", shrinking)
    with pytest.raises(OSError, match="bytes early: it was changed while it was read"):
        convert(tmp_path / "old", tmp_path / "new")
    assert equal_files(tmp_path / "new", folders("fp8"))


# --------------------------------------------------------------------------------------------------------------- command


def test_the_command(folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folders("fp8"))
    options = ["--layout", "grouped", "--mtp-layout", "per_expert", "--dtype", "bfloat16", "--layers", "0-1,3"]
    assert main(["convert", source, str(tmp_path / "new"), *options, "--max-shard-size", "500KB"]) == 0
    out = capsys.readouterr()
    header = read_headers(tmp_path / "new")
    assert f"{len(header.tensors)} tensors in {len(header.files)} file(s)" in out.out and len(header.files) > 2
    assert out.err == ""  # no progress bar without a terminal
    assert Config.from_pretrained(tmp_path / "new").text_config.num_hidden_layers == 3
    assert main(["convert", source, str(tmp_path / "new"), "--layout", "grouped"]) == 2
    assert "cannot be grouped" in capsys.readouterr().err
    for wrong in ("3-", "a", "-1", "1,,2", "1-b"):
        with pytest.raises(SystemExit):
            main(["convert", source, str(tmp_path / "new"), f"--layers={wrong}"])
        assert "is not a layer or a range" in capsys.readouterr().err


def test_the_progress_bar_counts_every_byte_on_a_terminal(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["convert", str(folders("grouped/grouped")), str(tmp_path / "new")]) == 0
    assert "converting" in terminal.getvalue() and "100%" in terminal.getvalue() and "B/s" in terminal.getvalue()
    total, seen = [], []
    convert(folders("grouped/grouped"), tmp_path / "new", progress=lambda n: (total.append(n), seen.append)[1])
    assert sum(seen) == total[0] == read_headers(tmp_path / "new").nbytes
