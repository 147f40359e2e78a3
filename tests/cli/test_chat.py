"""`qwen35moe chat`, and pictures in `generate`: what is computed again and what is not, and what is written where."""

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
    """A multimodal checkpoint with weights that nobody trained, and a picture."""
    path = write_folder(tmp_path_factory.mktemp("seeing") / "it")
    tokens = {each["content"]: each["id"] for each in definition()["added_tokens"]}
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
    for name, turn in (("a", 0), ("b", 7)):
        Image.frombytes("L", (56, 40), bytes(((shade + turn) * (1 + turn) % 251).tolist())).save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return qwen35moe.Qwen3_5MoeForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(autouse=True)
def loads_what_it_finds(model: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Loading has tests of its own; here one model serves all."""
    from qwen35moe.processing import Tokenizer

    monkeypatch.setattr(loading, "load", lambda *_, **__: (model, Tokenizer.from_pretrained(folder)))


def alone(model: Any, processor: Processor, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """The reply without any cache from before."""
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def test_turns_reuse_the_cache_and_say_what_they_would_say_without(model: Any, folder: Path) -> None:
    """Three turns, the first and the last with a new picture. The reply to each is that of the whole conversation at once,
    and what the messages before took is not read again."""
    processor, options = Processor.from_pretrained(folder), {"max_new_tokens": 5}
    conversation = Conversation(model, processor, system="be", variables={}, **options)
    turns = [("one", [("image", folder / "a.png")]), ("two", []), ("three", [("image", folder / "b.png")])]
    said: list[dict[str, Any]] = [{"role": "system", "content": "be"}]
    before = 0
    for text, pictures in turns:
        content: Any = [{"type": kind, kind: each} for kind, each in pictures] + [{"type": "text", "text": text}]
        said.append({"role": "user", "content": content if pictures else text})
        expected = alone(model, processor, said, **options)
        pieces = list(conversation.say(text, pictures))
        assert conversation.clock.ids == expected
        inputs = processor.apply_chat_template(said, add_generation_prompt=True)["input_ids"][0]
        reply = processor.parse(expected, prompt=inputs)
        assert "".join(piece for thinking, piece in pieces if thinking).strip("\n") == reply.reasoning
        assert conversation.prompt_tokens == len(inputs)
        assert conversation.reused == before  # all of the messages of the turn before
        before = len(processor.apply_chat_template(said)["input_ids"][0])
        said.append(reply.message())
        assert conversation.messages == said
    assert conversation.reused > 40


def test_a_reply_that_was_broken_off_leaves_no_trace(model: Any, folder: Path) -> None:
    processor, options = Processor.from_pretrained(folder), {"max_new_tokens": 6}
    conversation = Conversation(model, processor, variables={}, **options)
    list(conversation.say("one"))
    said = list(conversation.messages)
    next(iter(conversation.say("never answered in full")))
    with pytest.raises(ValueError, match="no such file"):
        list(conversation.say("see", [("image", "no/such.png")]))
    assert conversation.messages == said
    list(conversation.say("two"))
    assert conversation.clock.ids == alone(model, processor, [*said, {"role": "user", "content": "two"}], **options)


def piped(monkeypatch: pytest.MonkeyPatch, text: str, terminal: bool = False) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def test_a_pipe_gets_the_answers(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["chat", str(folder), "--greedy", "--max-new-tokens", "4"]
    piped(monkeypatch, f"/image {folder / 'a.png'}\nwhat?\n\nand?\n")
    assert main([*command, "--no-think"]) == 0
    out = capsys.readouterr()
    assert out.out.count("\n") >= 2 and DIM not in out.out and out.err == ""
    piped(monkeypatch, "what?\n")
    assert main([*command, "--no-think", "--image", str(folder / "a.png")]) == 0
    assert out.out.startswith(capsys.readouterr().out)
    piped(monkeypatch, "what?\n")
    assert main([*command, "--think"]) == 0  # four tokens do not leave the reasoning: it goes to stderr
    out = capsys.readouterr()
    assert out.out == "\n" and out.err
    piped(monkeypatch, "what?\n/image no.png\nand?\nmore\n")
    assert main(command) == 2
    assert "no.png" in capsys.readouterr().err


def test_a_terminal_sees_thinking_dimmed_and_its_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "/help\nwhat?\n/nothing\n/image no.png\nagain\n/new\nlast\n/exit\nnever read\n", terminal=True)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert main(["chat", str(folder), "--seed", "1", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr()
    assert out.out.count(DIM) == out.out.count(PLAIN) == 2
    assert "there is no command /nothing" in out.err and "no such file" in out.err and "tokens/s" in out.err
    assert out.err.count("/video PATH") == 3 and out.err.count("> ") == 8


def test_generate_sees(folder: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--prompt", "what <|im_end|>", "--max-new-tokens", "5"]
    assert main([*command, "--image", str(folder / "a.png"), "--image", str(folder / "b.png")]) == 0
    found = capsys.readouterr()
    processor = Processor.from_pretrained(folder)
    inputs = processor.before("what <|im_end|>", [folder / "a.png", folder / "b.png"])
    assert inputs["image_grid_thw"].shape == (2, 3)
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert found.out.strip("\n") == processor.tokenizer.decode(ids, skip_special_tokens=True).strip("\n")
    assert f"prompt of {inputs['input_ids'].shape[1]} tokens" in found.err
    assert main([*command, "--image", "no.png"]) == 2
    assert "image 0 (no.png): there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_watches_many_images(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """From eight on there is a bar; a pipe and a single picture have none."""
    seen = []
    for terminal, count in ((True, 9), (True, 2), (False, 9)):
        stderr = io.StringIO()
        stderr.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stderr)
        piped(monkeypatch, "what?\n")
        prompt = ["--prompt", "what"] if command == "generate" else ["--no-think"]
        images = [part for _ in range(count) for part in ("--image", str(folder / "a.png"))]
        assert main([command, str(folder), *prompt, "--max-new-tokens", "2", *images]) == 0
        seen.append("image/s" in stderr.getvalue() and f"/{count}" in stderr.getvalue())
    assert seen == [True, False, False]


def test_generate_sees_videos(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from tests.processing.test_video import clip, write

    write(str(tmp_path / "a.mp4"), clip(9))
    assert main(["generate", str(folder), "--prompt", "what", "--max-new-tokens", "3", "--video", str(tmp_path / "a.mp4")]) == 0
    assert "tokens/s" in capsys.readouterr().err


def test_what_cannot_see_or_chat_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = ours(odd_shape(3, vocab_size=320))
    monkeypatch.setattr(loading, "load", lambda *_, **__: (blind, None))
    assert main(["generate", str(folder), "--prompt", "what", "--image", str(folder / "a.png")]) == 2
    assert "has no vision tower" in capsys.readouterr().err
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert main(["chat", str(plain)]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(["chat", str(folder), "--greedy", "--seed", "3"]) == 2
    assert "--greedy" in capsys.readouterr().err
