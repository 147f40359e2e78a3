"""What can be asked of a checkpoint: names to ignore, a check of every number; and what is said unasked: names with a prefix,
missing shards, weights of another meaning."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwen35moe
from qwen35moe.checkpoint import CheckpointError, load_model, read_headers
from qwen35moe.checkpoint.convert import convert
from qwen35moe.checkpoint.published import QWEN35
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from qwen35moe.cli import main
from qwen35moe.cli.summary import summarize
from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.checkpoint.test_write import drawn, same

MODEL = Qwen3_5MoeForCausalLM
Tensors = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers, in which no parameter has its identity value."""
    path = tmp_path_factory.mktemp("requests") / "good"
    write_tiny(path, tiny_config(experts=3))
    return path


@pytest.fixture
def edited(folder: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Any]], Path]:
    """Makes a copy of that checkpoint with other tensors."""

    def make(change: Callable[[Tensors], Any]) -> Path:
        tensors = load_file(folder / "model.safetensors")
        tensors = change(tensors) or tensors
        target = tmp_path / "edited"
        target.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
        (target / "config.json").write_text((folder / "config.json").read_text())
        return target

    return make


# ------------------------------------------------------------------------------------------------------------ ignore=


HEADS = {"score.weight": torch.ones(2, 64), "v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1),
         "model.layers.0.extra.weight": torch.ones(3), "model.layers.2.extra.weight": torch.ones(3)}  # fmt: skip


def test_tensors_are_left_out_on_request(folder: Path, edited: Any, tmp_path: Path, capsys: Any) -> None:
    path = edited(lambda tensors: tensors | HEADS)
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(path)
    for hint in ('ignore=["score.*"] leaves it out', 'ignore=["v_head.*"]', 'ignore=["model.layers.*.extra.weight"]'):
        assert hint in str(caught.value)
    patterns = ["score.*", "v_head.*", "model.layers.*.extra.weight"]
    model = load_model(MODEL, path, ignore=patterns)
    assert same(model, MODEL.from_pretrained(folder))
    assert model.loading_report.left_out == {"score.*": 1, "v_head.*": 2, "model.layers.*.extra.weight": 2}
    with pytest.raises(CheckpointError, match="unexpected: v_head.summary.weight"):
        load_model(MODEL, path, ignore="score.*")
    for wrong in (3, [3], [""], [None]):
        with pytest.raises(ValueError, match="must be patterns of tensor names"):
            load_model(MODEL, path, ignore=wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="unexpected: score.weight"):
        convert(path, tmp_path / "new")
    assert convert(path, tmp_path / "new", ignore=patterns) is not None
    assert read_headers(tmp_path / "new").tensors.keys() == read_headers(folder).tensors.keys()
    options = [text for pattern in patterns for text in ("--ignore", pattern)]
    assert main(["convert", str(path), str(tmp_path / "command"), *options]) == 0
    assert main(["inspect", str(path), *options]) == 0
    out = capsys.readouterr().out
    assert "2 tensors are ignored: v_head.*" in out and "tensors belong to no part" not in out
    assert main(["inspect", str(path)]) == 0 and "5 tensors belong to no part" in capsys.readouterr().out


def test_a_tensor_that_the_model_needs_is_missing_if_it_is_ignored(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: norm.weight: \[64\]; ignore= leaves it out"):
        load_model(MODEL, folder, ignore="model.norm.*")


def test_a_shard_of_ignored_tensors_may_be_missing(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {"score.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = load_model(MODEL, tmp_path, ignore=["score.*"])
    assert same(model, MODEL.from_pretrained(folder)) and model.loading_report.left_out == {"score.*": 1}
    with pytest.raises(CheckpointError, match="missing file: model-00002-of-00002.*needed for 1 tensors: score.weight"):
        MODEL.from_pretrained(tmp_path)


def test_an_ignored_copy_of_a_tied_head_is_not_compared(tmp_path: Path) -> None:
    write_tiny(tmp_path, tiny_config(layers=1, experts=2, changes={"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied but different"):
        MODEL.from_pretrained(tmp_path)
    model = load_model(MODEL, tmp_path, ignore=["lm_head.*"])
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------- names, missing files


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.", "model.", "inside"])
def test_prefixes_of_wrappers_are_removed_and_noted(prefix: str, folder: Path, edited: Any) -> None:
    def rename(name: str) -> str:
        if prefix == "inside":
            return name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod.")
        return prefix + name

    path = edited(lambda tensors: {rename(name): value for name, value in tensors.items()})
    model = MODEL.from_pretrained(path)
    assert same(model, MODEL.from_pretrained(folder))
    noted = "which a wrapper of the saved model has added" in str(model.loading_report)
    assert noted == (prefix != "model.")


@pytest.mark.parametrize("prefix", ["base_model.model.", "student.", "policy.actor.", "_forward_module."])
def test_other_prefixes_are_named(prefix: str, edited: Any) -> None:
    path = edited(lambda tensors: {prefix + name: value for name, value in tensors.items()})
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(path)
    text = str(caught.value)
    named = next(problem for problem in caught.value.problems if problem.kind == "prefix")
    assert prefix.startswith(named.subject) and "72 tensor names begin with it" in named.detail and named.subject in text
    assert text.count("missing:") >= 5 and text.count("unexpected:") >= 5 and len(text) < 2000


def test_layers_that_the_model_lacks_are_no_prefix(folder: Path) -> None:
    """Their names are whole: without "model." they would not be better."""
    layers = MODEL.from_pretrained(folder).config.num_hidden_layers
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(folder, num_hidden_layers=layers - 1)
    assert {problem.kind for problem in caught.value.problems} == {"unexpected"}


def test_a_name_with_and_without_a_wrapper_is_stored_twice(edited: Any) -> None:
    path = edited(lambda tensors: tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"].clone()})
    with pytest.raises(CheckpointError, match="stored twice"):
        MODEL.from_pretrained(path)


def test_every_kind_of_problem_has_rows(edited: Any) -> None:
    """Thirty of one kind do not hide one of another."""

    def change(tensors: Tensors) -> Tensors:
        kept = {name: value for name, value in tensors.items() if ".0." not in name and ".1." not in name}
        more = {f"strange{chr(97 + number)}.x": torch.ones(2) for number in range(26)}
        return kept | more | {"model.norm.weight": torch.ones(7)}

    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(edited(change))
    text = str(caught.value)
    assert {problem.kind for problem in caught.value.problems} == {"missing", "wrong shape", "unexpected"}
    assert "wrong shape: model.norm.weight" in text and "missing:" in text and "unexpected: strangea.x" in text
    assert "more rows" in text and len(text) < 2000


@pytest.mark.parametrize(("name", "change", "hint"), [
    ("linear_attn.conv1d.weight", lambda w: w.squeeze(1), "the axis of 1 is missing"),
    ("linear_attn.conv1d.weight", lambda w: w.mT, "the last two axes are swapped"),
    ("linear_attn.in_proj_b.weight", lambda w: w.T, "the axes are swapped"),
    ("mlp.experts.down_proj", lambda w: w.mT, "the last two axes are swapped"),
    ("mlp.experts.down_proj", lambda w: w.permute(1, 0, 2), "the axes are in another order"),
])  # fmt: skip
def test_numbers_in_another_layout_are_recognised(name: str, change: Any, hint: str, edited: Any) -> None:
    full = f"model.layers.0.{name}"
    with pytest.raises(CheckpointError, match=f"wrong shape: {full}.*{hint}"):
        MODEL.from_pretrained(edited(lambda tensors: tensors | {full: change(tensors[full])}))


def test_qwen3_nexts_fused_projections_are_named(edited: Any) -> None:
    path = edited(lambda tensors: tensors | {"model.layers.0.linear_attn.in_proj_qkvz.weight": torch.ones(3, 64)})
    with pytest.raises(CheckpointError, match="in_proj_qkvz.weight: the model has no such parameter; .*Qwen3-Next"):
        MODEL.from_pretrained(path)


def test_a_missing_shard_says_which_tensors_it_was_needed_for(tmp_path: Path) -> None:
    drawn(1).save_pretrained(tmp_path, max_shard_size="27KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*"))
    (tmp_path / shards[0]).unlink()
    (tmp_path / shards[1]).write_bytes(b"cut")
    with pytest.raises(CheckpointError) as caught:
        MODEL.from_pretrained(tmp_path)
    missing, damaged = caught.value.problems[:2]
    assert (missing.kind, missing.subject) == ("missing file", shards[0]) and missing.detail.startswith("needed for ")
    assert "model.embed_tokens.weight" in missing.detail and damaged.kind == "bad header"
    assert "the file is cut off, or not safetensors; needed for " in damaged.detail


# ------------------------------------------------------------------------------------------------------------ check=


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_reported_on_request(bad: float, edited: Any, capsys: Any) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 7] = bad
        tensors["model.norm.weight"][3] = tensors["model.norm.weight"][9] = bad

    path = edited(change)
    assert MODEL.from_pretrained(path) is not None  # not checked without the request
    for weights in ("map", "copy"):
        with pytest.raises(CheckpointError) as caught:
            load_model(MODEL, path, check=True, weights=weights)
        details = {problem.subject: problem.detail for problem in caught.value.problems}
        assert details == {"model.layers.1.mlp.experts.down_proj": f"{bad} at [2, 5, 7]",
                         "model.norm.weight": f"{bad} at [3], and 1 more"}  # fmt: skip
    assert main(["inspect", str(path), "--check"]) == 0
    assert f"2 tensors contain NaN or infinity: model.layers.1.mlp.experts.down_proj: {bad} at [2, 5, 7]" in (
        capsys.readouterr().out)  # fmt: skip


def test_good_weights_pass_the_check(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert same(load_model(MODEL, folder, check=True), MODEL.from_pretrained(folder))
    write_tiny(tmp_path, tiny_config(layers=1, experts=2), QWEN35.quantised())
    for path in (folder, tmp_path):
        assert main(["inspect", str(path), "--check"]) == 0
        out = capsys.readouterr().out
        assert "every weight is finite" in out and "warning" not in out
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(torch.uint8)[3, 4] = 0x7F  # NaN in float8_e4m3fn
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"not finite: {name}: nan at .3, 4."):
        load_model(MODEL, tmp_path, check=True)


# -------------------------------------------------------------------------------------------------- weights' meaning


def shifted(tensors: Tensors, by: float, only: Callable[[str], bool]) -> Tensors:
    return {name: value + by if only(name) else value for name, value in tensors.items()}


def mapped(tensors: Tensors, end: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    return {name: change(value) if name.endswith(end) else value for name, value in tensors.items()}


MEANINGS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "norms stored as 1 + w": (
        lambda t: shifted(t, 1, lambda name: name.endswith("norm.weight") and "linear_attn" not in name),
        "the decoder's norm weights are near 1"),
    "layer norms of large w": (lambda t: mapped(t, "layernorm.weight", lambda w: 1 + 0.3 * torch.randn_like(w)),
                               "the decoder's norm weights are near 1"),
    "A_log stored as A": (lambda t: mapped(t, "A_log", lambda a: -a.exp()), "A_log is negative everywhere"),
    "A_log stored as exp(A_log)": (lambda t: mapped(t, "A_log", torch.exp), "exp(A_log) is stored"),
    "dt_bias stored as the step": (lambda t: mapped(t, "dt_bias", lambda b: torch.nn.functional.softplus(b.float())),
                                   "softplus(dt_bias) is stored"),
    "output norm stored as w - 1": (lambda t: mapped(t, "linear_attn.norm.weight", lambda w: w - 1),
                                    "the weights of linear_attn.norm are near 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEANINGS)
def test_weights_of_another_meaning_are_named(
    kind: str, folder: Path, edited: Any, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    change, message = MEANINGS[kind]
    torch.manual_seed(3)
    path = edited(change)
    with caplog.at_level(logging.WARNING):
        report = str(MODEL.from_pretrained(path).loading_report)
    assert message in caplog.text and report.count("warning:") == 1 and message in report
    caplog.clear()
    assert MODEL.from_pretrained(path, device="meta") is not None and caplog.text == ""
    assert main(["inspect", str(path), "--check"]) == 0 and message in capsys.readouterr().out


def test_inverted_scales_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny(tmp_path, tiny_config(layers=1, experts=2), QWEN35.quantised())
    assert MODEL.from_pretrained(tmp_path) is not None and caplog.text == ""
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(mapped(tensors, "_scale_inv", lambda scale: 1 / scale), tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        MODEL.from_pretrained(tmp_path, dtype="float32")
    assert "it looks as if the inverse is stored" in caplog.text


@pytest.mark.parametrize("gates", ["ordinary", "transformers"])
def test_ordinary_weights_raise_no_warning(gates: str, folder: Path, tmp_path: Path, caplog: Any) -> None:
    MODEL(tiny_config(experts=3)).init_weights(gates=gates).save_pretrained(tmp_path)
    for path in (tmp_path, folder):
        assert "warning" not in str(MODEL.from_pretrained(path).loading_report)
    assert "warning" not in str(qwen35moe.load("tiny")[0].loading_report) and "looks as if" not in caplog.text


# ------------------------------------------------------------------------------------------------------ untrusted files


@pytest.mark.parametrize("kind", ["link out of the folder", "pipe", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_every_door_refuses_files_that_are_not_in_the_folder(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """None of them waits for a pipe."""
    path, outside = tmp_path / "edited", tmp_path / "outside"
    shutil.copytree(folder, path)
    (path / name).rename(outside)
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to(outside)
    doors: list[Callable[[], Any]] = [lambda: MODEL.from_pretrained(path), lambda: qwen35moe.load(path)]
    if name != "generation_config.json":
        doors += [lambda: convert(path, tmp_path / "new"), lambda: summarize(str(path))]
    if name == "config.json":
        doors += [lambda: Config.from_pretrained(path)]
    for door in doors:
        with pytest.raises(ValueError, match="outside the folder|not a file|not a regular file"):
            door()
    assert not (tmp_path / "new").exists()


def test_layouts_without_effect_are_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write_tiny(tmp_path / "dense", tiny_config(layers=1, dense=True))
    for source, options, message in (
        (tmp_path / "dense", ["--layout", "per_expert"], "is dense and has no experts"),
        (tmp_path / "dense", ["--mtp-layout", "grouped"], "is dense and has no experts"),
        (folder, ["--mtp-layout", "grouped"], "has no MTP head"),
    ):
        assert main(["convert", str(source), str(tmp_path / "new"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["convert", str(folder), str(tmp_path / "new"), "--layout", "grouped"]) == 0  # the layout that it has


def test_a_folder_is_loaded_by_several_threads(folder: Path) -> None:
    expected = MODEL.from_pretrained(folder)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda how: MODEL.from_pretrained(folder, weights=how), ["map", "copy"] * 4))
    assert all(same(model, expected) for model in models)
