"""`GenerationConfig`: the defaults of `generate`, as a checkpoint's generation_config.json has them.

    model.generation_config.temperature              an attribute, None where it is not set
    model.generation_config["temperature"]           and a dict of those that are set
    model.generate(ids, generation_config=GenerationConfig(do_sample=True, top_p=0.9))

Methods are named as those of transformers' GenerationConfig, whose names the settings have.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen35moe.compat import short
from qwen35moe.files import UnreadableFile, checked_path, file_in, read_object, replacing

FILE = "generation_config.json"
_MAX_BYTES = 2**20  # published ones have 202 bytes

# The settings of transformers' GenerationConfig; `generate` names those that it does not implement when one is set.
FIELDS: tuple[str, ...] = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings"),
    *("do_sample", "num_beams", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "use_mtp"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "encoder_repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "remove_invalid_values"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "token_healing", "guidance_scale", "watermarking_config"),
    *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups"),
    *("constraints", "force_words_ids", "prefill_chunk_size", "transformers_version"),
)
_FROM_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")


class GenerationConfig(dict[str, Any]):
    """Settings of `generate`: a dict of those that are set, whose attributes are all settings (None: not set).

    GenerationConfig(temperature=0.7), or of a dict, which may have keys of its own. A setting that does not exist is a
    TypeError here and an AttributeError on assignment; both suggest the nearest name.
    """

    def __init__(self, settings: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **values: Any) -> None:
        self._from_model_config = bool(values.pop("_from_model_config", False))
        self._derived: dict[str, Any] | None = None  # the values of `from_model_config`
        for name in values:
            if name not in FIELDS:
                raise TypeError(f"GenerationConfig() {_unknown(name)}")
        super().__init__({name: value for name, value in {**dict(settings), **values}.items() if value is not None})

    # ---------------------------------------------------------------------------------------------------- attributes

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in FIELDS:
            return None
        raise AttributeError(f"GenerationConfig {_unknown(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif name not in FIELDS and name not in self:
            raise AttributeError(f"GenerationConfig {_unknown(name)}; an own key is set as config[{name!r}] = ...")
        elif value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        self.pop(name, None)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *FIELDS, *self})

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={short(value)}' for name, value in self.items())})"

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the present settings, as transformers' has one."""
        return hash(json.dumps(self, sort_keys=True, default=str))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuilt, (dict(self), self._from_model_config, self._derived))

    # ------------------------------------------------------------------------------------------------------- methods

    def copy(self) -> GenerationConfig:
        """An independent copy."""
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """All settings, those that are not set as None, and the keys of a file that are no settings."""
        return {**dict.fromkeys(FIELDS), **copy.deepcopy(dict(self))}

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that are set."""
        return copy.deepcopy(dict(self))

    def to_json_string(self, use_diff: bool = True) -> str:
        """As generation_config.json has it."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, settings: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, defaults_only: bool = False,
        allow_custom_entries: bool = False, **values: Any,
    ) -> dict[str, Any]:
        """Sets `settings` (a dict's, any keys), and of the keywords those that are settings; returns the others.

        defaults_only: only those that are not set yet. allow_custom_entries: all keywords.
        """
        unused: dict[str, Any] = {}
        for name, value in dict(settings).items():
            self._put(name, value, defaults_only)
        for name, value in values.items():
            known = name in FIELDS or name in self or allow_custom_entries
            if not known or not self._put(name, value, defaults_only):
                unused[name] = value
        return unused

    def _put(self, name: str, value: Any, defaults_only: bool) -> bool:
        """False where `defaults_only` keeps the value that it has."""
        if defaults_only and self.get(name) is not None:
            return False
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value
        return True

    def validate(self, strict: bool = False) -> None:
        """Nothing: `generate` checks every setting with the call's."""

    @property
    def changed(self) -> bool:
        """Whether it has anything but the values of `from_model_config`: then it is written with the model."""
        return self._derived is None or self._derived != dict(self)

    def refresh(self, config: Any) -> None:
        """Follows a model configuration that has changed, as long as nothing was set here."""
        if not self.changed:
            self.clear()
            super().update(GenerationConfig.from_model_config(config))
            self._derived = dict(self)

    # ------------------------------------------------------------------------------------------- files, other objects

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **values: Any) -> GenerationConfig:
        """Of a dict, with changes."""
        return cls({**settings, **values})

    @classmethod
    def from_model_config(cls, config: Any) -> GenerationConfig:
        """The token ids of a model's configuration, of its text part before the whole."""
        parts = (getattr(config, "text_config", None), config)
        values: dict[str, Any] = {}
        for name in _FROM_CONFIG:
            present = (value for part in parts if (value := getattr(part, name, None)) is not None)
            values[name] = next(present, None)
        made = cls(values, _from_model_config=True)
        made._derived = dict(made)
        return made

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], config_file_name: str = FILE) -> GenerationConfig:
        """Of a folder's generation_config.json, or of such a file. ValueError if it cannot be read."""
        file = Path(checked_path(path)).expanduser()
        try:
            if file.is_dir():
                file = file_in(file, config_file_name)
            settings = read_object(file, _MAX_BYTES)
        except UnreadableFile as error:
            why = str(error) or error.kind
            if error.kind == "not a JSON object":
                raise ValueError(f"{file} is not a JSON object") from None
            raise ValueError(f"{file} is not a readable generation_config.json: {why}") from None
        return cls(settings)

    def save_pretrained(self, path: str | os.PathLike[str], config_file_name: str = FILE) -> None:
        """Writes generation_config.json into a folder, which is made if need be."""
        folder = Path(checked_path(path)).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / config_file_name) as partial:
            partial.write_text(self.to_json_string(), encoding="utf-8")

    @classmethod
    def of(cls, settings: Any) -> GenerationConfig:
        """Of a dict, a transformers GenerationConfig, or itself; ValueError for anything else."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            to_dict = getattr(settings, "to_dict", None)
            if not callable(to_dict):
                raise ValueError(
                    f"generation_config is a GenerationConfig, transformers' or a dict, got {type(settings).__name__}"
                )
            settings = to_dict()
        return cls(dict(settings))


def _rebuilt(settings: dict[str, Any], from_model_config: bool, derived: dict[str, Any] | None) -> GenerationConfig:
    made = GenerationConfig(settings, _from_model_config=from_model_config)
    made._derived = derived
    return made


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return f"has no setting {short(name)}" + (f": did you mean {near[0]!r}?" if near else "")
