"""Output on the terminal: text, speed and sizes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


def printable(text: str) -> str:
    """The text with a question mark for each character that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def can_print(text: str) -> bool:
    """Whether the terminal's encoding has all characters of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def format_bytes(nbytes: int) -> str:
    """A size in the largest unit of which it has at least one; units are powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


@dataclass
class TokenTimer:
    """The tokens of one reply and their times. The first one includes the prefill, the others are decoding."""

    start: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def add(self, token: Any) -> None:
        """Record a token that was just generated."""
        self.times.append(time.perf_counter())
        self.ids.append(int(token))

    def summary(self, prompt_tokens: int) -> str:
        """The speed in words."""
        if not self.times:
            return "no tokens generated"
        text = f"{prompt_tokens} prompt tokens, first new token after {self.times[0] - self.start:.2f} s"
        more = len(self.times) - 1
        return text + (f", then {more} tokens at {more / (self.times[-1] - self.times[0]):.1f} tokens/s" if more else "")


def write_stream(
    model: Any, tokenizer: Any, ids: Sequence[int], *, stop: Sequence[str] | None = None, **options: Any
) -> TokenTimer:
    """Generate from `ids` and write the text to standard output as it arrives."""
    from ..generation import stream_text

    timer = TokenTimer()

    def record(input_ids: Any, scores: Any) -> bool:
        timer.add(input_ids[0, -1])
        return False

    pieces: Iterator[str] = stream_text(model, tokenizer, ids, stop=stop, stopping_criteria=[record], **options)
    for piece in pieces:
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    return timer
