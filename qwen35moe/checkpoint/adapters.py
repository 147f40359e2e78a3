"""LoRA adapters as peft saves them: where each tensor belongs in a model.

A folder holds adapter_config.json and adapter_model.safetensors with names such as

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight            [r, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight            [out, r]
    base_model.model.model.layers.3.mlp.experts.7.gate_proj.lora_A.weight     one expert: after `model.unfuse_experts()`
    base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight      [E r, D], of the grouped gate_up_proj [E, 2F, D]
    base_model.model.model.layers.3.mlp.experts.lora_A.weight                 [E r, F], of the grouped down_proj [E, D, F]

Of a grouped parameter [E, out, in], lora_A has the rows of expert 0 first, and lora_B [out, r E] has one column per rank and
expert: in peft's order the expert varies fastest ("rank"), in that of other programs the rank does ("expert"). No shape tells
them apart. Older versions of peft took the axes the other way round: lora_A [E r, out] and lora_B [in, r E] ("swapped"), which
the shapes tell. A parameter that two wrappers of one module adapt has `base_layer` in the name of the inner one.

Adapters are untrusted files: the headers are checked as those of checkpoints, and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35moe.config import Config
from qwen35moe.config.parameters import tensor_shapes

from . import names
from .headers import StoredTensor, locate, read_contents, read_object
from .problems import CheckpointError, Problem, nearest, shown

FLOATS = ("F64", "F32", "BF16", "F16")  # as in dtypes.py, which imports torch
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**22
_LORA = re.compile(
    r"^(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<bias>\.bias)?(?:\.weight)?$"
)
_EXPERT = re.compile(r"^(?P<module>.+\.experts)\.(?P<expert>0|[1-9]\d{0,8})\.(?P<projection>(?:gate|up|down)_proj)$")
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Landing:
    """Where one tensor of an adapter belongs.

    target: the parameter of the model with grouped experts, without wrappers in its name ("layers.3.mlp.experts.down_proj").
    form: "linear", "grouped", "swapped" (grouped, with the axes of older versions of peft), "expert", "whole" (a weight in
    place of the model's) or "tokens" (rows of the embedding). kind: lora_A, lora_B, ...; "" for form "whole" and "tokens".
    """

    tensor: StoredTensor
    target: str
    form: str
    kind: str = ""
    expert: int | None = None
    projection: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Adapter:
    """config: the contents of adapter_config.json; tensors by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Checked:
    """landings: of the tensors that belong somewhere; problems: of those that do not."""

    landings: tuple[Landing, ...]
    problems: tuple[Problem, ...]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The configuration and the header of an adapter; CheckpointError if they are missing or invalid."""
    folder, problems = Path(path).expanduser(), []
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {shown(str(folder))}: give one with {CONFIG} and {WEIGHTS}")
    config = read_object(folder, CONFIG, MAX_CONFIG_BYTES, problems)
    file = locate(folder, WEIGHTS, problems)
    contents = None if file is None else read_contents(file, WEIGHTS, problems)
    if file is None and (folder / "adapter_model.bin").exists():
        problems.append(Problem("pickle", "adapter_model.bin", "pickles can run code: save it as safetensors with peft"))
    if contents is not None and not contents.tensors and not problems:
        problems.append(Problem("no tensors", WEIGHTS))
    if problems or config is None or contents is None:
        raise CheckpointError(f"{shown(str(folder))} is not a valid adapter:", problems)
    if config.get("peft_type") != "LORA":
        kind = shown(str(config.get("peft_type")), 60)
        raise CheckpointError(f"{shown(str(folder))}: peft_type = {kind}; only LORA adapters are checked and converted")
    return Adapter(folder, config, {tensor.name: tensor for tensor in contents.tensors})


def check_adapter(adapter: Adapter, config: Config) -> Checked:
    """Where each tensor belongs in a model of `config`. A tensor that belongs nowhere is a problem, and so is a half pair."""
    shapes = {
        canonical: tensor.shape
        for tensor in tensor_shapes(config, mtp=True)
        if (canonical := names.canonical(tensor.name)) is not None
    }
    if "lm_head.weight" not in shapes:  # tied
        shapes["lm_head.weight"] = shapes["embed_tokens.weight"]
    pairs: dict[str, dict[str, StoredTensor]] = {}
    landings: list[Landing] = []
    problems: list[Problem] = []
    for name, tensor in adapter.tensors.items():
        match = _LORA.match(name)
        if tensor.dtype not in FLOATS:
            problems.append(Problem("wrong dtype", name, f"{tensor.dtype}; weights are {', '.join(FLOATS)}"))
        elif match is None:
            landing = _whole(tensor, shapes)
            if landing is None:
                problems.append(_nowhere(name))
            else:
                landings.append(landing)
        elif match["bias"]:
            problems.append(Problem("not supported", name, "a bias of lora_B (lora_bias=True)"))
        else:
            pairs.setdefault(match["module"], {})[match["kind"]] = tensor
    for module, parts in pairs.items():
        _pair(module, parts, adapter, shapes, landings, problems)
    return Checked(tuple(landings), _with_hints(problems, shapes))


def bare(module: str) -> tuple[str, int]:
    """('layers.3.mlp.experts', 1) for 'base_model.model.model.layers.3.mlp.experts.base_layer'."""
    module, depth = module.removeprefix("base_model."), 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return names.canonical(f"{module}.weight") or "", depth


def _nowhere(name: str) -> Problem:
    return Problem("lands nowhere", name, f"the model has no {shown(_wanted(name), 100)}")


def _wanted(name: str) -> str:
    module = _LORA.match(name)
    return (bare(module["module"])[0] if module else names.canonical(name.removeprefix("base_model."))) or name


def _with_hints(problems: list[Problem], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Problem, ...]:
    """The problems; a tensor that lands nowhere with the most similar name of the model."""
    wanted = {problem.subject: _wanted(problem.subject) for problem in problems if problem.kind == "lands nowhere"}
    near = nearest(wanted.values(), shapes)
    hints = {subject: near[name] for subject, name in wanted.items() if name in near}
    return tuple(
        replace(problem, detail=f"{problem.detail}; the nearest is {hints[problem.subject]}")
        if problem.subject in hints
        else problem
        for problem in problems
    )


def _whole(tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]]) -> Landing | None:
    """A tensor that is no part of LoRA: a module that was trained whole, or single rows of the embedding."""
    name = tensor.name.removeprefix("base_model.")
    if name.endswith(_TOKENS):
        target = names.canonical(name.removesuffix(_TOKENS) + ".weight")
        shape = shapes.get(target or "")
        fits = shape is not None and len(tensor.shape) == 2 and tensor.shape[1] == shape[1] and tensor.shape[0] <= shape[0]
        return Landing(tensor, target or "", "tokens") if fits else None
    target = names.canonical(re.sub(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)(?=\.)", "", name))
    if target is None or target not in shapes:
        return None
    rows_may_differ = target in ("embed_tokens.weight", "lm_head.weight")  # the vocabulary was resized
    same = tensor.shape == shapes[target] or (rows_may_differ and tensor.shape[1:] == shapes[target][1:])
    return Landing(tensor, target, "whole") if same else None


def _pair(
    module: str, parts: dict[str, StoredTensor], adapter: Adapter, shapes: Mapping[str, tuple[int, ...]],
    landings: list[Landing], problems: list[Problem],
) -> None:
    """The two matrices of one module, and its magnitude vector."""
    first, second = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    if first not in parts or second not in parts:
        alone = next(iter(parts.values()))
        problems.append(Problem("half a pair", alone.name, f"the file has {', '.join(sorted(parts))} of this module only"))
        return
    a, b = parts[first].shape, parts[second].shape
    candidates = list(_candidates(module, shapes, adapter.config))
    if not candidates:
        problems.extend(_nowhere(part.name) for part in parts.values())
        return
    fitting = [
        (target, form, more, rank)
        for target, shape, form, more in candidates
        if (rank := _rank(a, b, shape, form, embedding=first == "lora_embedding_A"))
    ]
    if len(fitting) > 1:  # sizes that are equal by chance: as peft nests the wrappers, and as it orders the axes today
        inner, nested = bare(module)[1] > 0, f"{module}.base_layer.lora_A.weight" in adapter.tensors
        usual = "gate_up_proj" if inner else "down_proj" if nested else ""
        fitting = [entry for entry in fitting if entry[0].endswith(usual)] or fitting
        fitting = [entry for entry in fitting if entry[1] != "swapped"] or fitting
    if len(fitting) != 1:
        expected = "; ".join(f"{target} {list(shape)}" for target, shape, form, _ in candidates if form != "swapped")
        several = "several" if fitting else "none"
        detail = f"lora_A {list(a)} and lora_B {list(b)} fit {several} of {shown(expected, 200)}"
        problems.extend(Problem("ambiguous" if fitting else "wrong shape", part.name, detail) for part in parts.values())
        return
    target, form, (expert, projection), rank = fitting[0]
    for kind, tensor in parts.items():
        if kind == "lora_magnitude_vector" and (form != "linear" or tensor.shape not in ((b[0],), (b[0], 1), (1, b[0]))):
            problems.append(Problem("wrong shape", tensor.name, f"{list(tensor.shape)} is no magnitude of {b[0]} rows"))
            continue
        landings.append(Landing(tensor, target, form, kind, expert, projection, rank))


def _candidates(
    module: str, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], str, tuple[int | None, str]]]:
    """(parameter, its shape or that of the expert's part, form, (expert, projection)) that a module's name may mean."""
    canonical, depth = bare(module)
    name = canonical.removesuffix(".weight")
    if (one := _EXPERT.match(name)) is not None:
        weight, group = names.group_of(one["projection"])
        target = f"{one['module']}.{weight}"
        shape = shapes.get(target)
        if shape is not None and int(one["expert"]) < shape[0]:
            part = (shape[1] // len(group), shape[2])
            yield target, part, "expert", (int(one["expert"]), one["projection"])
        return
    if name.endswith(".experts"):
        grouped = [weight for weight in names.EXPERT_WEIGHTS if f"{name}.{weight}" in shapes]
        listed = settings.get("target_parameters")
        if depth == 0 and isinstance(listed, list):  # one wrapper: the parameter that the configuration names
            named = [weight for weight in grouped if any(isinstance(x, str) and x.endswith(weight) for x in listed)]
            grouped = named if len(named) == 1 else grouped
        for weight in grouped:
            for form in ("grouped", "swapped"):
                yield f"{name}.{weight}", shapes[f"{name}.{weight}"], form, (None, "")
        return
    shape = shapes.get(canonical)
    if shape is not None and len(shape) == 2:
        yield canonical, shape, "linear", (None, "")
    elif shape is not None and len(shape) == 3:  # the convolution, as a parameter
        for form in ("grouped", "swapped"):
            yield canonical, shape, form, (None, "")


def _rank(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...], form: str, *, embedding: bool) -> int:
    """The rank of matrices that fit a parameter (of one expert, or grouped [E, out, in]), or 0."""
    if len(a) != 2 or len(b) != 2 or b[1] != a[0]:
        return 0
    count = 1 if len(shape) == 2 else shape[0]
    out, inner = (shape[1], shape[0]) if embedding else shape[-2:]  # an embedding [vocabulary, D] maps the vocabulary to D
    if form == "swapped":
        out, inner = inner, out
    return a[0] // count if a[1] == inner and b[0] == out and a[0] % count == 0 else 0
