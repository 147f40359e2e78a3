"""Keywords of transformers for: processor."""

from __future__ import annotations

from .keyword import Keyword

PROCESSOR: tuple[Keyword, ...] = ()
