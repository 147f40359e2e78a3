"""From a config.json to the arguments of Config: nested files (text_config, vision_config) and flat ones (text only)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35moe.files import UnreadableFile, file_in, read_object

from .checks import ConfigError, field_names, mapping, shown
from .keys import DENSE, FIXED_TEXT, INERT_TOP, MOE, check_keys, family
from .text import TextConfig
from .vision import VisionConfig

MAX_FILE_BYTES = 16 * 2**20  # the largest published config.json has 27 KB

FLAT_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
TEXT_KEYS = {*field_names(TextConfig), *FIXED_TEXT, "torch_dtype", "rope_scaling", *FLAT_ROPE_KEYS}
TOP_KEYS = ("model_type", "architectures", "image_token_id", "video_token_id", "vision_start_token_id",
            "vision_end_token_id", "tie_word_embeddings", "quantization_config")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a config.json, or in the config.json of a folder. Its size is checked before it is read."""
    file = Path(path).expanduser()
    if not os.fspath(path):  # Path("") is the current folder
        raise ConfigError("the path of the configuration is empty: name a folder with config.json")
    try:
        if file.is_dir():
            file = _config_in(file)
        return read_object(file, MAX_FILE_BYTES)
    except UnreadableFile as error:
        if error.kind in ("unreadable file", "missing file"):
            raise ConfigError(
                f"no configuration at {shown(str(file))}: {error or 'there is no such file'}. Config does not download files: "
                "AutoConfig.from_pretrained does, and Config.preset(name) has the published sizes"
            ) from None
        raise ConfigError(f"{shown(str(file))} is not valid JSON: {shown(str(error), 200)}") from None


def _config_in(folder: Path) -> Path:
    try:
        return file_in(folder, "config.json")
    except UnreadableFile as error:
        if error.kind == "missing file":
            return folder / "config.json"  # reading it says what is missing
        raise ConfigError(f"{shown(str(folder / 'config.json'))}: {error.kind}: {error}") from None


def read_flat(values: dict[str, Any]) -> dict[str, Any]:
    """A text-only file: the keys of the text model and of the whole model side by side."""
    if values.get("vision_config") is not None:
        raise ConfigError("there is a vision_config but no text_config: a model with vision needs both")
    own = {key: values[key] for key in TOP_KEYS if values.get(key) is not None}
    text = {key: value for key, value in values.items() if key not in TOP_KEYS}
    kind = _family_of(own.get("model_type"), text)
    if "tie_word_embeddings" in own:
        text["tie_word_embeddings"] = own["tie_word_embeddings"]
    text.pop("text_config", None)
    text.pop("vision_config", None)
    parsed = TextConfig.from_dict(text | {"model_type": kind}, where="the configuration")
    return own | {"model_type": kind + "_text", "text_config": parsed}


def read_nested(values: dict[str, Any]) -> dict[str, Any]:
    """A file with text_config, and vision_config unless the model is text only."""
    text = mapping("text_config", values.pop("text_config"))
    vision = values.pop("vision_config", None)
    kind = _family_of(values.get("model_type") or text.get("model_type"), text)
    if family(text.get("model_type") or kind) != kind:
        outer, inner = values.get("model_type"), text.get("model_type")
        raise ConfigError(f"model_type = {outer} contradicts text_config.model_type = {inner}")
    # transformers also writes the dtype of the whole model beside text_config, and reads that one
    for name in ("torch_dtype", "dtype"):
        if values.get(name) is not None:
            text["dtype"] = values[name]
        values.pop(name, None)
    _lift_quantization(values, text)
    parsed = TextConfig.from_dict(text | {"model_type": kind})
    _drop_copies(values, parsed)
    own = check_keys("", values, TOP_KEYS, {}, INERT_TOP)
    own = {"tie_word_embeddings": False} | {key: value for key, value in own.items() if value is not None}
    if vision is not None:
        vision = {"out_hidden_size": parsed.hidden_size} | mapping("vision_config", vision)
        own["vision_config"] = VisionConfig.from_dict(vision)
    return own | {"model_type": kind, "text_config": parsed}


def _lift_quantization(values: dict[str, Any], text: dict[str, Any]) -> None:
    """Move quantization_config to the top level: some programs write it into text_config."""
    inner = text.pop("quantization_config", None)
    if inner is None:
        return
    if values.get("quantization_config") not in (None, inner):
        raise ConfigError("quantization_config differs between the top level and text_config; keep one of them")
    values["quantization_config"] = inner


def _drop_copies(values: dict[str, Any], text: TextConfig) -> None:
    """Remove keys of the text model beside text_config: copies for scripts that read them there. A different value is an
    error."""
    for key in [key for key in values if key in TEXT_KEYS and key not in TOP_KEYS and key not in INERT_TOP]:
        value = values.pop(key)
        if value is None:
            continue
        if key in FIXED_TEXT:
            FIXED_TEXT[key](key, value)
            continue
        source = text.rope if key in FLAT_ROPE_KEYS else text
        inside = getattr(source, "rope_parameters" if key == "rope_scaling" else key)
        if (list(inside) if isinstance(inside, tuple) else inside) != value:
            raise ConfigError(
                f"{key} = {shown(value)} beside text_config, but {shown(inside)} in text_config, which is used: "
                "remove the first one"
            )


def _family_of(model_type: Any, text: Mapping[str, Any]) -> str:
    """The family of a model_type, or without one of the MLP that the file describes."""
    if model_type is not None:
        return family(model_type)
    if text.get("num_experts"):
        return MOE
    if text.get("intermediate_size"):
        return DENSE
    raise ConfigError(f"model_type is missing: {MOE}, {MOE}_text, {DENSE} or {DENSE}_text")
