"""The table of transformers' keywords, one tuple per method. docs/guide/from_transformers.md is generated from it."""

from .attributes import ATTRIBUTES, Attribute
from .forward import FORWARD
from .generate import GENERATE
from .keyword import Keyword, read_keywords, short, unknown_keyword
from .loading import LOADING
from .processor import PROCESSOR
from .saving import SAVING
from .tokenizer import TOKENIZER

TABLE: dict[str, tuple[Keyword, ...]] = {
    "forward": FORWARD,
    "generate": GENERATE,
    "from_pretrained": LOADING,
    "save_pretrained": SAVING,
    "tokenizer": TOKENIZER,
    "processor": PROCESSOR,
}

__all__ = ["ATTRIBUTES", "TABLE", "Attribute", "Keyword", "read_keywords", "short", "unknown_keyword"]
