"""Streams the text that continues a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .defaults import end_tokens
from .loop import stream_ids
from .stop import Cut, TextStream


def stream_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Any,
    *,
    stop: str | Sequence[str] | None = None,
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[str]:
    """The continuation of one prompt, in pieces of whole characters.

    prompt: text, or token ids (for prompts with control tokens: tokenizer.encode(text, special=True)). stop: the text
    ends before the first of these strings, which may span tokens. options: those of `stream`.
    """
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps = stream_ids(model, ids, stop=strings or None, tokenizer=tokenizer, **options)
    end_ids = end_tokens(model, options.get("eos_token_id"), options.get("generation_config"))
    ends = set(end_ids) if skip_special_tokens else set()
    return _pieces(steps, ends, TextStream(tokenizer, skip_special_tokens), Cut(strings))


def _pieces(steps: Iterator[list[int]], ends: set[int], text: TextStream, cut: Cut) -> Iterator[str]:
    for (token,) in steps:
        if token in ends:
            break
        piece = cut.put(text.put(token))
        if piece:
            yield piece
        if cut.stopped:
            return
    piece = cut.put(text.end()) + cut.end()
    if piece:
        yield piece
