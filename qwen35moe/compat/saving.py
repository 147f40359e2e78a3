"""Keywords of transformers for: saving."""

from __future__ import annotations

from .keyword import Keyword

SAVING: tuple[Keyword, ...] = ()
