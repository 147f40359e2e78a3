"""Selected layers, experts and parts of a checkpoint, and the names of their tensors in the smaller model.

    layers=[2, 3, 5]        layers.5.linear_attn.A_log            ->  layers.2.linear_attn.A_log
    experts=[7, 1]          layers.5.mlp.experts.1.up_proj.weight ->  layers.2.mlp.experts.1.up_proj.weight
                            rows 7 and 1 of layers.5.mlp.gate.weight [E, D] and of grouped expert tensors [E, ...]
    parts={"text"}          no tensor of visual.* and mtp.*

Numbers are those of the checkpoint. Layers keep their order, experts the order of the argument.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen35moe.config import Config

from . import names

PARTS = {"text": ("text", "head"), "vision": ("visual",), "mtp": ("mtp",)}  # the argument -> names.part_of
MTP = "mtp"  # the key of the MTP head's experts, beside layer numbers
_LAYER = re.compile(r"^layers\.(\d{1,9})\.(.*)$", re.DOTALL)
_EXPERT = re.compile(r"^(.*\.experts\.)(0|[1-9]\d{0,8})(\..*)$", re.DOTALL)
_ROUTED = re.compile(r"^(?:mtp\.layers\.\d{1,9}|layers\.(?P<layer>\d{1,9}))\.mlp\.(?:gate\.weight|experts\..*)$", re.DOTALL)

Experts = Iterable[int] | Mapping[Any, Iterable[int]]


@dataclass(frozen=True)
class Selection:
    """The selected layers, experts and parts; None selects all. total: the checkpoint's number of experts."""

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | dict[int | str, tuple[int, ...]] | None = None
    parts: frozenset[str] | None = None
    total: int = 0

    @classmethod
    def of(cls, layers: Iterable[int] | None, experts: Experts | None, parts: Iterable[str] | None) -> Selection:
        """From the arguments of from_pretrained, with the checks that need no configuration."""
        numbers = None if layers is None else tuple(sorted(_numbers("layers", layers)))
        ids: Any = None
        if isinstance(experts, Mapping):
            ids = {key if key == MTP else _number("a layer of experts", key): _numbers(f"experts[{key!r}]", value)
                   for key, value in experts.items()}  # fmt: skip
            counts = sorted({len(layer_ids) for layer_ids in ids.values()})
            if len(counts) != 1:
                raise ValueError(f"experts= names {counts or 'no'} experts: the number must be the same in every layer")
        elif experts is not None:
            ids = _numbers("experts", experts)
        return cls(numbers, ids, None if parts is None else _parts(parts))

    @property
    def is_everything(self) -> bool:
        return self.layers is None and self.experts is None and self.parts is None

    def checked(self, config: Config) -> Selection:
        """Check against the checkpoint's configuration: every number exists, every selected layer has its experts."""
        text = config.text_config
        for layer in self.layers or ():
            if not 0 <= layer < text.num_hidden_layers:
                raise ValueError(f"layers= names layer {layer}; the checkpoint has layers 0 ... {text.num_hidden_layers - 1}")
        if self.experts is None:
            return self
        if not text.is_moe:
            raise ValueError("experts= needs a mixture of experts, and this checkpoint is dense: omit experts=")
        by_name = {"experts=": self.experts} if isinstance(self.experts, tuple) else self._by_layer(text.num_hidden_layers)
        for where, ids in by_name.items():
            for expert in ids:
                if not 0 <= expert < text.num_experts:
                    raise ValueError(f"{where} names expert {expert}; the checkpoint has experts 0 ... {text.num_experts - 1}")
            if len(ids) < text.num_experts_per_tok:
                raise ValueError(
                    f"{where} names {len(ids)} experts; a token uses num_experts_per_tok = {text.num_experts_per_tok}: "
                    "name at least as many, or pass a config= with a smaller number"
                )
        return replace(self, total=text.num_experts)

    def _by_layer(self, layers: int) -> dict[str, tuple[int, ...]]:
        assert isinstance(self.experts, dict)
        selected = set(range(layers) if self.layers is None else self.layers)
        with_ids = self.experts.keys() - {MTP}
        if missing := sorted(selected - with_ids):
            raise ValueError(f"experts= has no ids for the layers {missing}: give ids for every layer, or one list for all")
        if beyond := sorted(with_ids - selected, key=str):
            raise ValueError(f"experts= has ids for the layers {beyond}, which are not loaded: remove them")
        return {f"experts[{key!r}]": ids for key, ids in self.experts.items()}

    def of_config(self, config: Config) -> Config:
        """The configuration of the smaller model."""
        changes: dict[str, Any] = {}
        if self.layers is not None:
            changes["layer_types"] = [config.text_config.layer_types[layer] for layer in self.layers]
        if self.experts is not None:
            ids = self.experts if isinstance(self.experts, tuple) else next(iter(self.experts.values()))
            changes["num_experts"] = len(ids)
        return config.replace(**changes) if changes else config

    def place(self, name: str) -> str | None:
        """The canonical name in the smaller model of a canonical name on disk; None if it is not selected."""
        if self.parts is not None and not any(names.part_of(name) in PARTS[part] for part in self.parts):
            return None
        ids = self._experts_of(name)
        if ids is not None and (match := _EXPERT.match(name)):
            if int(match[2]) not in ids:
                return None
            name = f"{match[1]}{ids.index(int(match[2]))}{match[3]}"
        if self.layers is not None and (match := _LAYER.match(name)):
            layer = int(match[1])
            return f"layers.{self.layers.index(layer)}.{match[2]}" if layer in self.layers else None
        return name

    def needs(self, stored_name: str) -> bool:
        """Whether a tensor on disk may be needed; an unknown name counts as needed, so that it is reported."""
        name = names.canonical(stored_name)
        return name is None or self.place(name) is not None

    def rows(self, placed_name: str) -> tuple[int, ...] | None:
        """The selected rows of the stored tensor [E, ...] of the model's parameter of this name; None means all."""
        return self._experts_of(self._layer_on_disk(placed_name))

    def on_disk(self, placed_name: str) -> str:
        """The inverse of `place`."""
        name = self._layer_on_disk(placed_name)
        ids, match = self._experts_of(name), _EXPERT.match(name)
        return name if not ids or not match else f"{match[1]}{ids[int(match[2])]}{match[3]}"

    def _layer_on_disk(self, name: str) -> str:
        match = None if self.layers is None else _LAYER.match(name)
        return name if self.layers is None or match is None else f"layers.{self.layers[int(match[1])]}.{match[2]}"

    def _experts_of(self, name: str) -> tuple[int, ...] | None:
        """The ids for a router or expert tensor, by its name on disk."""
        if self.experts is None or (match := _ROUTED.match(name)) is None:
            return None
        if isinstance(self.experts, tuple):
            return self.experts
        return self.experts.get(MTP if match["layer"] is None else int(match["layer"]), ())


def runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """[3, 4, 5, 1] as the ranges (3, 6), (1, 2)."""
    ranges: list[tuple[int, int]] = []
    for number in ids:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


def _number(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, not {value!r}") from None


def _numbers(what: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{what}={values!r} must be a list of numbers, such as range(4)")
    numbers = tuple(_number(f"each of {what}", value) for value in values)
    if not numbers:
        raise ValueError(f"{what}= is empty: name at least one")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{what}= names {next(n for n in numbers if numbers.count(n) > 1)} twice")
    return numbers


def _parts(parts: Any) -> frozenset[str]:
    selected = [parts] if isinstance(parts, str) else list(parts)
    if not selected or any(part not in PARTS for part in selected):
        raise ValueError(f"parts={parts!r} must be a set of one or more of {', '.join(map(repr, PARTS))}")
    return frozenset(selected)
