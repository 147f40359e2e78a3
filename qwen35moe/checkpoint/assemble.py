"""Maps stored tensors to parameters, by names, shapes and dtypes alone.

`match` goes through the parameters of a (meta) model and through the stored tensors and accounts for every one of both.
A parameter gets a `Plan`: the list of reads that fill it. A stored tensor without a parameter is either left out
deliberately and counted (`names.LEFT_OUT`, and everything outside a `Selection`), or it is a problem. Support for another
layout on disk belongs in `assemble`, which returns the reads of one parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from . import names
from .blocks import FP8, SCALE, scale_shape
from .dtypes import FLOATS
from .headers import Header, StoredTensor
from .parameters import ModelParameter, parts_in
from .problems import Problem, nearest, pattern_of, shown
from .selection import Selection, runs

_OF_QWEN3_NEXT = ("in_proj_qkvz.weight", "in_proj_ba.weight")


@dataclass(frozen=True)
class Read:
    """Copy `tensor` into the flattened parameter from position `at` on. With a scale it is block-FP8 [rows, columns]."""

    tensor: StoredTensor
    at: int = 0
    scale: StoredTensor | None = None


@dataclass(frozen=True)
class Plan:
    """The reads that fill a parameter: one whole tensor, or several, each a contiguous part of the parameter."""

    parameter: ModelParameter
    reads: tuple[Read, ...]

    @property
    def whole(self) -> StoredTensor | None:
        """The one tensor that holds the whole parameter, not quantised."""
        return self.reads[0].tensor if len(self.reads) == 1 and self.reads[0].scale is None else None


@dataclass
class Disk:
    """The selected stored tensors by their canonical names in the model; single experts also by (module, projection)
    and index."""

    selection: Selection = field(default_factory=Selection)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    experts: dict[tuple[str, str], dict[int, StoredTensor]] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)  # listed, but the file is missing or wrong: already a problem
    ignored: set[str] = field(default_factory=set)  # stored, and left out on request

    def is_unreadable(self, name: str) -> bool:
        return name in self.unreadable

    def scale_of(self, name: str) -> StoredTensor | None:
        """The scale of the weight with this canonical name."""
        return self.tensors.get(name + SCALE)


@dataclass
class Match:
    """The plan of every parameter, counts of what was left out, and pairs of stored tensors that must be equal."""

    plans: list[Plan]
    left_out: dict[str, int]
    copies: list[tuple[StoredTensor, StoredTensor]]


def match(
    parameters: Iterable[ModelParameter], header: Header, problems: list[Problem], selection: Selection | None = None,
    ignore: Sequence[str] = (),
) -> Match:
    """Account for every parameter and every stored tensor; mismatches are appended to `problems`.

    ignore: patterns of stored names that are left out as if they were not stored.
    """
    parameters = list(parameters)
    disk, unknown, left_out = _sort(header, problems, selection or Selection(), ignore)
    claimed: set[str] = set()
    plans: list[Plan] = []
    copies: list[tuple[StoredTensor, StoredTensor]] = []
    for parameter in parameters:
        plan = assemble(parameter, disk, problems)
        candidates = _candidates(parameter, disk)
        claimed.update(tensor.name for pair in candidates for tensor in pair if tensor is not None)
        if plan is not None:
            plans.append(plan)
            if names.grouped_experts(parameter.name) is None:
                copies += [(candidates[0][0], other) for other, _ in candidates[1:]]
    model_parts = parts_in(parameters)
    unexpected: list[tuple[StoredTensor, str]] = [(tensor, "not a tensor name of this architecture") for tensor in unknown]
    for name, tensor in disk.tensors.items():
        if tensor.name in claimed:
            continue
        part = names.part_of(name)
        if name.endswith(names.COMPUTED):
            left_out["*" + names.COMPUTED[0]] += 1
        elif part in names.LEFT_OUT and part not in model_parts:
            left_out[names.LEFT_OUT[part]] += 1
        elif name.endswith(SCALE) and not disk.is_unreadable(name.removesuffix(SCALE)):
            problems.append(Problem("scale without its weight", tensor.name, f"there is no {name.removesuffix(SCALE)}"))
        else:
            unexpected.append((tensor, "the model has no such parameter"))
    _report_unexpected(unexpected, problems)
    return Match(plans, dict(left_out), copies)


def _report_unexpected(unexpected: list[tuple[StoredTensor, str]], problems: list[Problem]) -> None:
    """Each with the closest missing name, which is probably the one that was meant, or with the way to leave it out."""
    missing = [problem.subject for problem in problems if problem.kind == "missing"]
    closest = nearest((tensor.name for tensor, _ in unexpected), missing)
    # Names of layers that this model lacks are whole already.
    prefix = _common_prefix([tensor.name for tensor, _ in unexpected if names.canonical(tensor.name) is None])
    if prefix is not None:
        count = sum(tensor.name.startswith(prefix) for tensor, _ in unexpected)
        detail = f"{count} tensor names begin with it, and without it they are names of this architecture: rename them"
        problems.insert(0, Problem("prefix", prefix, detail))
    for tensor, reason in unexpected:
        if tensor.name in closest:
            reason += f"; {closest[tensor.name]} is missing and has a similar name"
        elif tensor.name.endswith(_OF_QWEN3_NEXT):
            reason += "; of Qwen3-Next, whose rows are in the order of the key heads"
        elif prefix is None or not tensor.name.startswith(prefix):
            reason += f'; ignore=["{shown(pattern_of(tensor.name), 60)}"] leaves it out'
        problems.append(Problem("unexpected", tensor.name, reason))


def _common_prefix(unexpected: Sequence[str], most: int = 1000) -> str | None:
    """What most of the names have in front of a name of this architecture."""
    counts: Counter[str] = Counter()
    for name in unexpected[:most]:
        parts = name[:500].split(".")
        for length in range(1, min(len(parts), 6)):
            if names.canonical(".".join(parts[length:])) is not None:
                counts[".".join(parts[:length]) + "."] += 1
                break
    if not counts:
        return None
    prefix, count = counts.most_common(1)[0]
    return prefix if count > 1 and 2 * count > min(len(unexpected), most) else None


def _candidates(parameter: ModelParameter, disk: Disk) -> list[tuple[StoredTensor, StoredTensor | None]]:
    """Every stored tensor that is this parameter or a part of it by name, whatever its shape, with its scale."""
    candidates = [(disk.tensors[name], disk.scale_of(name)) for name in parameter.names if name in disk.tensors]
    if experts := names.grouped_experts(parameter.name):
        module, projections = experts
        for projection in projections:
            for expert, tensor in disk.experts.get((module, projection), {}).items():
                candidates.append((tensor, disk.scale_of(names.single_expert(module, expert, projection))))
    return candidates


def _sort(
    header: Header, problems: list[Problem], selection: Selection, ignore: Sequence[str]
) -> tuple[Disk, list[StoredTensor], Counter[str]]:
    """The selected tensors, those with unknown names, and the counts of those outside the selection."""
    disk = Disk(selection)
    left_out: Counter[str] = Counter()
    for stored in header.unreadable:
        name = names.canonical(stored)
        if (placed := stored if name is None else selection.place(name)) is not None:
            disk.unreadable.add(placed)
    for stored in header.unread:
        left_out[names.ignored_by(ignore, stored) or _kind(names.canonical(stored))] += 1
    unknown: list[StoredTensor] = []
    for tensor in header.tensors.values():
        name = names.canonical(tensor.name)
        if (pattern := names.ignored_by(ignore, tensor.name)) is not None:
            left_out[pattern] += 1
            if (placed := None if name is None else selection.place(name)) is not None:
                disk.ignored.add(placed)
            continue
        if name is None:
            unknown.append(tensor)
            continue
        placed = selection.place(name)
        if placed is None:
            left_out[_kind(name)] += 1
            continue
        name = placed
        if name in disk.tensors:
            problems.append(Problem("stored twice", tensor.name, f"also as {disk.tensors[name].name}"))
            continue
        disk.tensors[name] = tensor
        if expert := names.expert_of(name):
            module, index, projection = expert
            disk.experts.setdefault((module, projection), {})[index] = tensor
    return disk, unknown, left_out


def _kind(name: str | None) -> str:
    """The report's key for a tensor outside the selection."""
    part = names.part_of(name) if name else "text"
    return names.LEFT_OUT.get(part, "layers and experts that were not selected")


def assemble(parameter: ModelParameter, disk: Disk, problems: list[Problem]) -> Plan | None:
    """The reads that fill `parameter` from `disk`; None and a problem if it cannot be filled.

    Expert weights [E, rows, columns] may be stored grouped or as 2-D tensors per expert and projection, each of which is
    a contiguous block of rows; any matrix may be block-FP8 with a scale. Every parameter is decided by itself, so a file
    may mix all of these.
    """
    stored = next(((disk.tensors[name], name) for name in parameter.names if name in disk.tensors), None)
    experts = names.grouped_experts(parameter.name)
    if experts is not None:
        module, projections = experts
        singles = {projection: disk.experts.get((module, projection), {}) for projection in projections}
        if any(singles.values()):
            if stored is None:
                return _stack(parameter, module, singles, disk, problems)
            one = next(tensor for by_index in singles.values() for tensor in by_index.values())
            detail = f"grouped, and per expert as {_any_expert(one.name)}"
            problems.append(Problem("stored twice", stored[0].name, detail))
            return None
    if stored is None:
        if not any(disk.is_unreadable(name) for name in parameter.names):
            detail = _missing_detail(parameter)
            if disk.ignored.intersection(parameter.names):
                detail += "; ignore= leaves it out"
            problems.append(Problem("missing", disk.selection.on_disk(parameter.name), detail))
        return None
    return _take(parameter, *stored, disk, problems)


def _take(parameter: ModelParameter, tensor: StoredTensor, name: str, disk: Disk, problems: list[Problem]) -> Plan | None:
    """One whole stored tensor, or its selected rows."""
    rows = disk.selection.rows(name)
    shape = parameter.shape if rows is None else (disk.selection.total, *parameter.shape[1:])
    scale = disk.scale_of(name)
    if not _fits(tensor, name, shape, disk, problems, in_blocks=rows is None or len(shape) == 3):
        return None
    if scale is not None and len(shape) == 3:  # matrices, each with its own blocks
        ranges = [(row, row + 1) for row in (range(shape[0]) if rows is None else rows)]
    else:
        ranges = [(0, shape[0])] if rows is None else runs(rows)
    if ranges == [(0, shape[0])] and (scale is None or len(shape) == 2):
        return Plan(parameter, (Read(tensor, 0, scale),))
    reads, at = [], 0
    for begin, end in ranges:
        part = tensor.part(begin, end)
        if scale is None:
            reads.append(Read(part, at))
        else:
            reads.append(Read(_matrix(part), at, _matrix(scale.part(begin, end))))
        at += part.numel
    return Plan(parameter, tuple(reads))


def _matrix(tensor: StoredTensor) -> StoredTensor:
    """[1, rows, columns] as [rows, columns]."""
    return replace(tensor, shape=tensor.shape[1:])


def _any_expert(name: str) -> str:
    head, _, tail = name.rpartition(".experts.")
    return f"{head}.experts.*.{tail.partition('.')[2]}"


def _missing_detail(parameter: ModelParameter) -> str:
    shape = str(list(parameter.shape))
    if parameter.names == ["lm_head.weight"]:
        return (
            f"{shape}; tie_word_embeddings is false, so the head is a separate weight. If the head is the embedding, "
            "pass config=config.replace(tie_word_embeddings=True)"
        )
    return shape


def _stack(
    parameter: ModelParameter, module: str, singles: dict[str, dict[int, StoredTensor]], disk: Disk, problems: list[Problem]
) -> Plan | None:
    """Per-expert tensors as slices of [E, rows, columns]: the projections of an expert share its rows, in order."""
    experts, rows, columns = parameter.shape
    shape = (rows // len(singles), columns)
    reads: list[Read] = []
    complete = True
    for position, (projection, by_index) in enumerate(singles.items()):
        for expert in range(experts):
            tensor = by_index.get(expert)
            name = names.single_expert(module, expert, projection)
            if tensor is None:
                if not disk.is_unreadable(name):
                    problems.append(Problem("missing", disk.selection.on_disk(name), str(list(shape))))
                complete = False
            elif _fits(tensor, name, shape, disk, problems):
                reads.append(Read(tensor, (expert * rows + position * shape[0]) * columns, disk.scale_of(name)))
            else:
                complete = False
        for expert, tensor in by_index.items():
            if expert >= experts:
                problems.append(Problem("unexpected", tensor.name, f"the model has {experts} experts"))
                complete = False
    return Plan(parameter, tuple(sorted(reads, key=lambda read: read.at))) if complete else None


def _fits(
    tensor: StoredTensor, name: str, shape: tuple[int, ...], disk: Disk, problems: list[Problem], in_blocks: bool = True
) -> bool:
    """Whether a tensor, with its scale if it is block-FP8, can fill the parameter `name` of this shape."""
    scale = disk.scale_of(name)
    if tensor.dtype == FP8 and len(shape) > 1 and in_blocks:
        if scale is None:
            if not disk.is_unreadable(name + SCALE):
                detail = f"{FP8} needs {tensor.name.rpartition('.')[2]}{SCALE} beside it"
                problems.append(Problem("scale missing", tensor.name, detail))
            return False
    elif tensor.dtype not in FLOATS:
        detail = f"{tensor.dtype}; weights are read from {', '.join(FLOATS)}, matrices also from {FP8} with a scale"
        problems.append(Problem("wrong dtype", tensor.name, detail))
        return False
    elif scale is not None:
        detail = f"{tensor.dtype}; {scale.name} is stored too, which only a weight of {FP8} has"
        problems.append(Problem("wrong dtype", tensor.name, detail))
        return False
    if tensor.shape != shape:
        detail = f"on disk {list(tensor.shape)}, the model has {list(shape)}"
        detail += _axes(tensor.shape, shape)
        problems.append(Problem("wrong shape", tensor.name, detail))
        return False
    return scale is None or _scale_fits(scale, shape, problems)


def _axes(stored: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The note on a tensor that has the right numbers in another order of the axes, or ""."""
    if len(shape) == 3 and stored == (shape[0], shape[2], shape[1]):
        return "; the last two axes are swapped (MLX conversions do this, and also add 1 to the norms)"
    if len(shape) == 3 and shape[1] == 1 and stored == (shape[0], shape[2]):
        return "; the axis of 1 is missing (GGUF conversions do this)"
    if len(shape) > 1 and stored == shape[::-1]:
        return "; the axes are swapped"
    return "; the axes are in another order" if len(shape) > 1 and sorted(stored) == sorted(shape) else ""


def _scale_fits(scale: StoredTensor, shape: tuple[int, ...], problems: list[Problem]) -> bool:
    if scale.dtype not in FLOATS:
        problems.append(Problem("wrong dtype", scale.name, f"{scale.dtype}; scales are read from {', '.join(FLOATS)}"))
        return False
    if scale.shape != scale_shape(shape):
        detail = f"on disk {list(scale.shape)}; the blocks of 128 x 128 of {list(shape)} need {list(scale_shape(shape))}"
        problems.append(Problem("wrong shape", scale.name, detail))
        return False
    return True
