"""VisionConfig: the vision tower's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isqrt, prod
from typing import Any

from . import parameters
from .checks import (
    MAX_LAYERS,
    ConfigError,
    Fixed,
    checked,
    divides,
    field_names,
    limit,
    mapping,
    number,
    one_of,
    shown,
    suggests_names,
    whole,
)
from .foreign import as_dict, to_transformers
from .keys import FIXED_VISION, INERT_VISION, MOE, check_depth, check_keys, family


@suggests_names
@dataclass(kw_only=True)
class VisionConfig(Fixed):
    """The vision tower, with a merger of spatial_merge_size ** 2 patches into one token of out_hidden_size."""

    _prefix = "vision_config."

    model_type: str = MOE + "_vision"
    depth: int = checked(27, whole(high=MAX_LAYERS))
    hidden_size: int = checked(1152, whole())
    hidden_act: str = checked("gelu_pytorch_tanh", one_of("gelu_pytorch_tanh"))
    intermediate_size: int = checked(4304, whole())
    num_heads: int = checked(16, whole())
    in_channels: int = checked(3, whole())
    patch_size: int = checked(16, whole())
    spatial_merge_size: int = checked(2, whole())
    temporal_patch_size: int = checked(2, whole())
    out_hidden_size: int = checked(2048, whole())
    num_position_embeddings: int = checked(2304, whole())
    initializer_range: float = checked(0.02, number())

    def __post_init__(self) -> None:
        self.model_type = family(self.model_type) + "_vision"  # published files have the name of the whole model
        self._check_fields()
        divides(self, "num_heads", "hidden_size")
        if self.head_dim % 4:
            raise ConfigError(
                f"vision hidden_size = {self.hidden_size} over num_heads = {self.num_heads} gives heads of "
                f"{self.head_dim}; the rotation over height and width needs a head width that is a multiple of 4"
            )
        if isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ConfigError(
                f"vision_config.num_position_embeddings = {self.num_position_embeddings} must be a square number: the learned "
                f"positions are a square grid, of which {isqrt(self.num_position_embeddings) ** 2} would fit"
            )
        limit(sum(prod(shape) for _, shape in parameters.vision_tensors(self)))
        self._closed = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def of(cls, config: Any) -> VisionConfig:
        """The tower's configuration of any kind of configuration, as `Config.of`. ConfigError if it has none."""
        if isinstance(config, VisionConfig):
            return config
        values = as_dict(config, "VisionConfig, Config")
        if "num_hidden_layers" in values or "text_config" in values:  # of the decoder, or of a whole model
            values = values.get("vision_config")
        if values is None:
            raise ConfigError("this configuration has no vision_config: it is that of a text model")
        return cls.from_dict(values)

    def to_transformers(self) -> Any:
        """The same configuration as an object of transformers (Qwen3_5MoeVisionConfig, or Qwen3_5VisionConfig)."""
        return to_transformers(self.model_type, self.to_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> VisionConfig:
        """From the `vision_config` object of a file. ConfigError names the key and its value."""
        check_depth(config_dict)
        values = dict(mapping("vision_config", config_dict))
        alias = values.pop("in_chans", None)  # another name of in_channels; some files have both
        if alias is not None and (channels := values.setdefault("in_channels", alias)) != alias:
            raise ConfigError(f"vision_config.in_chans = {shown(alias)} contradicts in_channels = {shown(channels)}")
        return cls(**check_keys("vision_config", values, field_names(cls), FIXED_VISION, INERT_VISION))

    def to_dict(self) -> dict[str, Any]:
        """As `vision_config` of a file."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"deepstack_visual_indexes": []}

    def replace(self, **changes: Any) -> VisionConfig:
        """A changed copy, with all checks."""
        return VisionConfig.from_dict({f.name: getattr(self, f.name) for f in fields(self)} | changes)


