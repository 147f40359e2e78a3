"""Decodes tokens piece by piece, and finds stop strings in the text.

A token of a byte-level vocabulary may end in the middle of a character, and a stop string in the middle of a token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

BROKEN = "\N{REPLACEMENT CHARACTER}"  # decoders put it for bytes that are no UTF-8, such as an unfinished character
_WINDOW, _CONTEXT = 16, 4  # tokens decoded again for each new one, at most; tokens kept when the window is shortened


class Decoder(Protocol):
    """A tokenizer, ours or transformers'."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """Tokens in, text out: only whole characters, each once.

        text = TextStream(tokenizer)
        for token in tokens:
            print(text.put(token), end="")
        print(text.end())

    The pieces joined are tokenizer.decode(all tokens), for decoders that do not change earlier text. An unfinished character
    is held back until its last byte or the end of the text: decoders show it as exactly one replacement character.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._returned = ""  # the part of the window's text that was returned

    def put(self, token: int) -> str:
        self._window.append(int(token))
        piece = self._take(self._decode().removesuffix(BROKEN))
        if len(self._window) > _WINDOW:
            # Some tokens stay: an unfinished character has at most three, and some decoders treat the first token of a text
            # differently.
            del self._window[:-_CONTEXT]
            self._returned = self._decode().removesuffix(BROKEN)
        return piece

    def end(self) -> str:
        """The text held back. The stream is empty afterwards."""
        piece = self._take(self._decode())
        self._window, self._returned = [], ""
        return piece

    def _take(self, text: str) -> str:
        if self._returned.startswith(text):  # nothing new
            return ""
        # Some decoders change text once the next token is known ("a ." to "a."). What was returned stays; the rest is new.
        common = len(os.path.commonprefix([text, self._returned]))
        self._returned = text
        return text[common:]

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip_special_tokens)


class StopStrings:
    """Finds stop strings in each row's generated text, the text of special tokens included.

    A stop string in the prompt, or one that begins there, does not count.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Decoder, rows: int) -> None:
        self._strings = tuple(strings)
        self._keep = max(len(string) for string in strings) - 1
        self._streams = [TextStream(tokenizer, skip_special_tokens=False) for _ in range(rows)]
        self._tails = [""] * rows

    def put(self, row: int, token: int) -> bool:
        """Add a token to a row; True when its text now contains a stop string."""
        text = self._tails[row] + self._streams[row].put(token)
        self._tails[row] = text[max(len(text) - self._keep, 0) :]
        return any(string in text for string in self._strings)


class Cut:
    """Returns text up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def put(self, text: str) -> str:
        """The new part of the text that certainly comes before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        indices = [index for index in (text.find(string) for string in self._strings) if index >= 0]
        if indices:
            self.stopped, self._held = True, ""
            return text[: min(indices)]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `string`."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
