"""A part of a checkpoint: some layers, some experts, some parts; and how their tensors are called in the smaller model.

    layers=[2, 3, 5]        layers.5.linear_attn.A_log            ->  layers.2.linear_attn.A_log
    experts=[7, 1]          layers.5.mlp.experts.1.up_proj.weight ->  layers.2.mlp.experts.1.up_proj.weight
                            rows 7 and 1 of layers.5.mlp.gate.weight [E, D] and of grouped expert tensors [E, ...]
    parts={"text"}          nothing of visual.* and mtp.*

Numbers are those of the checkpoint. Layers keep their order, experts the order in which they are given.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen35moe.config import Config

from . import names

PARTS = {"text": ("text", "head"), "vision": ("visual",), "mtp": ("mtp",)}  # as asked for -> as names.part_of says
MTP = "mtp"  # the key of the MTP head's experts, beside layer numbers
_LAYER = re.compile(r"^layers\.(\d{1,9})\.(.*)$", re.DOTALL)
_EXPERT = re.compile(r"^(.*\.experts\.)(0|[1-9]\d{0,8})(\..*)$", re.DOTALL)
_ROUTED = re.compile(r"^(?:mtp\.layers\.\d{1,9}|layers\.(?P<layer>\d{1,9}))\.mlp\.(?:gate\.weight|experts\..*)$", re.DOTALL)

Experts = Iterable[int] | Mapping[Any, Iterable[int]]


@dataclass(frozen=True)
class Selection:
    """What is asked for; None stands for all. `total` is the checkpoint's number of experts, known from its config."""

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | dict[int | str, tuple[int, ...]] | None = None
    parts: frozenset[str] | None = None
    total: int = 0

    @classmethod
    def of(cls, layers: Iterable[int] | None, experts: Experts | None, parts: Iterable[str] | None) -> Selection:
        """From the arguments of from_pretrained, as far as they can be checked without a configuration."""
        chosen = None if layers is None else tuple(sorted(_numbers("layers", layers)))
        ids: Any = None
        if isinstance(experts, Mapping):
            ids = {key if key == MTP else _number("a layer of experts", key): _numbers(f"experts[{key!r}]", value)
                   for key, value in experts.items()}  # fmt: skip
            counts = sorted({len(each) for each in ids.values()})
            if len(counts) != 1:
                raise ValueError(f"experts= names {counts or 'no'} experts: the number must be the same in every layer")
        elif experts is not None:
            ids = _numbers("experts", experts)
        return cls(chosen, ids, None if parts is None else _parts(parts))

    @property
    def is_everything(self) -> bool:
        return self.layers is None and self.experts is None and self.parts is None

    def checked(self, config: Config) -> Selection:
        """Against the checkpoint's configuration: every number exists, every chosen layer has its experts."""
        text = config.text_config
        for layer in self.layers or ():
            if not 0 <= layer < text.num_hidden_layers:
                raise ValueError(f"layers= names layer {layer}; the checkpoint has layers 0 ... {text.num_hidden_layers - 1}")
        if self.experts is None:
            return self
        if not text.is_moe:
            raise ValueError("experts= chooses among experts, and this checkpoint is dense")
        each = {"experts=": self.experts} if isinstance(self.experts, tuple) else self._by_layer(text.num_hidden_layers)
        for where, ids in each.items():
            for expert in ids:
                if not 0 <= expert < text.num_experts:
                    raise ValueError(f"{where} names expert {expert}; the checkpoint has experts 0 ... {text.num_experts - 1}")
            if len(ids) < text.num_experts_per_tok:
                raise ValueError(
                    f"{where} names {len(ids)} experts; a token takes num_experts_per_tok = {text.num_experts_per_tok}: "
                    "name at least as many, or pass config= with a smaller one"
                )
        return replace(self, total=text.num_experts)

    def _by_layer(self, layers: int) -> dict[str, tuple[int, ...]]:
        assert isinstance(self.experts, dict)
        chosen = set(range(layers) if self.layers is None else self.layers)
        given = self.experts.keys() - {MTP}
        if missing := sorted(chosen - given):
            raise ValueError(f"experts= has no ids for the layers {missing}: give them for every layer, or one list for all")
        if beyond := sorted(given - chosen, key=str):
            raise ValueError(f"experts= has ids for {beyond}, which are not among the layers that are loaded")
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
        """The canonical name in the smaller model of a canonical name on disk; None when it is not asked for."""
        if self.parts is not None and not any(names.part_of(name) in PARTS[part] for part in self.parts):
            return None
        ids = self._experts_of(name)
        if ids is not None and (found := _EXPERT.match(name)):
            if int(found[2]) not in ids:
                return None
            name = f"{found[1]}{ids.index(int(found[2]))}{found[3]}"
        if self.layers is not None and (found := _LAYER.match(name)):
            layer = int(found[1])
            return f"layers.{self.layers.index(layer)}.{found[2]}" if layer in self.layers else None
        return name

    def wants(self, stored_name: str) -> bool:
        """Whether a tensor on disk may be needed; what has no name here is looked at, so that it can be refused."""
        name = names.canonical(stored_name)
        return name is None or self.place(name) is not None

    def rows(self, placed_name: str) -> tuple[int, ...] | None:
        """Which rows of the stored tensor [E, ...] make the model's parameter of this name; None: it is taken whole."""
        return self._experts_of(self._layer_on_disk(placed_name))

    def on_disk(self, placed_name: str) -> str:
        """The inverse of `place`."""
        name = self._layer_on_disk(placed_name)
        ids, found = self._experts_of(name), _EXPERT.match(name)
        return name if not ids or not found else f"{found[1]}{ids[int(found[2])]}{found[3]}"

    def _layer_on_disk(self, name: str) -> str:
        found = None if self.layers is None else _LAYER.match(name)
        return name if self.layers is None or found is None else f"layers.{self.layers[int(found[1])]}.{found[2]}"

    def _experts_of(self, name: str) -> tuple[int, ...] | None:
        """The ids for a router or expert tensor, by its name on disk."""
        if self.experts is None or (found := _ROUTED.match(name)) is None:
            return None
        if isinstance(self.experts, tuple):
            return self.experts
        return self.experts.get(MTP if found["layer"] is None else int(found["layer"]), ())


def runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """[3, 4, 5, 1] as the ranges (3, 6), (1, 2)."""
    found: list[tuple[int, int]] = []
    for number in ids:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _number(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} is a whole number, not {value!r}") from None


def _numbers(what: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{what}={values!r}; it is a list of numbers, such as range(4)")
    found = tuple(_number(f"each of {what}", value) for value in values)
    if not found:
        raise ValueError(f"{what}= is empty: name at least one")
    if len(set(found)) < len(found):
        raise ValueError(f"{what}= names {next(n for n in found if found.count(n) > 1)} twice")
    return found


def _parts(parts: Any) -> frozenset[str]:
    given = [parts] if isinstance(parts, str) else list(parts)
    if not given or any(part not in PARTS for part in given):
        raise ValueError(f"parts={parts!r}; it is a set of some of {', '.join(map(repr, PARTS))}")
    return frozenset(given)
