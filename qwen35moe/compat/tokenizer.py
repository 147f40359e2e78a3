"""Keywords of transformers for: tokenizer."""

from __future__ import annotations

from .keyword import Keyword

TOKENIZER: tuple[Keyword, ...] = ()
