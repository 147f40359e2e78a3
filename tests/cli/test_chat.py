"""`qwen35moe chat`, and images in `generate`: reuse of the cache, and what goes to which stream."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen35moe
from qwen35moe import loading
from qwen35moe.cli import main
from qwen35moe.cli.chat import DIM, PLAIN, Conversation
from qwen35moe.config import Config, VisionConfig
from qwen35moe.processing import Processor
from tests.support.chat import definition, write_folder
from tests.support.peer import odd_shape, ours

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint with random weights, and two images."""
    path = write_folder(tmp_path_factory.mktemp("multimodal") / "it")
    tokens = {token["content"]: token["id"] for token in definition()["added_tokens"]}
    text = ours(odd_shape(3, vocab_size=320)).config.text_config
    vision = VisionConfig(depth=1, hidden_size=32, intermediate_size=24, num_heads=2, patch_size=8, num_position_embeddings=16,
                          out_hidden_size=text.hidden_size)  # fmt: skip
    config = Config(text_config=text, vision_config=vision, image_token_id=tokens["<|image_pad|>"],
                    video_token_id=tokens["<|video_pad|>"], vision_start_token_id=tokens["<|vision_start|>"],
                    vision_end_token_id=tokens["<|vision_end|>"])  # fmt: skip
    model = qwen35moe.Qwen3_5MoeForConditionalGeneration(config)
    model.init_weights(seed=3)
    model.save_pretrained(path)
    shade = torch.arange(40 * 56, dtype=torch.int64) % 251
    for name, offset in (("a", 0), ("b", 7)):
        Image.frombytes("L", (56, 40), bytes(((shade + offset) * (1 + offset) % 251).tolist())).save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return qwen35moe.Qwen3_5MoeForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(autouse=True)
def loaded_once(model: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """`load` returns the module's model."""
    from qwen35moe.processing import Tokenizer

    monkeypatch.setattr(loading, "load", lambda *_, **__: (model, Tokenizer.from_pretrained(folder)))


def without_cache(model: Any, processor: Processor, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The reply to a whole conversation at once."""
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def test_turns_reuse_the_cache_without_changing_the_replies(model: Any, folder: Path) -> None:
    """Three turns, the first and the last with a new image. Each reply equals that to the whole conversation at once, and the
    tokens of earlier messages are reused."""
    processor, options = Processor.from_pretrained(folder), {"max_new_tokens": 5}
    conversation = Conversation(model, processor, system="be", variables={}, **options)
    turns = [("one", [("image", folder / "a.png")]), ("two", []), ("three", [("image", folder / "b.png")])]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be"}]
    reusable = 0
    for text, media in turns:
        content: Any = [{"type": kind, kind: item} for kind, item in media] + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": content if media else text})
        expected = without_cache(model, processor, messages, **options)
        pieces = list(conversation.send(text, media))
        assert conversation.timer.ids == expected
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True)["input_ids"][0]
        reply = processor.parse(expected, prompt=inputs)
        assert "".join(piece for thinking, piece in pieces if thinking).strip("\n") == reply.reasoning
        assert conversation.prompt_tokens == len(inputs)
        assert conversation.reused_tokens == reusable  # all messages of the turn before
        reusable = len(processor.apply_chat_template(messages)["input_ids"][0])
        messages.append(reply.message())
        assert conversation.messages == messages
    assert conversation.reused_tokens > 40


def test_an_interrupted_reply_is_discarded(model: Any, folder: Path) -> None:
    processor, options = Processor.from_pretrained(folder), {"max_new_tokens": 6}
    conversation = Conversation(model, processor, variables={}, **options)
    list(conversation.send("one"))
    messages = list(conversation.messages)
    next(iter(conversation.send("never answered in full")))
    with pytest.raises(ValueError, match="no such file"):
        list(conversation.send("see", [("image", "no/such.png")]))
    assert conversation.messages == messages
    list(conversation.send("two"))
    assert conversation.timer.ids == without_cache(model, processor, [*messages, {"role": "user", "content": "two"}], **options)


def piped(monkeypatch: pytest.MonkeyPatch, text: str, terminal: bool = False) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_a_pipe_receives_the_answers(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["chat", str(folder), "--greedy", "--max-new-tokens", "4"]
    piped(monkeypatch, f"/image {folder / 'a.png'}\nwhat?\n\nand?\n")
    assert main([*command, "--no-think"]) == 0
    out = capsys.readouterr()
    assert out.out.count("\n") >= 2 and DIM not in out.out and out.err == ""
    piped(monkeypatch, "what?\n")
    assert main([*command, "--no-think", "--image", str(folder / "a.png")]) == 0
    assert out.out.startswith(capsys.readouterr().out)
    piped(monkeypatch, "what?\n")
    assert main([*command, "--think"]) == 0  # four tokens of reasoning, which goes to stderr
    out = capsys.readouterr()
    assert out.out == "\n" and out.err
    piped(monkeypatch, "what?\n/image no.png\nand?\nmore\n")
    assert main(command) == 2
    assert "no.png" in capsys.readouterr().err


def test_a_terminal_shows_dim_reasoning_and_errors(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "/help\nwhat?\n/nothing\n/image no.png\nagain\n/new\nlast\n/exit\nnever read\n", terminal=True)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert main(["chat", str(folder), "--seed", "1", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr()
    assert out.out.count(DIM) == out.out.count(PLAIN) == 2
    assert "unknown command /nothing" in out.err and "no such file" in out.err and "tokens/s" in out.err
    assert out.err.count("/video PATH") == 3 and out.err.count("> ") == 8


def test_generate_with_images(folder: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--prompt", "what <|im_end|>", "--max-new-tokens", "5"]
    assert main([*command, "--image", str(folder / "a.png"), "--image", str(folder / "b.png")]) == 0
    printed = capsys.readouterr()
    processor = Processor.from_pretrained(folder)
    inputs = processor.completion_inputs("what <|im_end|>", [folder / "a.png", folder / "b.png"])
    assert inputs["image_grid_thw"].shape == (2, 3)
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert printed.out.strip("\n") == processor.tokenizer.decode(ids, skip_special_tokens=True).strip("\n")
    assert f"{inputs['input_ids'].shape[1]} prompt tokens" in printed.err
    assert main([*command, "--image", "no.png"]) == 2
    assert "image 0 (no.png): no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_shows_progress_for_many_images(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """There is a bar for eight or more images on a terminal; a pipe and a few images have none."""
    shown = []
    for terminal, count in ((True, 9), (True, 2), (False, 9)):
        stderr = io.StringIO()
        stderr.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stderr)
        piped(monkeypatch, "what?\n")
        prompt = ["--prompt", "what"] if command == "generate" else ["--no-think"]
        images = [part for _ in range(count) for part in ("--image", str(folder / "a.png"))]
        assert main([command, str(folder), *prompt, "--max-new-tokens", "2", *images]) == 0
        shown.append("image/s" in stderr.getvalue() and f"/{count}" in stderr.getvalue())
    assert shown == [True, False, False]


def test_generate_with_videos(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from tests.processing.test_video import clip, write

    write(str(tmp_path / "a.mp4"), clip(9))
    assert main(["generate", str(folder), "--prompt", "what", "--max-new-tokens", "3", "--video", str(tmp_path / "a.mp4")]) == 0
    assert "tokens/s" in capsys.readouterr().err


def test_missing_vision_tower_and_chat_template_are_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text_model = ours(odd_shape(3, vocab_size=320))
    monkeypatch.setattr(sys.modules["qwen35moe.loading.load"], "load_with_tokenizer", lambda *_, **__: (text_model, None))
    assert main(["generate", str(folder), "--prompt", "what", "--image", str(folder / "a.png")]) == 2
    assert "has no vision tower" in capsys.readouterr().err
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert main(["chat", str(plain)]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(["chat", str(folder), "--greedy", "--seed", "3"]) == 2
    assert "--greedy" in capsys.readouterr().err
