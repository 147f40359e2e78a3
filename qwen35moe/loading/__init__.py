# pyright: strict
"""From a name to a model, its tokenizer and its processor.

load.py       load() and load_processor(): the class that fits the checkpoint
auto.py       AutoModelForCausalLM, AutoTokenizer, ... with transformers' names and rules
pipeline.py   pipeline("text-generation", model=...)
"""

from __future__ import annotations

from .auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from .load import find, load, load_processor
from .pipeline import Pipeline, pipeline

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoProcessor",
    "AutoTokenizer",
    "Pipeline",
    "find",
    "load",
    "load_processor",
    "pipeline",
]
