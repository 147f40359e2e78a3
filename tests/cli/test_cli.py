"""`qwen35moe ...` and `load`: output, and errors of one line."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35moe
from qwen35moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeVisionModel, backends, loading
from qwen35moe.cli import demo, inspect, main
from qwen35moe.config import Config, VisionConfig
from qwen35moe.config.parameters import TensorShape
from qwen35moe.generation import stream_text
from tests.support.fakes import tokenizer_definition
from tests.support.headers import write_headers
from tests.support.peer import FULL, LINEAR, odd_shape, ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a model of 4 layers, a tokenizer and a generation_config."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tokenizer_definition()
    words = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    layers = [LINEAR, LINEAR, LINEAR, FULL]
    shape = dict(num_experts=6, num_experts_per_tok=2, tie_word_embeddings=False, layer_types=layers, num_hidden_layers=4)
    model = ours(odd_shape(5, vocab_size=words + 3, **shape))
    model.init_weights(seed=1)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": 0, "top_k": 20}))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command writes to stderr."""
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("qwen35moe: ") and "Traceback" not in err
    return err


# --------------------------------------------------------------------------------------------------------------- load


def test_load_picks_the_class_and_generates(folder: Path) -> None:
    model, tokenizer = qwen35moe.load(folder)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM" and model.dtype is torch.float32 and not model.training
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_ids == tuple(model.generation_config["eos_token_id"])
    ids = model.generate(**tokenizer(["In the", "the beginning of"]), max_new_tokens=4)
    assert ids.shape[0] == 2
    assert "".join(stream_text(model, tokenizer, "In the", max_new_tokens=4)) == tokenizer.decode(
        model.generate(tokenizer.encode("In the"), max_new_tokens=4)[0, len(tokenizer.encode("In the")) :],
        skip_special_tokens=True,
    )
    half, _ = qwen35moe.load(str(folder), dtype="bfloat16")
    assert half.dtype is torch.bfloat16


def test_load_dense(tmp_path: Path) -> None:
    model = ours(odd_shape(2, dense=True, vocab_size=320))
    model.init_weights(seed=1)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    loaded, _ = loading.load(tmp_path)
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM"


def test_load_of_a_multimodal_checkpoint(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A multimodal checkpoint with two tensors of an MTP head: the multimodal class if the vision tower is stored, the text
    model if only config.json describes one. A warning names what is left out."""
    text = Config.from_pretrained(folder).text_config
    vision = VisionConfig(out_hidden_size=text.hidden_size, depth=1, hidden_size=32, num_heads=2, intermediate_size=24)
    config = Config(text_config=text, vision_config=vision, tie_word_embeddings=text.tie_word_embeddings)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    tensors |= {name: torch.zeros(3) for name in ("mtp.fc.weight", "mtp.norm.weight")}
    tower = {f"model.visual.{name}": value for name, value in Qwen3_5MoeVisionModel(vision).state_dict().items()}
    same, _ = loading.load(folder)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(folder / "tokenizer.json", tmp_path)
    for stored, name in ((tensors, "Qwen3_5MoeForCausalLM"), (tensors | tower, "Qwen3_5MoeForConditionalGeneration")):
        save_file(stored, tmp_path / "model.safetensors")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model, tokenizer = loading.load(tmp_path)
        assert type(model).__name__ == name
        assert f"as {name}; left out: mtp.* (2 tensors)" in caplog.text
        ids = tokenizer.encode("In the beginning")
        assert torch.equal(model.generate(ids, eos_token_id=[]), same.generate(ids, eos_token_id=[]))
    alone = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path)  # the text model of the multimodal checkpoint
    assert alone.loading_report.left_out["model.visual.*"] == len(tower)
    assert torch.equal(alone.generate(ids, eos_token_id=[]), same.generate(ids, eos_token_id=[]))


def test_names_that_cannot_be_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no folder nowhere: give a folder with config.json, a Hub name"):
        loading.load("nowhere")
    with pytest.raises(ValueError, match="no configuration at"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file: give the folder"):
        loading.find(tmp_path / "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"no folder Qwen/Some.*pip install 'qwen35moe\[hub\]'"):
        loading.find("Qwen/Some")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint for `load` comes with its tokenizer; tests/checkpoint/test_hub.py has the rest."""
    request: dict[str, Any] = {}
    fetch = mock.Mock(side_effect=lambda name, **options: request.update(options, name=name) or tmp_path)
    monkeypatch.setattr("qwen35moe.checkpoint.hub.fetch", fetch)
    assert loading.find("Qwen/Some", "v1") == tmp_path
    assert request["name"] == "Qwen/Some" and request["revision"] == "v1" and request["required"] == ["tokenizer.json"]


# ----------------------------------------------------------------------------------------------------------- generate


def test_generate_streams_text_and_prints_the_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "6"]) == 0
    out = capsys.readouterr()
    model, tokenizer = qwen35moe.load(folder)
    expected = "".join(stream_text(model, tokenizer, "In the", max_new_tokens=6))
    assert out.out == expected + "\n"
    assert "tokens/s" in out.err and f"{len(tokenizer.encode('In the'))} prompt tokens" in out.err


def test_generate_on_several_devices(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--device takes a list and "auto"; without a GPU both use the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    texts = set()
    for device in ("cpu", "cpu,cpu", "auto"):
        assert main(["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "3", "--device", device]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    assert "nowhere" in fails(capsys, "generate", str(folder), "--prompt", "a", "--device", "cpu,nowhere")


def test_generate_samples_by_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*more: str) -> str:
        command = ["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "12", *more]
        assert main(command) == 0
        return capsys.readouterr().out

    hot = ["--sample", "--temperature", "2.0", "--top-k", "200", "--top-p", "0.99", "--min-p", "0.001"]
    first = text(*hot, "--seed", "1")
    assert first == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text("--stop", text()[:1]) == "\n"


def test_prompt_from_standard_input(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("In the"))
    assert main(["generate", str(folder), "--prompt", "-", "--max-new-tokens", "2"]) == 0
    from_stdin = capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == from_stdin


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--sample", "--temperature", "0"], "temperature must be greater than 0"),
        (["--prompt", "a", "--sample", "--top-p", "1.5"], "top_p must lie in"),
        (["--prompt", "a", "--seed", "7"], "--seed has an effect only when sampling: add --sample"),
        (["--prompt", "a", "--top-k", "7", "--min-p", "0.1"], "--top-k, --min-p has an effect only when sampling"),
        (["--prompt", "a\udcff"], "--prompt is no UTF-8 text: byte 0xff after 1 characters"),
        (["--prompt", "a", "--stop", "\udcc3("], "--stop is no UTF-8 text: byte 0xc3 after 0 characters"),
        (["--prompt", "a", "--max-new-tokens", "-2"], "got -2"),
        (["--prompt", "a", "--dtype", "int3"], "dtype='int3'"),
        (["--prompt", "a", "--device", "cuda:99"], ""),
    ],
)
def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in fails(capsys, "generate", str(folder), *arguments)


def test_errors_of_files_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in fails(capsys, "generate", str(tmp_path / "no"), "--prompt", "a")
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    with weights.open("r+b") as f:
        f.truncate(weights.stat().st_size - 100)
    for command in (["generate", "--prompt", "a"], ["inspect"]):
        assert "model.safetensors" in fails(capsys, *command, str(tmp_path / "cut"))
    with pytest.raises(ValueError):
        main(["inspect", "--debug", str(tmp_path / "cut")])


def test_a_wrong_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate"], ["nothing"], [], ["inspect"], ["generate", "x", "--prompt", "a", "--seed", "b"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--help" in err


def test_an_unexpected_error_names_its_type(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(backends, "describe", side_effect=ZeroDivisionError("of ours")):
        assert "ZeroDivisionError: of ours (--debug shows the traceback)" in fails(capsys, "backends")
        with pytest.raises(ZeroDivisionError):
            main(["backends", "--debug"])
    with mock.patch.object(backends, "describe", side_effect=KeyboardInterrupt):
        assert main(["backends"]) == 130


# ------------------------------------------------------------------------------------------------------------ inspect


def test_inspect_counts_a_published_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """35B-A3B, the headers of 70 GB: the published counts without any data."""
    config = Config.preset("35b-a3b")
    write_headers(tmp_path, config, config.tensor_shapes(mtp=True, mtp_experts="per_expert"))
    assert os.stat(tmp_path / "model.safetensors").st_blocks < 10_000
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for part in summary["parts"]}
    mtp = parts["multi-token prediction"]
    assert summary["parameters"] - mtp["parameters"] == 35_107_181_936 and mtp["parameters"] == 844_640_768
    assert summary["active_text_parameters"] == 3_454_988_928
    assert summary["parameters"] == summary["described_parameters"]
    assert parts["vision tower"]["parameters"] == 446_571_248
    assert parts["routed experts"]["experts"] == "grouped" and mtp["experts"] == "per expert"
    assert parts["routed experts"]["active_parameters"] == parts["routed experts"]["parameters"] * 8 // 256
    assert set(parts["Gated DeltaNet"]["dtypes"]) == {"BF16", "F32"}
    assert summary["layers"] == {"linear_attention": 30, "full_attention": 10} and summary["files"] == 1
    assert main(["inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    for words in ("256 experts, 8 per token", "per expert", "3,454,988,928", "35,951,822,704", "71.9", "F32 19.20 kB"):
        assert words in page
    assert "the number of parameters matches config.json" in page


def test_inspect_reports_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.preset("0.8b")
    missing = "layers.0.input_layernorm.weight"
    kept = [tensor for tensor in config.tensor_shapes(vision=False) if not tensor.name.endswith(missing)]
    scale = TensorShape("model.language_model.layers.0.mlp.up_proj.weight_scale_inv", (28, 8), "F32")
    write_headers(tmp_path, config, [*kept, TensorShape("model.audio.weight", (3, 5), "BF16"), scale])
    summary = inspect.summarize(str(tmp_path))
    assert summary["described_parameters"] - summary["parameters"] == 1024  # the scale is not a parameter
    page = inspect.report(summary)
    assert "1,024 fewer are stored" in page and "1 tensors belong to no part" in page and "model.audio.weight" in page
    assert "experts" not in page.splitlines()[1]


def test_inspect_reads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("torch.nn.Module.__init__", side_effect=AssertionError):
        assert main(["inspect", str(folder)]) == 0
    assert "routed experts" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- backends and demo


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert all(operation in out for operation in backends.OPERATIONS)


@pytest.mark.parametrize("ok", [True, False])
def test_backends_verify(ok: bool, capsys: pytest.CaptureFixture[str]) -> None:
    report = mock.MagicMock(ok=ok)
    report.__str__ = mock.Mock(return_value="the report")
    with mock.patch.object(backends, "verify", return_value=report):
        assert main(["backends", "--verify"]) == (0 if ok else 2)
    out = capsys.readouterr()
    assert "the report" in out.out and ("differs from its definition" in out.err) is not ok


def test_demo_shows_text_implementations_speed_and_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(folder), "--prompt", "In the", "--max-new-tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert "6 experts (2 per token)" in first and "\nIn the" in first and "tokens/s" in first
    assert "gated_delta_rule" in first and "torch" in first
    layers = [line for line in first.splitlines() if line.startswith("  layer")]
    model, _ = qwen35moe.load(folder)
    assert len(layers) == model.config.text_config.num_hidden_layers
    assert all(len(line.split("|")[1]) == 6 for line in layers)
    assert main(["demo", str(folder), "--prompt", "In the", "--max-new-tokens", "8"]) == 0
    again = capsys.readouterr().out
    assert first.split(" prompt tokens")[0] == again.split(" prompt tokens")[0]  # the seed fixes the text


def test_bars() -> None:
    assert [demo.bar(height) for height in (0.0, 1e-6, 0.5, 1.0, 7.0)] == [" ", "▁", "▄", "█", "█"]
    with mock.patch.object(demo, "can_print", return_value=False):
        assert demo.bar(1.0) == "@"


def test_characters_missing_in_the_encoding_become_question_marks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["demo", str(folder), "--prompt", "é 日", "--max-new-tokens", "20"]) == 0
    terminal.flush()
    out = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"tokens/s" in out and b"  layer 0" in out and b"\n? ?" in out


def test_as_a_module() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "qwen35moe", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.stdout == f"qwen35moe {qwen35moe.__version__}\n", run.stderr


def test_the_demo_says_nothing_of_a_missing_numpy() -> None:
    """No extra of the demo brings NumPy, and torch warns of that while it is imported: not the first thing to read."""
    program = "import sys; sys.modules['numpy'] = None; from qwen35moe.cli import main; "
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program + what]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    assert "Failed to initialize NumPy" in run("import torch").stderr  # as on a fresh machine
    shown = run("sys.exit(main(['demo', '--max-new-tokens', '2']))")
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith("tiny: "), shown


def test_help_imports_no_torch() -> None:
    program = "import sys; from qwen35moe.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
    program += "print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600)
    assert run.stdout.splitlines()[-1] == "False", run.stderr
