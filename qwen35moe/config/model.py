"""Config: a whole model, text and optionally vision, and its conversion from and to config.json."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from qwen35moe.compat import short
from qwen35moe.files import replacing

from . import parameters
from .checks import (
    RUNTIME,
    ConfigError,
    Fixed,
    Unset,
    checked,
    field_names,
    flag,
    mapping,
    names,
    optional,
    shown,
    suggests_names,
    whole,
)
from .foreign import as_dict, to_transformers
from .keys import MOE, check_depth, family, unknown_message
from .presets import PRESETS, canonical
from .reading import TEXT_KEYS, read_flat, read_json, read_nested
from .text import TextConfig
from .text_fields import TextFields
from .vision import VisionConfig

_FROM_TEXT: Any = Unset("as text_config")
_BY_CONFIG: Any = Unset("the class for this configuration")


@suggests_names
@dataclass(kw_only=True)
class Config(TextFields, Fixed):
    """A whole model. Without vision_config it is text only, and its file is flat (model_type ends with _text).

    The decoder's fields can also be read here: config.hidden_size is config.text_config.hidden_size.
    """

    text_config: TextConfig
    vision_config: VisionConfig | None = None
    model_type: str = _FROM_TEXT
    architectures: list[str] = checked(_BY_CONFIG, names)
    image_token_id: int = checked(248056, whole(low=-1))
    video_token_id: int = checked(248057, whole(low=-1))
    vision_start_token_id: int = checked(248053, whole(low=-1))
    vision_end_token_id: int = checked(248054, whole(low=-1))
    # In the nested form this value decides for the multimodal class (absent: false), and text_config's value for the
    # text-only class. In the flat form there is one value.
    tie_word_embeddings: bool = checked(_FROM_TEXT, flag)
    quantization_config: dict[str, Any] | None = checked(None, optional(mapping))

    def __post_init__(self) -> None:
        if not isinstance(self.text_config, TextConfig):
            foreign = hasattr(self.text_config, "to_dict")  # of transformers
            self.text_config = TextConfig.of(self.text_config) if foreign else TextConfig.from_dict(self.text_config)
        if self.vision_config is not None and not isinstance(self.vision_config, VisionConfig):
            foreign = hasattr(self.vision_config, "to_dict")
            self.vision_config = VisionConfig.of(self.vision_config) if foreign else VisionConfig.from_dict(self.vision_config)
        kind = family(self.text_config.model_type)
        if isinstance(self.model_type, Unset):
            self.model_type = kind + ("_text" if self.vision_config is None else "")
        if family(self.model_type) != kind:
            raise ConfigError(f"model_type = {self.model_type} contradicts text_config's {self.text_config.model_type}")
        if self.architectures is None or isinstance(self.architectures, Unset):
            self.architectures = [_architecture(kind, self.vision_config is not None)]
        if isinstance(self.tie_word_embeddings, Unset):
            self.tie_word_embeddings = self.is_flat and self.text_config.tie_word_embeddings
        self._check_fields()
        self.quantization_config = copy.deepcopy(self.quantization_config)
        self._check_together(kind)
        self._closed = True

    def _check_together(self, kind: str) -> None:
        if self.is_flat and self.tie_word_embeddings != self.text_config.tie_word_embeddings:
            raise ConfigError(
                f"tie_word_embeddings = {self.tie_word_embeddings} contradicts text_config's "
                f"{self.text_config.tie_word_embeddings}; a text-only model has one value: set both alike"
            )
        if self.vision_config is None:
            return
        if self.is_flat:
            raise ConfigError(f"model_type = {self.model_type} is text only, but there is a vision_config: remove one of them")
        if family(self.vision_config.model_type) != kind:  # the tower is the same in both families
            self.vision_config = self.vision_config.replace(model_type=kind)
        if self.vision_config.out_hidden_size != self.text_config.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size = {self.vision_config.out_hidden_size} must equal text_config."
                f"hidden_size = {self.text_config.hidden_size}: image features take the place of token embeddings"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if "_closed" not in self.__dict__:
            super().__setattr__(name, value)
        elif name in RUNTIME:
            setattr(self.text_config, name, value)
        elif name == "tie_word_embeddings":  # the two values that the two classes read, see above
            object.__setattr__(self, name, flag(name, value))
            object.__setattr__(self.text_config, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def is_flat(self) -> bool:
        """Text only: the file has no text_config, and tensors are named model.* rather than model.language_model.*"""
        return self.model_type.endswith("_text")

    @classmethod
    def _assignable(cls) -> list[str]:
        return [*RUNTIME, "tie_word_embeddings"]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> TextConfig:
        """text_config. The arguments exist in transformers' method of this name; they have no effect here."""
        return self.text_config

    @classmethod
    def of(cls, config: Any) -> Config:
        """The whole model's configuration of any kind of configuration: a Config or TextConfig, a dict with the contents of
        config.json, or a configuration of transformers. ConfigError for anything else."""
        if isinstance(config, Config):
            return config
        if isinstance(config, TextConfig):
            return cls(text_config=config)
        if isinstance(config, VisionConfig):
            raise ConfigError("this is the configuration of a vision tower: pass that of the whole model")
        return cls.from_dict(as_dict(config, "Config, TextConfig"))

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str]) -> Config:
        """From a folder with config.json, or from that file. Nothing is downloaded, and no code in it is executed."""
        return cls.from_dict(read_json(path))

    @classmethod
    def preset(cls, name: str) -> Config:
        """A published size: `Config.preset("35b-a3b")`; see `Config.presets()`. Full names are accepted too."""
        key = canonical(name) if isinstance(name, str) else name
        if key not in PRESETS:
            near = difflib.get_close_matches(str(key), PRESETS, n=3, cutoff=0.4)
            similar = f"similar are {', '.join(near)}; " if near else ""
            raise ConfigError(f"no preset {shown(name)}; {similar}the presets are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[key])

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """The names of all published sizes."""
        return tuple(PRESETS)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Config:
        """From the contents of a config.json: nested or flat, MoE or dense. ConfigError names the key and its value."""
        check_depth(config_dict)
        values = mapping("the configuration", config_dict)
        read = read_flat if values.get("text_config") is None else read_nested
        return cls(**read(values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, as transformers reads it: flat for a text-only model, otherwise nested."""
        own_names = [name for name in field_names(Config) if name not in ("text_config", "vision_config")]
        own = {name: copy.deepcopy(getattr(self, name)) for name in own_names}
        if self.quantization_config is None:
            del own["quantization_config"]
        if not self.is_flat:
            own["text_config"] = self.text_config.to_dict()
            if self.vision_config is not None:
                own["vision_config"] = self.vision_config.to_dict()
            return own
        for f in fields(self):  # placeholder tokens have no use without vision
            if f.name.endswith("_token_id") and own[f.name] == f.default:
                del own[f.name]
        return self.text_config.to_dict() | own

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes config.json into the folder `path`, which is made if it does not exist. A config.json that describes no model
        of this family stays: ConfigError."""
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"save_pretrained({short(path)}): name a folder")
        if not os.fspath(path):  # Path("") is the current folder
            raise ConfigError("the path of the folder is empty: name a folder for config.json")
        folder = Path(path).expanduser()
        if os.path.lexists(folder / "config.json"):
            try:
                family(read_json(folder / "config.json").get("model_type"))
            except ConfigError as error:
                raise ConfigError(f"{folder / 'config.json'} is not replaced: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.json") as new:
            new.write_text(self.to_json_string(), encoding="utf-8")

    def replace(self, **changes: Any) -> Config:
        """A changed copy. Keywords are fields of this object, or of text_config by their bare names.

        text_config and vision_config may be objects or dicts of changes. The vision tower's out_hidden_size follows
        hidden_size; tie_word_embeddings is set in both places. TextConfig.replace lists the other dependent fields.
        """
        own = {name: getattr(self, name) for name in field_names(Config)}
        text, vision = changes.pop("text_config", {}), changes.pop("vision_config", {})
        inner = {name: changes[name] for name in changes if name in TEXT_KEYS}
        outer = {name: changes[name] for name in changes if name in own}
        if unknown := [name for name in changes if name not in inner and name not in outer]:
            raise ConfigError(unknown_message("", unknown, changes, [*own, *TEXT_KEYS]))
        if not isinstance(text, TextConfig):
            text = self.text_config.replace(**mapping("text_config", text))
        text = text.replace(**inner) if inner else text
        if isinstance(vision, Mapping):
            if self.vision_config is not None:
                vision = {"out_hidden_size": text.hidden_size} | mapping("vision_config", vision)
                vision = self.vision_config.replace(**vision)
            vision = vision or None
        if self.is_flat:
            own["tie_word_embeddings"] = text.tie_word_embeddings
        own |= {"text_config": text, "vision_config": vision} | outer
        if "model_type" not in outer:
            own["model_type"] = family(text.model_type) + ("_text" if self.is_flat else "")
        kept = family(own["model_type"]) == family(self.model_type) and (vision is None) == (self.vision_config is None)
        if "architectures" not in outer and not kept:
            own["architectures"] = None
        return Config(**own)

    def to_transformers(self) -> Any:
        """The same configuration as an object of transformers: Qwen3_5MoeConfig, or Qwen3_5MoeTextConfig for a text-only
        model; Qwen3_5Config and Qwen3_5TextConfig for dense ones. `Config.of` reads them back."""
        config = self.text_only() if self.vision_config is None else self  # theirs would add a vision tower of its own
        return to_transformers(config.model_type, config.to_dict())

    def text_only(self) -> Config:
        """The decoder alone, in the flat form, with text_config's tie_word_embeddings, as in transformers."""
        if self.is_flat:
            return self
        return Config(text_config=copy.copy(self.text_config), quantization_config=self.quantization_config)

    def num_parameters(self, vision: bool = True, lm_head: bool = True, mtp: bool = False, active: bool = False) -> int:
        """The number of parameters; with `active`, of those that one token uses (k of E routed experts, and all others).

        The output head counts only if it is not tied to the embedding; the MTP head only with `mtp`.
        """
        return parameters.num_parameters(self, vision=vision, lm_head=lm_head, mtp=mtp, active=active)

    def tensor_shapes(
        self, vision: bool = True, lm_head: bool = True, mtp: bool = False, experts: str = "grouped",
        mtp_experts: str = "grouped", fp32_stored_as: str = "F32",
    ) -> Iterator[parameters.TensorShape]:
        """Name, shape and stored dtype of every tensor of a checkpoint.

        experts, mtp_experts: "grouped" (one tensor for all) or "per_expert". Published bf16 repositories store grouped
        experts; their MTP experts are per expert in Qwen3.5 and grouped since 3.6. fp32_stored_as: the stored dtype of
        A_log and of the delta rule's output norm, F32 in Qwen3.5 and BF16 since 3.6.
        """
        return parameters.tensor_shapes(
            self, vision=vision, lm_head=lm_head, mtp=mtp, experts=experts, mtp_experts=mtp_experts,
            fp32_stored_as=fp32_stored_as,
        )


def _architecture(kind: str, vision: bool) -> str:
    return ("Qwen3_5Moe" if kind == MOE else "Qwen3_5") + ("ForConditionalGeneration" if vision else "ForCausalLM")
