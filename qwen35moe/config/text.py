"""TextConfig: the decoder's sizes and switches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from . import parameters
from .checks import (
    MAX_LAYERS,
    ConfigError,
    Fixed,
    FixedDict,
    Unset,
    checked,
    divides,
    dtype_name,
    field_names,
    flag,
    limit,
    mapping,
    names,
    number,
    one_of,
    optional,
    shown,
    suggests_names,
    token_ids,
    whole,
)
from .foreign import to_transformers
from .keys import DENSE, FIXED_TEXT, INERT, MOE, check_depth, check_keys, family
from .rope import RopeParameters, merge_rope, read_rope, updated

LINEAR, FULL = "linear_attention", "full_attention"


ONLY_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {  # those of transformers' two text classes
    MOE: dict(hidden_size=2048, num_hidden_layers=40, num_key_value_heads=2, intermediate_size=None)
    | dict(zip(ONLY_MOE, (256, 8, 512, 512), strict=True)),
    DENSE: dict(hidden_size=4096, num_hidden_layers=32, num_key_value_heads=4, intermediate_size=12288)
    | dict.fromkeys(ONLY_MOE, 0),
}


def _by_family(name: str) -> Any:
    """A default that depends on model_type, which help(TextConfig) shows for both families."""
    return Unset(f"{_FAMILY_DEFAULTS[MOE][name]} (dense: {_FAMILY_DEFAULTS[DENSE][name]})")


@suggests_names
@dataclass(kw_only=True)
class TextConfig(Fixed):
    """The decoder. Defaults are those of transformers' text classes, except max_position_embeddings (262144)."""

    model_type: str = Unset("qwen3_5_moe_text, or qwen3_5_text for num_experts = 0")  # type: ignore[assignment]
    vocab_size: int = checked(248320, whole())
    hidden_size: int = checked(_by_family("hidden_size"), whole())
    num_hidden_layers: int = checked(_by_family("num_hidden_layers"), whole(high=MAX_LAYERS))
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]  # from full_attention_interval when absent
    full_attention_interval: int | None = checked(None, optional(whole()))  # None: the pattern is not periodic
    rms_norm_eps: float = checked(1e-6, number(above=True))
    hidden_act: str = checked("silu", one_of("silu"))

    # gated attention
    num_attention_heads: int = checked(16, whole())
    num_key_value_heads: int = checked(_by_family("num_key_value_heads"), whole())
    head_dim: int = checked(256, whole())
    attention_bias: bool = checked(False, flag)
    attention_dropout: float = checked(0.0, number(high=1.0))
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # see rope.py
    max_position_embeddings: int = checked(262144, whole(high=2**53))

    # gated delta rule
    linear_num_key_heads: int = checked(16, whole())
    linear_num_value_heads: int = checked(32, whole())
    linear_key_head_dim: int = checked(128, whole())
    linear_value_head_dim: int = checked(128, whole())
    linear_conv_kernel_dim: int = checked(4, whole())

    # mixture of experts (num_experts = 0 in a dense model) or dense MLP
    num_experts: int = checked(_by_family("num_experts"), whole(low=0))
    num_experts_per_tok: int = checked(_by_family("num_experts_per_tok"), whole(low=0))
    moe_intermediate_size: int = checked(_by_family("moe_intermediate_size"), whole(low=0))
    shared_expert_intermediate_size: int = checked(_by_family("shared_expert_intermediate_size"), whole(low=0))
    intermediate_size: int = checked(_by_family("intermediate_size"), optional(whole()))  # None in a MoE model
    router_aux_loss_coef: float = checked(0.001, number())
    router_aux_loss_per_layer: bool = checked(False, flag)  # the mean of each layer's loss, not the loss of pooled layers
    output_router_logits: bool = checked(False, flag)

    mtp_num_hidden_layers: int = checked(0, whole(low=0, high=MAX_LAYERS))
    tie_word_embeddings: bool = checked(False, flag)
    initializer_range: float = checked(0.02, number())
    dtype: str | None = checked(None, optional(dtype_name))
    use_cache: bool = checked(True, flag)
    bos_token_id: int | list[int] | None = checked(None, token_ids)
    eos_token_id: int | list[int] | None = checked(None, token_ids)
    pad_token_id: int | list[int] | None = checked(None, token_ids)

    def __post_init__(self) -> None:
        if isinstance(self.model_type, Unset):
            self.model_type = DENSE if self.num_experts == 0 else MOE
        kind = family(self.model_type)
        self.model_type = kind + "_text"
        for name, default in _FAMILY_DEFAULTS[kind].items():
            value = getattr(self, name)
            if isinstance(value, Unset) or (value is None and name in (*ONLY_MOE, "intermediate_size")):
                setattr(self, name, default)
        self._check_fields()
        self._resolve_layers()
        self._rope = read_rope(self.rope_parameters, self.max_position_embeddings)
        self.rope_parameters = FixedDict(self._rope.to_dict())
        self._check_together(kind)
        self._closed = True

    def _resolve_layers(self) -> None:
        """layer_types decides; the interval is kept only if it gives the same layers, so that `replace` can continue it."""
        length, interval = self.num_hidden_layers, self.full_attention_interval
        if self.layer_types is None:
            self.full_attention_interval = interval or 4
            self.layer_types = _pattern(length, self.full_attention_interval)
            return
        types = tuple(names("layer_types", self.layer_types))
        if unknown := sorted(set(types) - {LINEAR, FULL}):
            raise ConfigError(f"layer_types contains {shown(unknown)}; supported are {LINEAR} and {FULL}")
        if len(types) != length:
            raise ConfigError(f"layer_types has {len(types)} entries but num_hidden_layers = {length}")
        guesses = (interval, 4, types.index(FULL) + 1 if FULL in types else None)
        self.full_attention_interval = next((p for p in guesses if p and types == _pattern(length, p)), None)
        self.layer_types = types

    def _check_together(self, kind: str) -> None:
        divides(self, "num_key_value_heads", "num_attention_heads")
        divides(self, "linear_num_key_heads", "linear_num_value_heads")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"head_dim = {self.head_dim} times partial_rotary_factor = {self.rope.partial_rotary_factor} gives "
                f"{self.rotary_dim} rotary dimensions; the rotation needs a positive even number"
            )
        if kind == DENSE:
            if sizes := {name: getattr(self, name) for name in ONLY_MOE if getattr(self, name)}:
                raise ConfigError(f"{shown(sizes)} in a {self.model_type} model, which is dense; MoE is {MOE}_text")
        else:
            if zeros := [name for name in ONLY_MOE if not getattr(self, name)]:
                raise ConfigError(f"{', '.join(zeros)} = 0 in a {self.model_type} model; dense is {DENSE}_text")
            if self.num_experts_per_tok > self.num_experts:
                raise ConfigError(
                    f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}"
                )
        limit(sum(prod(shape) for _, shape in parameters.text_tensors(self)) + self.vocab_size * self.hidden_size)
        limit(sum(prod(shape) for _, shape in parameters.mtp_tensors(self)))

    @property
    def rope(self) -> RopeParameters:
        """rope_parameters, typed."""
        return self._rope

    @property
    def rotary_dim(self) -> int:
        """R, the part of head_dim that is rotated; the rest carries no position."""
        return int(self.head_dim * self._rope.partial_rotary_factor)

    @property
    def is_moe(self) -> bool:
        """Whether the layers have experts; a dense model has one MLP instead."""
        return self.num_experts > 0

    @property
    def key_dim(self) -> int:
        """All key heads of the delta rule side by side, G * K."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """All value heads of the delta rule side by side, H * V."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @classmethod
    def of(cls, config: Any) -> TextConfig:
        """The decoder's configuration of any kind of configuration: a TextConfig or Config, a dict with the contents of
        config.json, or a configuration of transformers. ConfigError for anything else."""
        if isinstance(config, TextConfig):
            return config
        from .model import Config

        return Config.of(config).text_config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], where: str = "text_config") -> TextConfig:
        """From the `text_config` object of a file, or from a flat file's keys. ConfigError names the key and its value."""
        check_depth(config_dict)
        values = mapping(where, config_dict)
        if "torch_dtype" in values:  # the name before transformers 4.56; if both occur dtype counts, as in transformers
            older = values.pop("torch_dtype")
            values["dtype"] = values.get("dtype") or older
        merge_rope(values)
        return cls(**check_keys(where, values, field_names(cls), FIXED_TEXT, INERT))

    def to_dict(self) -> dict[str, Any]:
        """As `text_config` of a file: MoE keys only for a MoE model, and the fixed keys that other programs read."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        values |= {"layer_types": list(self.layer_types), "rope_parameters": self._rope.to_dict()}
        dropped = {name for name in ("intermediate_size", "full_attention_interval", "dtype") if values[name] is None}
        if not self.router_aux_loss_per_layer:
            dropped.add("router_aux_loss_per_layer")  # no key of transformers
        if not self.is_moe:
            unread = {"router_aux_loss_coef": 0.001, "output_router_logits": False}
            dropped |= {*ONLY_MOE} | {name for name, default in unread.items() if values[name] == default}
        always = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_use_dedicated_embeddings": False}
        return {name: value for name, value in values.items() if name not in dropped} | always

    def to_transformers(self) -> Any:
        """The same configuration as an object of transformers (Qwen3_5MoeTextConfig, or dense Qwen3_5TextConfig)."""
        return to_transformers(self.model_type, self.to_dict())

    def replace(self, **changes: Any) -> TextConfig:
        """A changed copy, with all checks.

        layer_types follow: a periodic pattern is continued or shortened to a new num_hidden_layers, any other is
        truncated; a new layer_types sets num_hidden_layers, a new full_attention_interval the pattern. Rotary parameters
        that are not named stay.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        self._replace_rope(changes)
        if "torch_dtype" in changes:
            changes["dtype"] = changes.pop("torch_dtype")
        if family(changes.get("model_type", self.model_type)) != family(self.model_type):
            values |= dict.fromkeys(ONLY_MOE, 0) if self.is_moe else {"intermediate_size": None}
            if self.is_moe and not changes.get("intermediate_size"):
                raise ConfigError("a dense model needs intermediate_size: pass it with model_type")
        if changes.get("layer_types") is not None:
            values["full_attention_interval"] = None
            changes.setdefault("num_hidden_layers", len(names("layer_types", changes["layer_types"])))
        elif "num_hidden_layers" in changes or "full_attention_interval" in changes:
            values["layer_types"] = self._layers_for(changes)
        return TextConfig.from_dict(values | changes)

    def _replace_rope(self, changes: dict[str, Any]) -> None:
        """Merge all names of rotary parameters into changes["rope_parameters"], with the present ones as defaults."""
        objects = [changes.pop(name) for name in ("rope_parameters", "rope_scaling") if name in changes]
        objects = [item for item in objects if item is not None]
        if len(objects) == 2:
            raise ConfigError("rope_parameters and rope_scaling are two names of one object: pass one of them")
        single = {name: changes.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in changes}
        if objects or single:
            changes["rope_parameters"] = updated(self._rope, objects[0] if objects else {}) | single

    def _layers_for(self, changes: dict[str, Any]) -> tuple[str, ...] | None:
        """layer_types for a new length or interval; None if the interval determines them."""
        if self.full_attention_interval is not None or changes.get("full_attention_interval") is not None:
            return None
        length = whole(high=MAX_LAYERS)("num_hidden_layers", changes.get("num_hidden_layers", self.num_hidden_layers))
        if length > self.num_hidden_layers:
            raise ConfigError(
                f"num_hidden_layers = {length} is more than the {self.num_hidden_layers} of layer_types, which are not "
                "periodic: pass layer_types, or full_attention_interval"
            )
        return self.layer_types[:length]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> TextConfig:
        """self, as in transformers' text configurations."""
        return self


def _pattern(length: int, interval: int) -> tuple[str, ...]:
    """Every interval-th layer is full attention."""
    return tuple(LINEAR if (index + 1) % interval else FULL for index in range(length))
