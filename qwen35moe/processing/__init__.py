"""Text, chat messages, images and videos to a model's inputs, and replies back. Extras: [text], [vision], [video]."""

from __future__ import annotations

from .images import ImageProcessor
from .processor import Processor
from .reply import Reply, ToolCall
from .template import ChatTemplate
from .text import Tokenizer
from .video import Video, VideoProcessor

__all__ = ["ChatTemplate", "ImageProcessor", "Processor", "Reply", "Tokenizer", "ToolCall", "Video", "VideoProcessor"]
