"""`qwen35moe routing`: output, plot and trace; and the benchmark that separates flips from arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qwen35moe
from benchmarks.__main__ import main as benchmark
from benchmarks.tools import routing_numerics
from qwen35moe.cli import main
from qwen35moe.routing import Routing, entropy, expert_load, margins
from qwen35moe.routing.file import read_metadata
from tests.support import peer
from tests.support.fakes import tokenizer_definition
from tests.support.peer import odd_shape

TEXT = "In the beginning was the word, and the word was <|im_end|> many words. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_windows_are_separate_sequences(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace equals the routing of a forward for each window; the statistics are those of the trace."""
    out = tmp_path / "trace.safetensors"
    arguments = ["routing", "tiny", "--text", str(text), "--window", "20", "--out", str(out), "--dtype", "float32"]
    assert main([*arguments, "--logits", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar without a terminal
    stats = json.loads(printed.out)
    model, tokenizer = qwen35moe.load("tiny", dtype="float32")
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 40 and stats["tokens"] == len(ids) and stats["window"] == 20
    with torch.no_grad():
        windows = [model(torch.tensor([ids[i : i + 20]]), output_routing=True).routing for i in range(0, len(ids), 20)]
    whole, trace = Routing.pack(windows), Routing.load(out)
    assert torch.equal(trace.indices, whole.indices) and torch.equal(trace.weights, whole.weights)
    assert torch.equal(trace.logits, whole.logits) and (trace.num_experts, trace.layers) == (16, (0, 1, 2, 3))
    assert stats["load"] == expert_load(trace).tolist()
    assert stats["entropy"] == pytest.approx((entropy(trace) / torch.tensor(16.0).log()).tolist())
    middle = margins(trace).sort(dim=1).values[:, (len(ids) - 1) // 2]
    assert stats["margin_median"] == middle.tolist()
    about = {"model": "tiny", "text": "text.txt", "window": "20", "tokens": str(len(ids)), "dtype": "float32"}
    assert read_metadata(out) == about
    assert main(arguments) == 0
    assert Routing.load(out).logits is None
    page = capsys.readouterr().out
    assert f"{len(ids)} tokens in windows of 20, float32; 4 of 16 experts per token (even load 6.25%)" in page
    assert len(page.splitlines()) == 3 + 4 + 3


def test_plot(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert main(["routing", "tiny", "--text", str(text), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and "bfloat16" in capsys.readouterr().out


def test_refused_arguments(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tmp_path / "dense"
    model = peer.ours(odd_shape(2, dense=True, vocab_size=320))
    model.init_weights(seed=1)
    model.save_pretrained(dense)
    (dense / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    empty = tmp_path / "empty.txt"
    empty.touch()
    for folder, file, options, words in (
        ("tiny", text, ["--window", "0"], "must be at least 1, got 0"), ("tiny", text, ["--logits"], "--out TRACE"),
        ("tiny", empty, [], "is empty"), ("tiny", tmp_path / "absent.txt", [], "absent.txt"),
        (str(dense), text, [], "dense and has no routers"),
    ):  # fmt: skip
        assert main(["routing", folder, "--text", str(file), *options]) == 2
        err = capsys.readouterr().err
        assert err.startswith("qwen35moe: ") and err.count("\n") == 1 and words in err


def test_help_lists_all_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["routing", "--help"])
    text = capsys.readouterr().out
    for option in ("--text FILE", "--window N", "--out TRACE", "--logits", "--plot PNG", "--json", "--dtype", "--device"):
        assert option in text


def test_the_report_separates_flips_from_arithmetic(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed runs have no flips left in them: with the truth's routing the error of bfloat16 is what arithmetic does.
    Replaying a run's own routing is that run, bit for bit, in every dtype."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in the interpreter this takes a minute; tests/triton/ holds its values
    page, written = tmp_path / "page.md", tmp_path / "report.json"
    page.write_text(f"before\n{routing_numerics.BEGIN}\nold\n{routing_numerics.END}\nafter\n")
    options = ["--text", str(text), "--tokens", "40", "--json", str(written), "--markdown", str(page)]
    assert benchmark(["routing_numerics", *options]) == 0
    report = json.loads(written.read_text())
    assert [row["dtype"] for row in report["dtypes"]] == ["float32", "bfloat16"] and report["tokens"] == 40
    single, half = report["dtypes"]
    assert single["replay_bit_for_bit"] and half["replay_bit_for_bit"]
    assert single["unforced"]["max"] < 1e-5 and single["flips"]["share"] == 0
    assert 1e-3 < half["experts and weights replayed"]["max"] < 0.1
    forms = {(row["dtype"], row["form"]): row for row in report["forms"]}
    assert forms["float32", "loop"]["unforced"] == 0 and forms["float32", "sorted"]["replayed"] < 1e-5
    assert "refused" in forms["float32", "triton"] and "refused" in forms["bfloat16", "triton"]
    text_now = page.read_text()
    assert text_now.startswith("before\n") and text_now.endswith("after\n") and "old" not in text_now
    assert text_now.count("| bfloat16 |") >= 4 and str(tmp_path) not in text_now
    capsys.readouterr()
