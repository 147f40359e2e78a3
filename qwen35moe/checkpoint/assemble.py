"""Which bytes of a checkpoint make which parameter of a model, decided by names, shapes and dtypes alone.

`match` goes over the parameters of a (meta) model and over the tensors on disk and accounts for every one of both: a
parameter gets a `Plan`, a list of reads that fill it; a tensor without a parameter is left out on purpose and counted
(`names.LEFT_OUT`, and whatever a `Selection` does not ask for), or it is a problem. `assemble` is the place for further
layouts on disk: it gets one parameter and everything on disk, and answers with the reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qwen35moe.modules.unfused import UnfusedExperts

from . import names
from .blocks import CODE, SCALE, scale_shape
from .dtypes import FLOATS
from .headers import Header, StoredTensor
from .problems import Problem, nearest
from .selection import Selection, runs


@dataclass
class Slot:
    """One parameter of a model, under all names by which the model knows it (tied weights have several)."""

    parameter: Tensor
    places: list[tuple[nn.Module, str]]
    names: list[str]  # canonical

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def is_island(self) -> bool:
        """Float32 at least, in a model of any dtype: the owner says so (modules/islands.py)."""
        owner, leaf = self.places[0]
        return leaf in getattr(owner, "fp32_parameters", ())

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What this parameter has in a model of dtype `dtype`."""
        return torch.promote_types(torch.float32, dtype) if self.is_island else dtype


@dataclass(frozen=True)
class Read:
    """The numbers of `tensor` go to the flattened parameter from position `at` on. With a scale it is block-FP8 [R, C]."""

    tensor: StoredTensor
    at: int = 0
    scale: StoredTensor | None = None


@dataclass(frozen=True)
class Plan:
    """What fills a parameter: one tensor as it is, or several that lie in it one after the other."""

    slot: Slot
    reads: tuple[Read, ...]

    @property
    def whole(self) -> StoredTensor | None:
        """The one tensor whose numbers are the parameter's, as they are."""
        return self.reads[0].tensor if len(self.reads) == 1 and self.reads[0].scale is None else None


@dataclass
class Disk:
    """The tensors that are asked for, by the canonical name they have in the model; and the ones of single experts by
    module, projection and index."""

    selection: Selection = field(default_factory=Selection)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    experts: dict[tuple[str, str], dict[int, StoredTensor]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # promised, but their file is missing or wrong: a problem already

    def is_lost(self, name: str) -> bool:
        return name in self.lost

    def scale_of(self, name: str) -> StoredTensor | None:
        """The factors of the weight with this canonical name."""
        return self.tensors.get(name + SCALE)


@dataclass
class Match:
    """The plan of every parameter, what was left out and counted, and second copies that must equal the first."""

    plans: list[Plan]
    left_out: dict[str, int]
    copies: list[tuple[StoredTensor, StoredTensor]]


def slots_of(model: nn.Module) -> list[Slot]:
    """The parameters of a model in the order of its state_dict; tied ones once, with all their names. Experts that are
    unfused count as the grouped parameters they are views of."""
    slots: dict[int, Slot] = {}
    unfused: tuple[str, ...] = ()
    for prefix, module in model.named_modules():
        if prefix.startswith(unfused):
            continue
        if isinstance(module, UnfusedExperts):
            unfused, module = (*unfused, f"{prefix}."), module.grouped()
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            slot = slots.setdefault(id(parameter), Slot(parameter, [], []))
            slot.places.append((module, leaf))
            slot.names.append(names.canonical(name) or name)
    return list(slots.values())


def match(
    slots: Iterable[Slot], header: Header, problems: list[Problem], selection: Selection | None = None
) -> Match:
    """Account for every parameter and every stored tensor; what does not fit is appended to `problems`."""
    slots = list(slots)
    disk, foreign, left_out = _sort(header, problems, selection or Selection())
    claimed: set[str] = set()
    plans: list[Plan] = []
    copies: list[tuple[StoredTensor, StoredTensor]] = []
    for slot in slots:
        plan = assemble(slot, disk, problems)
        mine = _candidates(slot, disk)
        claimed.update(tensor.name for pair in mine for tensor in pair if tensor is not None)
        if plan is not None:
            plans.append(plan)
            if names.grouped_experts(slot.name) is None:
                copies += [(mine[0][0], other) for other, _ in mine[1:]]
    held = {names.part_of(name) for slot in slots for name in slot.names if names.canonical(name)}
    strangers: list[tuple[StoredTensor, str]] = [(tensor, "no name of this architecture") for tensor in foreign]
    for name, tensor in disk.tensors.items():
        if tensor.name in claimed:
            continue
        part = names.part_of(name)
        if name.endswith(names.COMPUTED):
            left_out["*" + names.COMPUTED[0]] += 1
        elif part in names.LEFT_OUT and part not in held:
            left_out[names.LEFT_OUT[part]] += 1
        elif name.endswith(SCALE) and not disk.is_lost(name.removesuffix(SCALE)):
            problems.append(Problem("scale without its weight", tensor.name, f"there is no {name.removesuffix(SCALE)}"))
        else:
            strangers.append((tensor, "the model has no such parameter"))
    missing = [problem.subject for problem in problems if problem.kind == "missing"]
    meant = nearest((tensor.name for tensor, _ in strangers), missing)
    for tensor, why in strangers:
        hint = f"; {meant[tensor.name]}, which is missing, is close to it" if tensor.name in meant else ""
        problems.append(Problem("unexpected", tensor.name, why + hint))
    return Match(plans, dict(left_out), copies)


def _candidates(slot: Slot, disk: Disk) -> list[tuple[StoredTensor, StoredTensor | None]]:
    """Every stored tensor that is this parameter or a part of it, fitting or not, with its scale."""
    found = [(disk.tensors[name], disk.scale_of(name)) for name in slot.names if name in disk.tensors]
    if experts := names.grouped_experts(slot.name):
        module, projections = experts
        for projection in projections:
            for expert, tensor in disk.experts.get((module, projection), {}).items():
                found.append((tensor, disk.scale_of(names.single_expert(module, expert, projection))))
    return found


def _sort(
    header: Header, problems: list[Problem], selection: Selection
) -> tuple[Disk, list[StoredTensor], Counter[str]]:
    """What is asked for, what has no name here, and what is not asked for: its kinds, counted."""
    disk = Disk(selection)
    left_out: Counter[str] = Counter()
    for stored in header.lost:
        name = names.canonical(stored)
        if (placed := stored if name is None else selection.place(name)) is not None:
            disk.lost.add(placed)
    for stored in header.unread:
        left_out[_kind(names.canonical(stored))] += 1
    foreign: list[StoredTensor] = []
    for tensor in header.tensors.values():
        name = names.canonical(tensor.name)
        if name is None:
            foreign.append(tensor)
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
    return disk, foreign, left_out


def _kind(name: str | None) -> str:
    """How the report counts a tensor that is not asked for."""
    part = names.part_of(name) if name else "text"
    return names.LEFT_OUT.get(part, "layers and experts that were not asked for")


def assemble(slot: Slot, disk: Disk, problems: list[Problem]) -> Plan | None:
    """How `slot` is filled from `disk`; None and a problem when it cannot be.

    Expert weights [E, R, C] may be on disk as they are or as 2-D tensors per expert and projection, which are rows of
    one contiguous block each; any matrix may be block-FP8 with its scale beside it. Each parameter is looked at by
    itself, so a file may mix all of these.
    """
    stored = next(((disk.tensors[name], name) for name in slot.names if name in disk.tensors), None)
    experts = names.grouped_experts(slot.name)
    if experts is not None:
        module, projections = experts
        singles = {projection: disk.experts.get((module, projection), {}) for projection in projections}
        if any(singles.values()):
            if stored is None:
                return _stack(slot, module, singles, disk, problems)
            one = next(tensor for found in singles.values() for tensor in found.values())
            detail = f"grouped, and per expert as {_any_expert(one.name)}"
            problems.append(Problem("stored twice", stored[0].name, detail))
            return None
    if stored is None:
        if not any(disk.is_lost(name) for name in slot.names):
            problems.append(Problem("missing", disk.selection.on_disk(slot.name), _absent(slot)))
        return None
    return _take(slot, *stored, disk, problems)


def _take(slot: Slot, tensor: StoredTensor, name: str, disk: Disk, problems: list[Problem]) -> Plan | None:
    """One stored tensor as it is, or the rows of it that are asked for."""
    rows = disk.selection.rows(name)
    shape = slot.shape if rows is None else (disk.selection.total, *slot.shape[1:])
    scale = disk.scale_of(name)
    if not _fits(tensor, name, shape, disk, problems, in_blocks=rows is None or len(shape) == 3):
        return None
    if scale is not None and len(shape) == 3:  # matrices, each with blocks of its own
        chosen = [(row, row + 1) for row in (range(shape[0]) if rows is None else rows)]
    else:
        chosen = [(0, shape[0])] if rows is None else runs(rows)
    if chosen == [(0, shape[0])] and (scale is None or len(shape) == 2):
        return Plan(slot, (Read(tensor, 0, scale),))
    reads, at = [], 0
    for begin, end in chosen:
        part = tensor.part(begin, end)
        if scale is None:
            reads.append(Read(part, at))
        else:
            reads.append(Read(_matrix(part), at, _matrix(scale.part(begin, end))))
        at += part.numel
    return Plan(slot, tuple(reads))


def _matrix(tensor: StoredTensor) -> StoredTensor:
    """[1, R, C] as [R, C]."""
    return replace(tensor, shape=tensor.shape[1:])


def _any_expert(name: str) -> str:
    head, _, tail = name.rpartition(".experts.")
    return f"{head}.experts.*.{tail.partition('.')[2]}"


def _absent(slot: Slot) -> str:
    shape = str(list(slot.shape))
    if slot.names == ["lm_head.weight"]:
        return (
            f"{shape}; tie_word_embeddings is false, so the head is a weight of its own. If it is the embedding, "
            "pass config=config.replace(tie_word_embeddings=True)"
        )
    return shape


def _stack(
    slot: Slot, module: str, singles: dict[str, dict[int, StoredTensor]], disk: Disk, problems: list[Problem]
) -> Plan | None:
    """Per-expert tensors as slices of [E, R, C]: the projections of an expert share its R rows, in their order."""
    experts, rows, columns = slot.shape
    each = rows // len(singles)
    reads: list[Read] = []
    wrong = False
    for position, (projection, found) in enumerate(singles.items()):
        for expert in range(experts):
            tensor = found.get(expert)
            name = names.single_expert(module, expert, projection)
            if tensor is None:
                if not disk.is_lost(name):
                    problems.append(Problem("missing", disk.selection.on_disk(name), str([each, columns])))
                wrong = True
            elif _fits(tensor, name, (each, columns), disk, problems):
                reads.append(Read(tensor, (expert * rows + position * each) * columns, disk.scale_of(name)))
            else:
                wrong = True
        for expert, tensor in found.items():
            if expert >= experts:
                problems.append(Problem("unexpected", tensor.name, f"the model has {experts} experts"))
                wrong = True
    return None if wrong else Plan(slot, tuple(sorted(reads, key=lambda read: read.at)))


def _fits(
    tensor: StoredTensor, name: str, shape: tuple[int, ...], disk: Disk, problems: list[Problem], in_blocks: bool = True
) -> bool:
    """Whether a tensor, with its scale if it is block-FP8, can be the parameter `name` of this shape."""
    scale = disk.scale_of(name)
    if tensor.dtype == CODE and len(shape) > 1 and in_blocks:
        if scale is None:
            if disk.is_lost(name + SCALE):
                return False
            detail = f"{CODE} without {tensor.name.rpartition('.')[2]}{SCALE}: its numbers mean nothing without the factors"
            problems.append(Problem("scale missing", tensor.name, detail))
            return False
    elif tensor.dtype not in FLOATS:
        detail = f"{tensor.dtype}; weights are read from {', '.join(FLOATS)}, matrices also from {CODE} with a scale"
        problems.append(Problem("wrong dtype", tensor.name, detail))
        return False
    elif scale is not None:
        detail = f"beside it there is {scale.name}, which belongs to a weight of {CODE}"
        problems.append(Problem("wrong dtype", tensor.name, f"{tensor.dtype}; {detail}"))
        return False
    if tensor.shape != shape:
        detail = f"on disk {list(tensor.shape)}, the model has {list(shape)}"
        if len(shape) == 3 and tensor.shape == (shape[0], shape[2], shape[1]):
            detail += "; the last two axes are swapped (MLX conversions do this, and shift the norms by one as well)"
        problems.append(Problem("wrong shape", tensor.name, detail))
        return False
    return scale is None or _scale_fits(scale, shape, problems)


def _scale_fits(scale: StoredTensor, shape: tuple[int, ...], problems: list[Problem]) -> bool:
    if scale.dtype not in FLOATS:
        problems.append(Problem("wrong dtype", scale.name, f"{scale.dtype}; scales are read from {', '.join(FLOATS)}"))
        return False
    if scale.shape != scale_shape(shape):
        detail = f"on disk {list(scale.shape)}; the blocks of 128 x 128 of {list(shape)} need {list(scale_shape(shape))}"
        problems.append(Problem("wrong shape", scale.name, detail))
        return False
    return True
