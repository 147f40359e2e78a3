"""Keywords of transformers for: generate."""

from __future__ import annotations

from .keyword import Keyword

GENERATE: tuple[Keyword, ...] = ()
