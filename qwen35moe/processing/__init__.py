"""Text, chat messages, images and videos to a model's inputs, and replies back. Extras: [text], [vision], [video]."""

from __future__ import annotations

from .batch import BatchEncoding
from .images import ImageProcessor
from .pieces import RenderedPrompt
from .processor import Processor
from .reply import Reply, ToolCall
from .template import ChatTemplate
from .text import TRANSFORMERS, CallDefaults, Tokenizer
from .video import Video, VideoProcessor

__all__ = [
    "TRANSFORMERS",
    "BatchEncoding",
    "CallDefaults",
    "ChatTemplate",
    "ImageProcessor",
    "Processor",
    "RenderedPrompt",
    "Reply",
    "Tokenizer",
    "ToolCall",
    "Video",
    "VideoProcessor",
]
