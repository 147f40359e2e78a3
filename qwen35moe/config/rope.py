"""Rotary position parameters of a configuration: `rope_parameters`, its aliases, and their meaning.

Sources: transformers' rotary configuration (rope_type "default" and "yarn"), Peng et al. 2023 (YaRN), Qwen3-VL
(interleaved M-RoPE: the frequencies of one head are assigned to the time, height and width axes in turn).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .checks import ConfigError, flag, kind, mapping, number, one_of, shown, whole
from .keys import check_keys

# The defaults of transformers' text classes. Published files always have rope_theta = 1e7.
DEFAULTS: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": (11, 11, 10),
    "mrope_interleaved": True,
}
YARN = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate")


@dataclass(frozen=True)
class RopeParameters:
    """theta_i = rope_theta ** (-2i / R) for i < R/2, with R = int(head_dim * partial_rotary_factor).

    mrope_section: how many of the R/2 frequencies use the time, height and width axes. The sum may differ from R/2: only
    the height and width entries are read, and frequencies beyond them use time.
    factor ... truncate belong to rope_type "yarn"; attention_factor None means 0.1 ln(factor) + 1.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 0.25
    mrope_section: tuple[int, ...] = (11, 11, 10)
    mrope_interleaved: bool = True
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As in config.json: yarn's keys only for yarn, and only those that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.rope_type != "yarn":
            values = {key: value for key, value in values.items() if key not in YARN}
        values["mrope_section"] = list(self.mrope_section)
        return {key: value for key, value in values.items() if value is not None}


def sections(name: str, value: Any) -> tuple[int, ...]:
    """Three counts of frequencies, for time, height and width."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} = {shown(value)} must be a list of three whole numbers, not {kind(value)}")
    if len(value) != 3:
        raise ConfigError(f"{name} = {shown(value)} has {len(value)} entries; there are 3 axes (time, height, width)")
    return tuple(whole(low=0)(f"{name}[{i}]", item) for i, item in enumerate(value))


_CHECKS = {
    "rope_type": one_of("default", "yarn"),
    "rope_theta": number(above=True),
    "partial_rotary_factor": number(high=1.0, above=True),
    "mrope_section": sections,
    "mrope_interleaved": one_of(True),
    "factor": number(low=1.0),
    "original_max_position_embeddings": whole(high=2**53),
    "attention_factor": number(above=True),
    "beta_fast": number(above=True),
    "beta_slow": number(above=True),
    "mscale": number(),
    "mscale_all_dim": number(),
    "truncate": flag,
}


def read_rope(parameters: Any, max_position_embeddings: int) -> RopeParameters:
    """`rope_parameters` of a file (or None), checked, with defaults filled in.

    Keys of yarn with rope_type "default" are an error: ignoring a factor would change the mathematics.
    """
    where = "rope_parameters"
    if isinstance(parameters, RopeParameters):
        parameters = parameters.to_dict()
    values = DEFAULTS | _renamed(where, parameters)
    values = {key: _CHECKS[key](f"{where}.{key}", value) for key, value in values.items()}
    if values["rope_type"] == "yarn":
        if "factor" not in values:
            raise ConfigError(f'{where}: rope_type "yarn" needs factor, the new context length over the trained one')
        if values["rope_theta"] <= 1:
            raise ConfigError(f'{where}: rope_type "yarn" needs rope_theta above 1, not {values["rope_theta"]}')
        values.setdefault("original_max_position_embeddings", max_position_embeddings)
        fast, slow = values.get("beta_fast", 32.0), values.get("beta_slow", 1.0)
        if fast < slow:
            raise ConfigError(f"{where}: beta_fast = {fast} must not be below beta_slow = {slow}")
    elif unused := [key for key in YARN if key in values]:
        listed = ", ".join(f"{key} = {shown(values[key])}" for key in unused)
        raise ConfigError(f'{where}: {listed} would have no effect with rope_type "default": set rope_type "yarn"')
    return RopeParameters(**values)


def merge_rope(values: dict[str, Any]) -> None:
    """Fold `rope_scaling` and flat `rope_theta` / `partial_rotary_factor` into values["rope_parameters"], in place.

    rope_scaling is the older name of rope_parameters. If both occur, rope_scaling may add keys and set the type; any other
    key in both must agree, and so must the flat keys. Two different values are an error that names both.
    """
    parameters = values.pop("rope_parameters", None)
    if isinstance(parameters, RopeParameters):
        parameters = parameters.to_dict()
    merged = _renamed("rope_parameters", parameters)
    scaling = _renamed("rope_scaling", values.pop("rope_scaling", None))
    flat = {key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in values}
    for where, addition in (("rope_scaling", scaling), ("the flat key", flat)):
        for key, value in addition.items():
            if value is None:
                continue
            if key in merged and merged[key] != value and not (where == "rope_scaling" and key == "rope_type"):
                raise ConfigError(
                    f"{key} is {shown(value)} as {where} but {shown(merged[key])} in rope_parameters: keep one of them"
                )
            merged[key] = value
    if merged:
        values["rope_parameters"] = merged


def updated(present: RopeParameters, changes: Any) -> dict[str, Any]:
    """The effect of `replace(rope_parameters=...)`: other keys stay, but a change from yarn drops yarn's keys."""
    new = _renamed("rope_parameters", changes.to_dict() if isinstance(changes, RopeParameters) else changes)
    base = present.to_dict()
    if new.get("rope_type", present.rope_type) != "yarn":
        base = {key: value for key, value in base.items() if key not in YARN}
    return base | new


def _renamed(where: str, rope: Any) -> dict[str, Any]:
    """The keys of one rope object by their present names, without nulls; unknown keys are an error."""
    if rope is None:
        return {}
    rope = mapping(where, rope)
    if "type" in rope:  # the name before transformers 4.43
        old = rope.pop("type")
        if old is not None and rope.setdefault("rope_type", old) != old:
            raise ConfigError(f"{where}: type = {shown(old)} contradicts rope_type = {shown(rope['rope_type'])}")
    kept = check_keys(where, rope, _CHECKS, {}, {})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items() if value is not None}
