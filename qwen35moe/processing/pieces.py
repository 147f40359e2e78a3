"""`RenderedPrompt`: a prompt as text, with its pieces, so that control tokens and text that spells them stay apart."""

from __future__ import annotations

Pieces = list[tuple[bool, str]]  # (is a control token, text) in order


class RenderedPrompt(str):
    """A prompt that a chat template rendered: a str that carries its pieces, (is a control token, text) in order.

    A tokenizer encodes the control tokens that the template wrote as such, and those that the messages spell as text.
    """

    pieces: Pieces

    def __new__(cls, text: str, pieces: Pieces = ()) -> RenderedPrompt:  # type: ignore[assignment]
        prompt = super().__new__(cls, text)
        prompt.pieces = list(pieces)
        return prompt
