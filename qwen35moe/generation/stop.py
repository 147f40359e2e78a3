"""Text out of tokens, piece by piece, and stop strings in it.

A token of a byte-level vocabulary may end in the middle of a character, and a stop string in the middle of a token;
so neither can be looked for token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding puts where bytes are no UTF-8, an unfinished character among them
_WINDOW, _CONTEXT = 16, 4  # at most so many tokens are decoded again for each new one; so many stay when the rest goes


class Decoder(Protocol):
    """What is asked of a tokenizer here; ours and transformers' have it."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """Tokens in, text out: only whole characters, each once.

        text = TextStream(tokenizer)
        for token in tokens:
            print(text.put(token), end="")
        print(text.end())

    The pieces joined are tokenizer.decode(all tokens). An unfinished character at the end is held back until its last
    byte, or the end, has come: decoders show it as exactly one replacement character.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._given = ""  # of the window's text, what has been returned

    def put(self, token: int) -> str:
        self._window.append(int(token))
        piece = self._take(self._decode().removesuffix(BROKEN))
        if len(self._window) > _WINDOW:
            # Some tokens stay: an unfinished character has at most three, and some decoders treat a text's first token
            # differently.
            del self._window[:-_CONTEXT]
            self._given = self._decode().removesuffix(BROKEN)
        return piece

    def end(self) -> str:
        """What was held back. The stream is empty afterwards."""
        piece = self._take(self._decode())
        self._window, self._given = [], ""
        return piece

    def _take(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip_special_tokens)


class StopStrings:
    """Says for each row whether its new text contains a stop string, special tokens' text included.

    Looks at generated text only: a stop string in the prompt, or one that begins there, does not stop.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Decoder, rows: int) -> None:
        self._strings = tuple(strings)
        self._keep = max(len(each) for each in strings) - 1
        self._streams = [TextStream(tokenizer, skip_special_tokens=False) for _ in range(rows)]
        self._tails = [""] * rows

    def put(self, row: int, token: int) -> bool:
        """Add a token to a row; True when its text now contains a stop string."""
        text = self._tails[row] + self._streams[row].put(token)
        self._tails[row] = text[max(len(text) - self._keep, 0) :]
        return any(each in text for each in self._strings)


class Cut:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def put(self, text: str) -> str:
        """The part of the text so far that is certain to come before any stop string, each character once."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(each) for each in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, each) for each in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that is a beginning of `string`, but not all of it."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
