"""Generation: the loop, streaming, stop strings."""

from __future__ import annotations

from .loop import generate, stream
from .output import GenerateOutput
from .stop import StopStrings, TextStream
from .streams import row_seed
from .text import stream_text

__all__ = ["GenerateOutput", "StopStrings", "TextStream", "generate", "row_seed", "stream", "stream_text"]
