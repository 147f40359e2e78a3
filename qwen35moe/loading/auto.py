# pyright: strict
"""transformers' Auto classes: the class of a checkpoint, chosen by its config.json by the same rules.

    AutoModelForCausalLM            the text model, also of a multimodal checkpoint
    AutoModelForImageTextToText     the multimodal model (AutoModelForMultimodalLM is the same)
    AutoModel                       the same two without their heads
    AutoTokenizer, AutoProcessor    with transformers' defaults for a call: lists unless return_tensors="pt", no padding
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qwen35moe.config import Config, ConfigError

from .load import class_for, locate

if TYPE_CHECKING:
    from qwen35moe.models.base import PretrainedModel
    from qwen35moe.models.text import Qwen3_5MoeForCausalLM
    from qwen35moe.models.vision_language import Qwen3_5MoeForConditionalGeneration
    from qwen35moe.processing.processor import Processor
    from qwen35moe.processing.text import Tokenizer

Path = str | os.PathLike[str]


class _Auto:
    """Base of the Auto classes, which have no objects."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        name = type(self).__name__
        methods = ", ".join(f"{name}.{method}(...)" for method in ("from_pretrained", "from_config") if hasattr(self, method))
        raise TypeError(f"{name} is not made itself: call {methods}")


def _config_of(path: Path, keywords: dict[str, Any]) -> Config:
    """The configuration that decides about the class, without fetching weights."""
    from qwen35moe.models.pretrained import read_loading

    if keywords.get("config") is not None:
        return Config.of(keywords["config"])
    read, _ = read_loading("from_pretrained", {"path": path}, dict(keywords))  # the spellings of transformers, checked
    return Config.from_pretrained(locate(path, read.get("revision"), read)[0])


class AutoConfig(_Auto):
    """The configuration of a checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path, **keywords: Any) -> Config:
        """From a folder, a name on the Hub or "tiny"; only config.json is fetched. keywords: those of the Hub (revision,
        token, cache_dir, ...), fields to change (num_hidden_layers=8), and return_unused_kwargs=False."""
        from qwen35moe.models.pretrained import read_loading

        if keywords.pop("return_unused_kwargs", False):
            raise ValueError("return_unused_kwargs=True is not supported: an unknown keyword is an error")
        config = _config_of(pretrained_model_name_or_path, keywords)
        _, fields = read_loading("from_pretrained", {}, keywords)
        config = config.replace(**fields)
        config._name_or_path = os.fspath(pretrained_model_name_or_path)  # pyright: ignore[reportPrivateUsage]
        return config

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> Config:
        """The default configuration of a model_type ("qwen3_5_moe_text", ...) with other fields."""
        return Config.from_dict({"model_type": model_type} | fields)


class AutoModelForCausalLM(_Auto):
    """The model of text with its head: Qwen3_5MoeForCausalLM, or Qwen3_5ForCausalLM of a dense checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path, **keywords: Any) -> Qwen3_5MoeForCausalLM:
        """The arguments are those of `Qwen3_5MoeForCausalLM.from_pretrained`."""
        config = _config_of(pretrained_model_name_or_path, keywords)
        return class_for(config, "ForCausalLM").from_pretrained(pretrained_model_name_or_path, **keywords)

    @classmethod
    def from_config(cls, config: Any, **keywords: Any) -> Qwen3_5MoeForCausalLM:
        """A new model. The arguments are those of `Qwen3_5MoeForCausalLM.from_config`."""
        return class_for(Config.of(config), "ForCausalLM").from_config(config, **keywords)


class AutoModelForImageTextToText(_Auto):
    """The multimodal model: Qwen3_5MoeForConditionalGeneration, or Qwen3_5ForConditionalGeneration of a dense checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path, **keywords: Any) -> Qwen3_5MoeForConditionalGeneration:
        """The arguments are those of `Qwen3_5MoeForCausalLM.from_pretrained`."""
        config = _with_vision(_config_of(pretrained_model_name_or_path, keywords))
        return class_for(config, "ForConditionalGeneration").from_pretrained(pretrained_model_name_or_path, **keywords)

    @classmethod
    def from_config(cls, config: Any, **keywords: Any) -> Qwen3_5MoeForConditionalGeneration:
        """A new model. The arguments are those of `Qwen3_5MoeForCausalLM.from_config`."""
        config = _with_vision(Config.of(config))
        return class_for(config, "ForConditionalGeneration").from_config(config, **keywords)


class AutoModelForMultimodalLM(AutoModelForImageTextToText):
    """The same by another name of transformers."""


class AutoModel(_Auto):
    """The model without its head: Qwen3_5MoeModel, or Qwen3_5MoeTextModel of a text-only checkpoint; dense ones likewise."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path, **keywords: Any) -> PretrainedModel:
        """The arguments are those of `Qwen3_5MoeForCausalLM.from_pretrained`."""
        config = _config_of(pretrained_model_name_or_path, keywords)
        return class_for(config, _body(config)).from_pretrained(pretrained_model_name_or_path, **keywords)

    @classmethod
    def from_config(cls, config: Any, **keywords: Any) -> PretrainedModel:
        """A new model. The arguments are those of `Qwen3_5MoeForCausalLM.from_config`."""
        config = Config.of(config)
        return class_for(config, _body(config)).from_config(config, **keywords)


def _body(config: Config) -> str:
    return "TextModel" if config.vision_config is None else "Model"


def _with_vision(config: Config) -> Config:
    if config.vision_config is None:
        raise ConfigError(f"model_type = {config.model_type} is text only: use AutoModelForCausalLM")
    return config


class AutoTokenizer(_Auto):
    """The tokenizer of a checkpoint, with transformers' defaults for a call."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Path, *, revision: str | None = None, **keywords: Any
    ) -> Tokenizer:
        """From a folder, a name on the Hub or "tiny"; no weights are fetched. keywords: those of the Hub (token, cache_dir,
        ...) and of `Tokenizer.from_pretrained`."""
        from qwen35moe.processing.text import TRANSFORMERS, Tokenizer

        folder = locate(pretrained_model_name_or_path, revision, keywords)[0]
        return Tokenizer.from_pretrained(folder, defaults=TRANSFORMERS, **keywords)


class AutoProcessor(_Auto):
    """The processor of a multimodal checkpoint, with transformers' defaults for a call."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Path, *, revision: str | None = None, **keywords: Any
    ) -> Processor:
        """From a folder, a name on the Hub or "tiny"; no weights are fetched. keywords: those of the Hub (token, cache_dir,
        ...) and of `Processor.from_pretrained`."""
        from qwen35moe.processing.processor import Processor
        from qwen35moe.processing.text import TRANSFORMERS

        folder = locate(pretrained_model_name_or_path, revision, keywords)[0]
        return Processor.from_pretrained(folder, defaults=TRANSFORMERS, **keywords)
