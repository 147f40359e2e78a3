"""Defaults of generate(): from generation_config=, then `model.generation_config`, then the model's configuration.

The checkpoint's generation_config.json has all end tokens; the published text configurations name one of two.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..compat import short, unknown_keyword
from ..compat.generate import GENERATE
from ..config import GenerationConfig
from ..config.generation import FIELDS

_TABLE = {keyword.name: keyword for keyword in GENERATE}


def settings_of(model: Any, override: Any = None) -> dict[str, Any]:
    """The settings of generation_config= (`given`) and of the model, in our names; those of `given` come first.

    ValueError for a setting that would change the answer and is not implemented.
    """
    if isinstance(override, Mapping) and not isinstance(override, GenerationConfig):
        for name in override:
            if name not in FIELDS and name not in _TABLE:
                raise TypeError(unknown_keyword("generation_config", name, FIELDS))
    of_model = getattr(model, "generation_config", None)
    way_out = "model.generation_config.pop({0!r}) to generate without it"
    settings = {} if of_model is None else _read(of_model, "the checkpoint's generation_config", way_out, override)
    return settings if override is None else settings | _read(override, "generation_config", "leave it out", None)


def _read(config: Any, source: str, way_out: str, override: Any) -> dict[str, Any]:
    """A config's settings in our names. given: a config that replaces some of them."""
    replaced = {} if override is None else GenerationConfig.of(override)
    settings: dict[str, Any] = {}
    for name, value in GenerationConfig.of(config).items():
        keyword = _TABLE.get(name)
        if value is None or name in replaced:
            continue
        if keyword is None:
            settings[name] = value
        elif keyword.becomes is not None:
            settings[keyword.becomes] = keyword.convert(value) if keyword.convert else value
        elif not keyword.is_neutral(value):
            raise ValueError(
                f"{source} asks for {name}={short(value)}, which is not implemented ({keyword.instead}): "
                + way_out.format(name)
            )
    return settings


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | Tensor | None = None, override: Any = None) -> tuple[int, ...]:
    """The tokens that end a row: the argument, by default the checkpoint's; () for none."""
    if eos_token_id is None:
        eos_token_id = default(model, settings_of(model, override), "eos_token_id")
    return token_ids("eos_token_id", eos_token_id)


def padding_token(model: Any, pad_token_id: int | None, ends: Sequence[int], override: Any = None) -> int | None:
    """The padding token: the argument, else the checkpoint's, else the first end token, as in transformers."""
    if pad_token_id is None:
        pad_token_id = default(model, settings_of(model, override), "pad_token_id")
    if pad_token_id is not None:
        return token_ids("pad_token_id", pad_token_id)[0]
    return ends[0] if ends else None


def default(model: Any, defaults: Mapping[str, Any], name: str) -> Any:
    """A token id from generation_config, else from the config (the text part before the whole)."""
    if defaults.get(name) is not None:
        return defaults[name]
    config = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return None


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One id, several, or none ([] switches the checkpoint's end tokens off)."""
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise ValueError(f"{name} must be a token id or several, got {short(value)}")
        if not -(2**63) <= token < 2**63:
            raise ValueError(f"{name} must hold 64-bit token ids, got {short(token)}")
    if name == "pad_token_id" and len(ids) != 1:
        raise ValueError(f"pad_token_id must be one token id, got {short(value)}")
    return tuple(int(token) for token in ids)
