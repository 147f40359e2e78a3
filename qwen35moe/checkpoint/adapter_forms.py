"""Converts LoRA adapters on experts between the grouped parameters and one Linear per projection of each expert.

For expert e of a grouped parameter, with scaling s = alpha / r (alpha / sqrt(r) with use_rslora),

    delta W[e] = s B[:, e] A[e]        A [E r, in] -> A[e] [r, in],   B [out, r E] -> B[:, e] [out, r]

and the rows of gate_up_proj are those of gate, then those of up. So grouped -> per expert copies A[e] to both projections and
cuts B; per expert -> grouped keeps the rank where gate and up have the same A, else it puts the two beside each other,

    A = [A_gate; A_up],   B = [[B_gate, 0], [0, B_up]]        of rank 2 r, with alpha doubled so that s stays.

The products B A are the same numbers in both forms; only where the scaling differs between experts is it multiplied into B.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35moe.config import Config
from qwen35moe.files import replacing, write_tensors

from . import names
from .adapters import CONFIG, WEIGHTS, Adapter, Landing, check_adapter, read_adapter
from .problems import CheckpointError, check_choice, shown

FORMS, ORDERS = ("grouped", "per_expert"), ("rank", "expert")
Pair = tuple[Tensor, Tensor]
# Names, dots, `.*`, `\d+`, ranges and alternatives; no group is repeated, which could take exponential time.
_SIMPLE = re.compile(r"(?:[\w^$-]|\\?\.|\.\*|\\d\+?|\[[\d-]+\]\+?|[()|]|\(\?:)*")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


def convert_adapter(
    source: str | os.PathLike[str], target: str | os.PathLike[str], config: Config, *, form: str, order: str = "rank",
    write_order: str = "rank",
) -> None:
    """Writes the adapter of the folder `source` to the folder `target`, with its experts in `form`.

    form: "grouped", for `target_parameters` (a model as it is loaded), or "per_expert", for Linears (`model.unfuse_experts()`).
    order, write_order: what varies fastest in the columns of a grouped lora_B that is read and of one that is written: "rank",
        as peft writes it, column = rank * E + expert; or "expert", column = expert * r + rank.

    Tensors that do not belong to experts are copied. CheckpointError if a tensor belongs nowhere.
    """
    check_choice("form", form, FORMS)
    check_choice("order", order, ORDERS)
    check_choice("write_order", write_order, ORDERS)
    adapter = read_adapter(source)
    checked = check_adapter(adapter, config)
    if checked.problems:
        raise CheckpointError(f"{shown(str(source))} does not fit the model:", checked.problems)
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{shown(str(target))} is the adapter that is read: give another folder")
    if adapter.config.get("use_dora") and any(landing.form in ("grouped", "expert") for landing in checked.landings):
        raise CheckpointError("use_dora=True: a magnitude per row of an expert has no grouped form")
    experts, tensors = _read(adapter, checked.landings, order)
    settings = dict(adapter.config)
    if form == "grouped":
        tensors |= _grouped(experts, settings, config, write_order)
    else:
        tensors |= _per_expert(experts, settings)
    _target(settings, checked.landings, experts, form)
    folder = Path(target).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


class Experts:
    """The pairs of one grouped parameter or of the projections that make it, per expert, with their scaling.

    pairs: {(projection, expert): (A [r, in], B [out, r], scaling)}; projection "" for the whole parameter.
    """

    def __init__(self, prefix: str, target: str) -> None:
        self.prefix, self.target = prefix, target
        self.pairs: dict[tuple[str, int], tuple[Tensor, Tensor, float]] = {}

    @property
    def module(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def weight(self) -> str:
        return self.target.rpartition(".")[2]


def scaling_of(settings: Mapping[str, Any], target: str, rank: int) -> float:
    """alpha / r of one target as peft finds it: the first pattern that matches the name, else the value for all."""
    alpha = settings.get("lora_alpha", 8)
    for key, value in patterns_of(settings, "alpha_pattern").items():
        if re.match(rf"(.*\.)?({key})$", target):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise CheckpointError(f"{CONFIG}: lora_alpha = {shown(str(alpha), 60)} must be a number other than 0")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def patterns_of(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """rank_pattern or alpha_pattern. CheckpointError for a regular expression that could take long: the file is untrusted."""
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{CONFIG}: {name} must be an object, not {type(patterns).__name__}")
    for key in patterns:
        try:
            re.compile(key)
        except re.error:
            raise CheckpointError(f"{CONFIG}: {name} {shown(key, 80)} is not a regular expression") from None
        if len(key) > 1000 or _SIMPLE.fullmatch(key) is None or key.count(".*") > 4 or _REPEATED_GROUP.search(key):
            raise CheckpointError(f"{CONFIG}: {name} {shown(key, 80)} is not a plain pattern of module names")
    return patterns


def _read(adapter: Adapter, landings: Iterable[Landing], order: str) -> tuple[dict[str, Experts], dict[str, Tensor]]:
    """The tensors of experts by their grouped parameter, and all others by name."""
    from safetensors import safe_open

    experts: dict[str, Experts] = {}
    others: dict[str, Tensor] = {}
    parts: dict[tuple[str, str, int | None], dict[str, tuple[Landing, Tensor]]] = {}
    with safe_open(next(iter(adapter.tensors.values())).file, framework="pt") as file:
        for landing in landings:
            value = file.get_tensor(landing.tensor.name)
            if names.grouped_experts(landing.target) is not None and landing.form in ("grouped", "swapped", "expert"):
                parts.setdefault((landing.target, landing.projection, landing.expert), {})[landing.kind] = (landing, value)
            else:
                others[landing.tensor.name] = value
    for (target, projection, expert), pair in parts.items():
        landing, a = pair["lora_A"]
        _, b = pair["lora_B"]
        name = landing.tensor.name
        prefix = name[: name.index(target.rpartition(".")[0])]
        group = experts.setdefault(target, Experts(prefix, target))
        if expert is not None:
            scaling = scaling_of(adapter.config, f"{target.rpartition('.')[0]}.{expert}.{projection}", landing.rank)
            group.pairs[projection, expert] = (a, b, scaling)
            continue
        scaling = scaling_of(adapter.config, target, landing.rank)
        for number, (own_a, own_b) in enumerate(split(a, b, a.shape[0] // landing.rank, order)):
            if landing.form == "swapped":  # delta W = (B A)^T
                own_a, own_b = own_b.T, own_a.T
            group.pairs["", number] = (own_a, own_b, scaling)
    return experts, others


def split(a: Tensor, b: Tensor, count: int, order: str) -> list[Pair]:
    """A [E r, in] and B [out, r E] to (A [r, in], B [out, r]) of each expert."""
    rank = a.shape[0] // count
    columns = b.reshape(b.shape[0], rank, count).permute(2, 0, 1) if order == "rank" else (
        b.reshape(b.shape[0], count, rank).permute(1, 0, 2)
    )  # fmt: skip
    return list(zip(a.reshape(count, rank, -1), columns, strict=True))


def join(pairs: Iterable[Pair], order: str) -> Pair:
    """The reverse of `split`."""
    a, b = zip(*pairs, strict=True)
    stacked = torch.stack(b)  # [E, out, r]
    columns = stacked.permute(1, 2, 0) if order == "rank" else stacked.permute(1, 0, 2)
    return torch.cat(a), columns.flatten(1).contiguous()


def _per_expert(experts: Mapping[str, Experts], settings: dict[str, Any]) -> dict[str, Tensor]:
    """One Linear per projection of each expert; gate and up get the same A. Those that are already apart stay as they are."""
    tensors: dict[str, Tensor] = {}
    for group in experts.values():
        for (projection, expert), (a, b, _) in group.pairs.items():
            parts = names.EXPERT_WEIGHTS[group.weight] if projection == "" else (projection,)
            for name, rows in zip(parts, b.chunk(len(parts)), strict=True):
                module = f"{group.prefix}{group.module}.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a.contiguous(), rows.contiguous()
        grouped = group.pairs.get(("", 0))
        if grouped is not None:
            leaves = "|".join(names.EXPERT_WEIGHTS[group.weight])
            _set_rank(settings, rf"{re.escape(group.module)}\.\d+\.(?:{leaves})", grouped[0].shape[0], grouped[2])
    return tensors


def _set_rank(settings: dict[str, Any], pattern: str, rank: int, scaling: float) -> None:
    """Adds patterns for a rank and a scaling that are not those for all. peft takes the first pattern that matches."""
    alpha = scaling * (math.sqrt(rank) if settings.get("use_rslora") else rank)
    ranks, alphas = patterns_of(settings, "rank_pattern"), patterns_of(settings, "alpha_pattern")
    if rank == settings.get("r") and alpha == settings.get("lora_alpha") and not ranks and not alphas:
        return
    if settings.get("use_rslora"):
        raise CheckpointError("use_rslora=True with ranks that differ: peft has no patterns of ranks together with it")
    settings["rank_pattern"], settings["alpha_pattern"] = {pattern: rank} | ranks, {pattern: alpha} | alphas


def _grouped(
    experts: Mapping[str, Experts], settings: dict[str, Any], config: Config, order: str
) -> dict[str, Tensor]:
    """Two matrices per grouped parameter. Its rank is that of the largest expert; missing ones have zeros."""
    tensors: dict[str, Tensor] = {}
    adapted = {group.module for group in experts.values() if group.weight == "down_proj"}
    text = config.text_config
    for target, group in experts.items():
        rows = (2 * text.moe_intermediate_size, text.hidden_size)
        out, inner = rows if group.weight == "gate_up_proj" else (rows[1], rows[0] // 2)
        wholes = [_whole_expert(group, expert, out) for expert in range(text.num_experts)]
        rank = max(a.shape[0] for a, _, _ in filter(None, wholes))
        like = next(iter(group.pairs.values()))[0]
        scaling = next(s for _, _, s in filter(None, wholes))
        pairs = []
        for whole in wholes:
            a, b = like.new_zeros(rank, inner), like.new_zeros(out, rank)
            if whole is not None:
                own_a, own_b, own = whole
                a[: own_a.shape[0]], b[:, : own_b.shape[1]] = own_a, _scaled(own_b, own / scaling)
            pairs.append((a, b))
        _set_rank(settings, re.escape(target), rank, scaling)
        nested = ".base_layer" if group.weight == "gate_up_proj" and group.module in adapted else ""
        a, b = join(pairs, order)
        tensors[f"{group.prefix}{group.module}{nested}.lora_A.weight"] = a
        tensors[f"{group.prefix}{group.module}{nested}.lora_B.weight"] = b
    return tensors


def _whole_expert(group: Experts, expert: int, out: int) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) of one expert's part of the grouped parameter; None without an adapter."""
    if ("", expert) in group.pairs or group.weight == "down_proj":
        return group.pairs.get(("", expert)) or group.pairs.get(("down_proj", expert))
    gate, up = (group.pairs.get((name, expert)) for name in ("gate_proj", "up_proj"))
    if gate is None and up is None:
        return None
    half = out // 2
    if gate is None or up is None:
        a, b, scaling = gate or up  # pyright: ignore[reportGeneralTypeIssues]
        zeros = b.new_zeros(half, b.shape[1])
        return a, torch.cat([b, zeros] if up is None else [zeros, b]), scaling
    (a, b, scaling), (other_a, other_b, other) = gate, up
    other_b = _scaled(other_b, other / scaling)
    if torch.equal(a, other_a):
        return a, torch.cat([b, other_b]), scaling
    return torch.cat([a, other_a]), torch.block_diag(b, other_b), scaling


def _scaled(b: Tensor, factor: float) -> Tensor:
    return b.contiguous() if factor == 1 else (b.double() * factor).to(b.dtype)


def _target(settings: dict[str, Any], landings: Iterable[Landing], experts: Mapping[str, Experts], form: str) -> None:
    """What peft is to wrap: exactly the modules and parameters that have tensors."""
    linear: dict[str, set[str]] = {}
    parameters = []
    for landing in landings:
        if landing.form == "linear":
            name = landing.target.removesuffix(".weight")
            if name.endswith(".mlp.gate"):
                parameters.append(landing.target)
            else:
                _by_layer(linear, name)
        elif landing.form in ("grouped", "swapped") and landing.target not in experts:
            parameters.append(landing.target)
    if form == "grouped":
        parameters += list(experts)
    else:
        for group in experts.values():
            present = {projection for projection, _ in group.pairs}
            leaves = names.EXPERT_WEIGHTS[group.weight] if "" in present else sorted(present)
            for leaf in leaves:
                _by_layer(linear, f"{group.module}.*.{leaf}")
    patterns = []
    for suffix, layers in sorted(linear.items()):
        tail = re.escape(suffix).replace(r"\*", r"\d+")
        patterns.append(rf"layers\.(?:{'|'.join(sorted(layers, key=int))})\.{tail}" if layers else tail)
    settings["target_modules"] = rf"(?:.*\.)?(?:{'|'.join(patterns)})" if patterns else []
    settings["target_parameters"] = list(dict.fromkeys(parameters)) or None
    settings["exclude_modules"] = settings["layers_to_transform"] = settings["layers_pattern"] = None


def _by_layer(linear: dict[str, set[str]], name: str) -> None:
    match = re.match(r"layers\.(\d+)\.(.+)$", name)
    if match is None:
        linear.setdefault(name, set())
    else:
        linear.setdefault(match[2], set()).add(match[1])
