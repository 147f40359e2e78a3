"""`qwen35moe inspect` on folders without weights: layouts, quantisation, bytes, memory, and problems."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen35moe.checkpoint.published import QWEN35, QWEN36, Layout, quantization_config, tensors
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from qwen35moe.cli import inspect, main
from qwen35moe.config import Config
from qwen35moe.config.parameters import TensorShape
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from tests.support.headers import write_headers


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_inspect_does_not_import_torch(tmp_path: Path) -> None:
    """Importing torch takes longer than the rest of `inspect`."""
    write_tiny(tmp_path, tiny_config(), QWEN35)
    program = f"import sys; from qwen35moe.cli import main; main(['inspect', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert "tensors" in done.stdout and done.stdout.splitlines()[-1] == "False"


def test_a_published_fp8_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64,196 tensors in 42 shards. The promise is two seconds; the test allows twenty on a busy machine."""
    layout = QWEN36.quantised()
    config = Config.preset("3.6-35b-a3b").replace()
    config = config.replace(quantization_config=quantization_config(config, layout))
    write_headers(tmp_path, config, list(tensors(config, layout)), shards=42)
    start = time.process_time()
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert time.process_time() - start < 20
    summary = json.loads(capsys.readouterr().out)
    assert summary["tensors"] == 64_196 and summary["quantised_weights"] == 31_745 and summary["quantization"] == "fp8"
    assert summary["bytes"] == 37_454_789_472 == sum(summary["bytes_by_dtype"].values()) and summary["files"] == 42
    assert summary["parameters"] == summary["described_parameters"] == 35_951_822_704
    assert summary["active_text_parameters"] == 3_454_988_928
    parts = {part["name"]: part for part in summary["parts"]}
    assert {parts[name]["experts"] for name in ("routed experts", "multi-token prediction")} == {"per expert"}
    assert set(parts["attention"]["bytes_by_dtype"]) == {"F8_E4M3", "BF16"}
    assert set(parts["vision tower"]["bytes_by_dtype"]) == {"BF16"}
    assert all(not summary[f"{kind}_tensors"] for kind in ("missing", "unexpected", "misshapen", "unknown"))
    page = inspect.report(summary)
    for words in ("F8_E4M3 34", "quantised: fp8, 31745 weights with block scales", "64,196 tensors, 37.45 GB", "per expert"):
        assert words in page, words
    assert "missing" not in page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dense", [True, False])
def test_memory_equals_a_loaded_model_and_its_cache(dense: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny_config(dense=dense, vision=True, mtp=True)
    write_tiny(tmp_path, config)
    model = (Qwen3_5ForCausalLM if dense else Qwen3_5MoeForCausalLM).from_pretrained(tmp_path, dtype=dtype)
    if dtype is torch.float32:
        model.save_pretrained(tmp_path)
    memory = inspect.summarize(str(tmp_path), context=37, batch=3)["memory"]
    assert memory["dtype"] == str(dtype).removeprefix("torch.")
    assert memory["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    cache = model.new_cache(3, max_length=37)
    assert memory["kv"] + memory["state"] == cache.nbytes - cache.lengths.nbytes
    assert memory["kv"] == cache[3].key_buffer.nbytes * 2
    assert memory["total"] == memory["weights"] + memory["kv"] + memory["state"]
    others = (config.num_parameters(mtp=True) - config.num_parameters(vision=False)) * 2
    assert memory["other_weights"] == (others if dtype is torch.bfloat16 else 0)


def test_context_and_batch_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path, tiny_config())
    assert main(["inspect", str(tmp_path), "--json", "--context", "262144", "--batch", "4"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["kv"] == 2 * 4 * 262_144 * 2 * 40 * 2 and memory["context"] == 262_144
    assert main(["inspect", str(tmp_path), "--context", "262144", "--batch", "4"]) == 0
    assert "4 x 262,144 tokens: 335.54 MB of keys and values" in capsys.readouterr().out
    for wrong in (["--batch", "0"], ["--context", "-1"]):
        assert main(["inspect", str(tmp_path), *wrong]) == 2
        assert "at least" in capsys.readouterr().err


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(layers=8, mtp=True)
    root = "model.layers."
    stored = [t for t in tensors(config, Layout(mtp=False)) if not t.name.endswith("self_attn.k_norm.weight")]
    stored = [t for t in stored if t.name != root + "2.linear_attn.A_log"]
    stored += [TensorShape(f"{root}{n}.mlp.adapter.weight", (3, 5), "BF16") for n in range(8)]
    stored.append(TensorShape("audio.weight", (3, 5), "BF16"))
    stored = [t._replace(shape=(9, 64)) if t.name == root + "1.mlp.gate.weight" else t for t in stored]
    write_headers(tmp_path, config, stored)
    summary = inspect.summarize(str(tmp_path))
    missing = ["layers.2.linear_attn.A_log", "layers.3.self_attn.k_norm.weight", "layers.7.self_attn.k_norm.weight"]
    assert summary["missing_tensors"] == missing and summary["unknown_tensors"] == ["audio.weight"]
    assert summary["unexpected_tensors"] == [f"layers.{n}.mlp.adapter.weight" for n in range(8)]
    assert summary["misshapen_tensors"] == ["layers.1.mlp.gate.weight: [9, 64], described as [8, 64]"]
    assert summary["absent_parts"] == ["multi-token prediction"]
    assert main(["inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    for words in (
        "multi-token prediction: described by config.json, not stored",
        "3 tensors are missing: layers.2.linear_attn.A_log, layers.{3,7}.self_attn.k_norm.weight (2 tensors)",
        "8 tensors are not described by config.json: layers.{0-7}.mlp.adapter.weight",
        "1 tensors have a shape other than config.json describes",
        "1 tensors belong to no part of this architecture: audio.weight",
    ):
        assert words in page, words


def test_missing_and_unexpected_scales(tmp_path: Path) -> None:
    config = tiny_config(layers=4)
    layout = QWEN35.quantised()
    gate = "model.layers.0.mlp.experts.0.gate_proj.weight"
    stored = [t for t in tensors(config, layout) if t.name != gate + "_scale_inv"]
    unexpected = TensorShape("model.layers.1.mlp.gate.weight_scale_inv", (1, 1), "BF16")
    write_headers(tmp_path, config, [*stored, unexpected])
    summary = inspect.summarize(str(tmp_path))
    assert summary["missing_tensors"] == [gate.removeprefix("model.") + "_scale_inv"]
    assert summary["unexpected_tensors"] == ["layers.1.mlp.gate.weight_scale_inv"]
    assert "quantised: not declared in config.json" in inspect.report(summary)


def test_mixed_layouts_of_decoder_and_mtp(tmp_path: Path) -> None:
    config = tiny_config(mtp=True, vision=True)
    for experts, mtp in (("grouped", "per_expert"), ("per_expert", "grouped")):
        path = tmp_path / experts
        write_headers(path, config, list(tensors(config, Layout(experts=experts, mtp_experts=mtp))))
        summary = inspect.summarize(str(path))
        parts = {part["name"]: part["experts"] for part in summary["parts"]}
        assert parts["routed experts"] == experts.replace("_", " ") != parts["multi-token prediction"]
        assert not summary["missing_tensors"] and not summary["unexpected_tensors"] and not summary["absent_parts"]


def test_a_configuration_with_a_billion_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tensors of two experts, and a config.json that describes 24 * 10^9 names."""
    config = tiny_config(layers=8, experts=2, top_k=1)
    write_headers(tmp_path, config, list(tensors(config, Layout(experts="per_expert"))))
    content = json.loads((tmp_path / "config.json").read_text()) | {"num_experts": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for command in (["inspect", str(tmp_path)], ["convert", str(tmp_path), str(tmp_path / "new")]):
        assert main(command) == 2
        assert "describes 1,000,000,000 experts in each of 8 layers" in capsys.readouterr().err
    write_headers(tmp_path, config, [t for t in tensors(config) if "experts" not in t.name])
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert main(["convert", str(tmp_path), str(tmp_path / "new")]) == 2  # grouped: one name per layer
    assert "missing: layers.{0-7}.mlp.experts.gate_up_proj" in capsys.readouterr().err
