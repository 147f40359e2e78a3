"""`qwen35moe generate`: a prompt continued on standard output, its speed on stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Times of the tokens of one answer: what came first includes reading the prompt, the rest is decoding."""

    start: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def tick(self, token: Any) -> None:
        self.times.append(time.perf_counter())
        self.ids.append(int(token))

    def summary(self, prompt_tokens: int) -> str:
        if not self.times:
            return "no tokens"
        text = f"prompt of {prompt_tokens} tokens and the first new one in {self.times[0] - self.start:.2f} s"
        if len(self.times) > 1:
            seconds = self.times[-1] - self.times[0]
            text += f", then {len(self.times) - 1} tokens at {(len(self.times) - 1) / seconds:.1f} tokens/s"
        return text


def write_stream(model: Any, tokenizer: Any, ids: Sequence[int], *, stop: Sequence[str] | None = None, **options: Any) -> Clock:
    """Write the continuation of `ids` to standard output as it comes."""
    from ..generation import stream_text

    clock = Clock()

    def watch(input_ids: Any, scores: Any) -> bool:
        clock.tick(input_ids[0, -1])
        return False

    pieces: Iterator[str] = stream_text(model, tokenizer, ids, stop=stop, stopping_criteria=[watch], **options)
    for piece in pieces:
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    return clock


def printable(text: str) -> str:
    """The text as the terminal can take it: a character that its encoding lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def can_print(text: str) -> bool:
    """Whether the terminal's encoding has all characters of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def run(options: argparse.Namespace) -> None:
    """Stream the continuation of the prompt."""
    from ..loading import load

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    given = seen(options, prompt) if options.image or options.video else {}  # before the model: files may be missing
    model, tokenizer = load(options.folder, dtype=options.dtype, device=options.device)
    ids = given.pop("input_ids")[0].tolist() if given else tokenizer.encode(prompt, special=options.special)
    shaping = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    clock = write_stream(
        model,
        tokenizer,
        ids,
        stop=options.stop,
        max_new_tokens=options.max_new_tokens,
        do_sample=any(value is not None for value in shaping.values()),
        **shaping,
        **shown(model, given),
    )
    print()
    print(clock.summary(len(ids)), file=sys.stderr)


def seen(options: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The inputs for a prompt with pictures before it."""
    from ..loading import load_processor

    processor = load_processor(options.folder)
    images, videos = options.image or [], options.video or []
    given = processor.before(prompt, images, videos, special=options.special, progress=True)
    return {name: value for name, value in given.items() if name not in ("attention_mask", "mm_token_type_ids")}


def shown(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The pictures of a processor's output as the option of `stream`."""
    from ..models.vision_inputs import VisualInputs

    if not given:
        return {}
    if not hasattr(model, "visual"):
        raise ValueError(f"{type(model).__name__} has no vision tower: images and videos need a multimodal checkpoint")
    return {"visual_inputs": VisualInputs(**given)}
