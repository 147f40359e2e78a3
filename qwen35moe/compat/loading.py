"""Keywords of transformers for: loading."""

from __future__ import annotations

from .keyword import Keyword

LOADING: tuple[Keyword, ...] = ()
