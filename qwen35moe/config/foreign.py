"""Configurations of other kinds as arguments: dicts, and the objects of transformers; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checks import ConfigError, kind, shown
from .keys import DENSE, MOE

_CLASSES = {
    MOE: "Qwen3_5MoeConfig", MOE + "_text": "Qwen3_5MoeTextConfig", MOE + "_vision": "Qwen3_5MoeVisionConfig",
    DENSE: "Qwen3_5Config", DENSE + "_text": "Qwen3_5TextConfig", DENSE + "_vision": "Qwen3_5VisionConfig",
}  # fmt: skip


def as_dict(value: Any, wanted: str) -> Mapping[str, Any]:
    """The contents of config.json of a dict or of a configuration of transformers."""
    if isinstance(value, Mapping):
        return value
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict) and hasattr(value, "model_type") and not isinstance(value, type):
        content = to_dict()
        if isinstance(content, Mapping):
            return content
    if isinstance(value, type):
        raise ConfigError(f"{value.__name__} is a class: pass a configuration, such as {value.__name__}()")
    is_path = isinstance(value, str) or hasattr(value, "__fspath__")
    hint = ": read the file with Config.from_pretrained(folder)" if is_path else ""
    raise ConfigError(
        f"{shown(value)} is no configuration but {kind(value)}{hint}. Accepted are {wanted}, a dict with the contents of "
        "config.json, and the configurations of transformers"
    )


def to_transformers(model_type: str, values: Mapping[str, Any]) -> Any:
    """The object of transformers with these values. ModuleNotFoundError without transformers."""
    import transformers

    if not hasattr(transformers, name := _CLASSES[model_type]):
        raise ConfigError(f"transformers {transformers.__version__} has no {name}: install transformers 5.2 or later")
    return getattr(transformers, name)(**values)
