"""The image in `qwen35moe demo`: the characters, the reply, and the candidates for its least certain token."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import qwen35moe
from qwen35moe.cli import image_demo, main
from qwen35moe.processing import Processor

Image = pytest.importorskip("PIL.Image")
TINY = Path(qwen35moe.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen35moe.load("tiny", dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(TINY)


def test_demo_shows_the_image_the_reply_and_the_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("example.png: 96 x 32 pixels, 4 x 12 patches, 12 tokens")
    question = lines.index("> What is in this picture?")
    assert question == start + 1 + 11 + 1  # a third of 64, and a character is twice as high as wide
    assert lines[question + 1] == "The handwritten digits 7, 3 and 5."
    assert lines[question + 3].startswith("least certain token: '7' ") and lines[question + 3].count("%") == 5
    assert any(line.startswith("vision_attention") for line in lines)


def test_candidates_are_those_of_the_least_certain_step(model: Any, processor: Processor) -> None:
    """Against a loop that generates the reply token by token without a cache."""
    messages = image_demo.image_question(TINY / "example.png", "What do you see?")
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
    reply = image_demo.scored_reply(model, processor, inputs, count=3)
    ids, steps = inputs["input_ids"], []
    with torch.no_grad():
        while ids[0, -1] not in processor.tokenizer.eos_token_ids:
            logits = model(ids, pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]).logits[0, -1]
            steps.append(logits.double().softmax(-1))
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    least_certain = min(steps, key=lambda probabilities: probabilities.max())
    best = least_certain.topk(3)
    texts = [candidate.text for candidate in reply.candidates]
    assert texts == [processor.tokenizer.decode([token]) for token in best.indices.tolist()]
    expected = torch.tensor([candidate.probability for candidate in reply.candidates], dtype=torch.float64)
    torch.testing.assert_close(expected, best.values, rtol=1e-4, atol=1e-6)
    assert reply.content == processor.parse(ids[0, inputs["input_ids"].shape[1] :]).content


def test_an_image_in_characters(tmp_path: Path) -> None:
    image = Image.new("L", (40, 20), 255)
    image.paste(0, (0, 0, 20, 20))  # the left half is black
    image.save(tmp_path / "half.png")
    lines = image_demo.in_characters(tmp_path / "half.png", max_width=12).splitlines()
    assert len(lines) == 3 and all(line.strip().startswith("█" * 4) and len(line) <= 2 + 8 for line in lines)
    with mock.patch.object(image_demo, "can_print", return_value=False):
        assert image_demo.in_characters(tmp_path / "half.png", max_width=12).splitlines()[0].startswith("  @@@@")


def test_an_image_for_a_model_without_a_vision_tower_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", str(tmp_path / "text"), "--layers", "4"]) == 0
    assert main(["demo", str(tmp_path / "text"), "--image", str(TINY / "example.png"), "--max-new-tokens", "2"]) == 2
    assert "has no vision tower" in capsys.readouterr().err
