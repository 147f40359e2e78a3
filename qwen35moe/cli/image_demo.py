"""The image part of `qwen35moe demo`: the image in characters, the model's reply, and the alternatives to its least certain
token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .terminal import can_print, printable
from .visual import NAMES

QUESTION = "What is in this picture?"
SHADES, ASCII = " ░▒▓█", " .+#@"  # from white to black


class Candidate(NamedTuple):
    """A token and its probability."""

    text: str
    probability: float


class ScoredReply(NamedTuple):
    """A reply, and the most likely candidates for its least certain token, in order."""

    content: str
    candidates: list[Candidate]


def describe(model: Any, processor: Any, image: str | Path, question: str = QUESTION) -> str:
    """The image in characters, the question, the reply and the alternatives to its least certain token."""
    inputs = processor.apply_chat_template(image_question(image, question), add_generation_prompt=True)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    settings = processor.image_processor.settings
    size = f"{columns * settings.patch_size} x {rows * settings.patch_size} pixels"
    tokens = rows * columns // settings.merge_size**2
    reply = scored_reply(model, processor, inputs)
    chosen, *others = [f"{candidate.text!r} {candidate.probability:.2%}" for candidate in reply.candidates]
    lines = [f"{Path(image).name}: {size}, {rows} x {columns} patches, {tokens} tokens", in_characters(image), ""]
    lines += [f"> {question}", reply.content, "", f"least certain token: {chosen}; alternatives: {', '.join(others)}"]
    return printable("\n".join(lines))


def image_question(image: str | Path, question: str) -> list[dict[str, Any]]:
    """A conversation of one message: an image and a question."""
    return [{"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]}]


def scored_reply(model: Any, processor: Any, inputs: dict[str, Any], count: int = 5, max_new_tokens: int = 60) -> ScoredReply:
    """The greedy reply to one prompt, and the `count` most likely candidates for its least certain token."""
    import torch

    start = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    visual = {name: inputs[name] for name in NAMES if name in inputs}
    with torch.no_grad():
        logits = model(ids, **visual).logits[0, start - 1 : -1]
    probabilities = logits.float().softmax(-1)
    least_certain = int(probabilities.amax(-1).argmin())
    best = probabilities[least_certain].topk(count)
    candidates = [
        Candidate(processor.tokenizer.decode([token]), probability)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return ScoredReply(processor.parse(ids[0, start:], prompt=ids[0, :start]).content, candidates)


def in_characters(image: str | Path, max_width: int = 64, max_height: int = 16) -> str:
    """The image in characters: the darker, the denser. A character counts as twice as high as wide."""
    from ..processing.images import as_rgb

    grey = as_rgb(image).convert("L")
    width = min(max_width, max(1, round(2 * max_height * grey.width / grey.height)))
    height = min(max_height, max(1, round(width / 2 * grey.height / grey.width)))
    scale = SHADES if can_print(SHADES) else ASCII
    pixels = grey.resize((width, height)).tobytes()
    characters = [scale[min((255 - pixel) * len(scale) // 256, len(scale) - 1)] for pixel in pixels]
    return "\n".join("  " + "".join(characters[start : start + width]).rstrip() for start in range(0, len(characters), width))
