"""Keywords of transformers for: forward."""

from __future__ import annotations

from .keyword import Keyword

FORWARD: tuple[Keyword, ...] = ()
