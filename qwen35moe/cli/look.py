"""What `qwen35moe demo` shows of a picture: it in characters, what the model says of it, and what it might have said."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .generate import can_print, printable

QUESTION = "What is in this picture?"
SHADES, PLAIN = " ░▒▓█", " .+#@"  # of ink


class Candidate(NamedTuple):
    """A token and its probability."""

    text: str
    probability: float


class Said(NamedTuple):
    """A reply, and the candidates, most likely first, for its token that the model was least sure of."""

    content: str
    candidates: list[Candidate]


def look(model: Any, processor: Any, image: str | Path, question: str = QUESTION) -> str:
    """The picture, the question, the reply, and the runners-up."""
    inputs = processor.apply_chat_template(asked(image, question), add_generation_prompt=True)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    settings = processor.image_processor.settings
    size = f"{columns * settings.patch_size} x {rows * settings.patch_size} pixels"
    tokens = rows * columns // settings.merge_size**2
    reply = said(model, processor, inputs)
    first, *others = [f"{each.text!r} {each.probability:.2%}" for each in reply.candidates]
    lines = [f"{Path(image).name}: {size}, {rows} x {columns} patches, {tokens} tokens", in_characters(image), ""]
    lines += [f"> {question}", reply.content, "", f"least sure of {first}; runners-up {', '.join(others)}"]
    return printable("\n".join(lines))


def asked(image: str | Path, question: str) -> list[dict[str, Any]]:
    """A conversation of one message with a picture."""
    return [{"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]}]


def said(model: Any, processor: Any, inputs: dict[str, Any], count: int = 5, max_new_tokens: int = 60) -> Said:
    """The most likely reply to one prompt (token by token), and the `count` candidates where it was least sure."""
    import torch

    start = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seen = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with torch.no_grad():
        logits = model(ids, **seen).logits[0, start - 1 : -1]
    probabilities = logits.float().softmax(-1)
    unsure = int(probabilities.amax(-1).argmin())
    best = probabilities[unsure].topk(count)
    candidates = [
        Candidate(processor.tokenizer.decode([token]), probability)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Said(processor.parse(ids[0, start:], prompt=ids[0, :start]).content, candidates)


def in_characters(image: str | Path, widest: int = 64, highest: int = 16) -> str:
    """The picture on a terminal: the darker, the fuller. A character is taken to be twice as high as wide."""
    from ..processing.images import as_rgb

    picture = as_rgb(image).convert("L")
    width = min(widest, max(1, round(2 * highest * picture.width / picture.height)))
    height = min(highest, max(1, round(width / 2 * picture.height / picture.width)))
    picture = picture.resize((width, height))
    scale = SHADES if can_print(SHADES) else PLAIN
    inks = [scale[min((255 - light) * len(scale) // 256, len(scale) - 1)] for light in picture.tobytes()]
    return "\n".join("  " + "".join(inks[row : row + width]).rstrip() for row in range(0, len(inks), width))
