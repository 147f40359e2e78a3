"""`Media`: an image or a video with the settings that its message gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Media:
    """kind: "image" or "video". settings: those of its block alone (max_pixels, resized_height, fps, ...)."""

    kind: str
    item: Any
    settings: dict[str, Any] = field(default_factory=dict)
