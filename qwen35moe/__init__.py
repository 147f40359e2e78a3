# pyright: strict
"""qwen35moe: the Qwen3.5-MoE architecture in PyTorch; every operation is tested against a short definition.

    import qwen35moe
    model, tokenizer = qwen35moe.load("tiny")      # the bundled checkpoint, a folder or a Hub name

Names are resolved when they are first used: `import qwen35moe` alone imports no model code.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that defines it; None if the name is a module.
_HOMES: dict[str, str | None] = {
    "Config": "config",
    "GenerationConfig": "config",
    "TextConfig": "config",
    "VisionConfig": "config",
    "Cache": "cache",
    "Routing": "routing",
    "load": "loading",
    "load_processor": "loading",
    "pipeline": "loading",
    "AutoConfig": "loading",
    "AutoModel": "loading",
    "AutoModelForCausalLM": "loading",
    "AutoModelForImageTextToText": "loading",
    "AutoModelForMultimodalLM": "loading",
    "AutoProcessor": "loading",
    "AutoTokenizer": "loading",
    "Tokenizer": "processing",
    "Processor": "processing",
    "Qwen3_5MoeForCausalLM": "models.text",
    "Qwen3_5MoeTextModel": "models.text",
    "Qwen3_5ForCausalLM": "models.text",
    "Qwen3_5TextModel": "models.text",
    "Qwen3_5MoeVisionModel": "modules.vision",
    "Qwen3_5MoeModel": "models.vision_language",
    "Qwen3_5MoeForConditionalGeneration": "models.vision_language",
    "Qwen3_5Model": "models.vision_language",
    "Qwen3_5ForConditionalGeneration": "models.vision_language",
    "backends": None,
    "taps": None,
}

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoProcessor",
    "AutoTokenizer",
    "Cache",
    "Config",
    "GenerationConfig",
    "Processor",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5Model",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5MoeModel",
    "Qwen3_5MoeTextModel",
    "Qwen3_5MoeVisionModel",
    "Qwen3_5TextModel",
    "Routing",
    "TextConfig",
    "Tokenizer",
    "VisionConfig",
    "__version__",
    "backends",
    "load",
    "load_processor",
    "pipeline",
    "taps",
]

if TYPE_CHECKING:
    from . import backends, taps
    from .cache import Cache
    from .config import Config, GenerationConfig, TextConfig, VisionConfig
    from .loading import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
        load,
        load_processor,
        pipeline,
    )
    from .models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel, Qwen3_5TextModel
    from .models.vision_language import (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Model,
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeModel,
    )
    from .modules.vision import Qwen3_5MoeVisionModel
    from .processing import Processor, Tokenizer
    from .routing import Routing
else:  # hidden from type checkers, for which any misspelt name would be Any

    def __getattr__(name: str) -> Any:
        """Import the module that defines `name` (PEP 562) and store the value in this module."""
        if name not in _HOMES:
            message = importlib.import_module(f"{__name__}.names").unknown_attribute(name, _HOMES)
            raise AttributeError(message, name=name, obj=sys.modules[__name__])
        home = _HOMES[name]
        module = importlib.import_module(f"{__name__}.{home or name}")
        value = getattr(module, name) if home else module
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
