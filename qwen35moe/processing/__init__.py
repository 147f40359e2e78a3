"""Text, and later images and video, to and from what the model takes. Needs the extras [text], [vision], [video]."""

from __future__ import annotations

from .text import Tokenizer

__all__ = ["Tokenizer"]
