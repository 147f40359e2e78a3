"""Which bytes of a checkpoint make which parameter of a model, decided by names, shapes and dtypes alone.

`match` goes over the parameters of a (meta) model and over the tensors on disk and accounts for every one of both: a
parameter gets a `Plan`, a list of reads that fill it; a tensor without a parameter is left out on purpose and counted
(`names.LEFT_OUT`), or it is a problem. `assemble` is the place for further layouts on disk: it gets one parameter and
everything on disk, and answers with the reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qwen35moe.modules.unfused import UnfusedExperts

from . import names
from .headers import FLOATS, Header, StoredTensor
from .problems import Problem


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
        return leaf in getattr(owner, "island", ())

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What this parameter has in a model of dtype `dtype`."""
        return torch.promote_types(torch.float32, dtype) if self.is_island else dtype


@dataclass(frozen=True)
class Read:
    """The numbers of `tensor` go to the flattened parameter from position `at` on."""

    tensor: StoredTensor
    at: int = 0


@dataclass(frozen=True)
class Plan:
    """What fills a parameter: one tensor as it is, or several that lie in it one after the other."""

    slot: Slot
    reads: tuple[Read, ...]

    @property
    def whole(self) -> StoredTensor | None:
        """The one tensor that is the parameter."""
        return self.reads[0].tensor if len(self.reads) == 1 else None


@dataclass
class Disk:
    """The tensors of a checkpoint by canonical name, and the ones of single experts by module, projection and index."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    experts: dict[tuple[str, str], dict[int, StoredTensor]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # promised, but their file is missing or wrong: a problem already

    def is_lost(self, name: str) -> bool:
        return name in self.lost


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


def match(slots: Iterable[Slot], header: Header, problems: list[Problem]) -> Match:
    """Account for every parameter and every stored tensor; what does not fit is appended to `problems`."""
    slots = list(slots)
    disk, foreign = _sort(header, problems)
    claimed: set[str] = set()
    plans: list[Plan] = []
    copies: list[tuple[StoredTensor, StoredTensor]] = []
    for slot in slots:
        plan = assemble(slot, disk, problems)
        mine = _candidates(slot, disk)
        claimed.update(tensor.name for tensor in mine)
        if plan is not None:
            plans.append(plan)
            if (first := plan.whole) is not None:
                copies += [(first, tensor) for tensor in mine if tensor is not first]
    held = {names.part_of(name) for slot in slots for name in slot.names if names.canonical(name)}
    left_out: Counter[str] = Counter()
    for name, tensor in disk.tensors.items():
        if tensor.name in claimed:
            continue
        part = names.part_of(name)
        if name.endswith(names.COMPUTED):
            left_out["*" + names.COMPUTED[0]] += 1
        elif part in names.LEFT_OUT and part not in held:
            left_out[names.LEFT_OUT[part]] += 1
        else:
            problems.append(Problem("unexpected", tensor.name, "the model has no such parameter"))
    for tensor in foreign:
        problems.append(Problem("unexpected", tensor.name, "no name of this architecture"))
    return Match(plans, dict(left_out), copies)


def _candidates(slot: Slot, disk: Disk) -> list[StoredTensor]:
    """Every stored tensor that is this parameter or a part of it, fitting or not."""
    found = [disk.tensors[name] for name in slot.names if name in disk.tensors]
    if experts := names.grouped_experts(slot.name):
        module, projections = experts
        for projection in projections:
            found += disk.experts.get((module, projection), {}).values()
    return found


def _sort(header: Header, problems: list[Problem]) -> tuple[Disk, list[StoredTensor]]:
    disk = Disk(lost={names.canonical(name) or name for name in header.lost})
    foreign: list[StoredTensor] = []
    for tensor in header.tensors.values():
        name = names.canonical(tensor.name)
        if name is None:
            foreign.append(tensor)
            continue
        if name in disk.tensors:
            problems.append(Problem("stored twice", tensor.name, f"also as {disk.tensors[name].name}"))
            continue
        disk.tensors[name] = tensor
        if expert := names.expert_of(name):
            module, index, projection = expert
            disk.experts.setdefault((module, projection), {})[index] = tensor
    return disk, foreign


def assemble(slot: Slot, disk: Disk, problems: list[Problem]) -> Plan | None:
    """How `slot` is filled from `disk`; None and a problem when it cannot be.

    Expert weights [E, R, C] may be on disk as they are or as 2-D tensors per expert and projection, which are rows of
    one contiguous block each; each parameter is looked at by itself, so a file may mix the two.
    """
    stored = next((disk.tensors[name] for name in slot.names if name in disk.tensors), None)
    experts = names.grouped_experts(slot.name)
    if experts is not None:
        module, projections = experts
        singles = {projection: disk.experts.get((module, projection), {}) for projection in projections}
        if any(singles.values()):
            if stored is None:
                return _stack(slot, module, singles, disk, problems)
            one = next(tensor for found in singles.values() for tensor in found.values())
            problems.append(Problem("stored twice", stored.name, f"grouped, and per expert as {_any_expert(one.name)}"))
            return None
    if stored is None:
        if not any(disk.is_lost(name) for name in slot.names):
            problems.append(Problem("missing", slot.name, _absent(slot)))
        return None
    fits = _fits(stored, slot.shape, problems)
    return Plan(slot, (Read(stored),)) if fits else None


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
            if tensor is None:
                name = names.single_expert(module, expert, projection)
                if not disk.is_lost(name):
                    problems.append(Problem("missing", name, str([each, columns])))
                wrong = True
            elif _fits(tensor, (each, columns), problems):
                reads.append(Read(tensor, (expert * rows + position * each) * columns))
            else:
                wrong = True
        for expert, tensor in found.items():
            if expert >= experts:
                problems.append(Problem("unexpected", tensor.name, f"the model has {experts} experts"))
                wrong = True
    return None if wrong else Plan(slot, tuple(sorted(reads, key=lambda read: read.at)))


def _fits(tensor: StoredTensor, shape: tuple[int, ...], problems: list[Problem]) -> bool:
    if tensor.dtype not in FLOATS:
        detail = f"{tensor.dtype}; weights are read from {', '.join(FLOATS)}"
        if tensor.dtype.startswith("F8"):
            detail += " (block-FP8 checkpoints: not yet)"
        problems.append(Problem("wrong dtype", tensor.name, detail))
        return False
    if tensor.shape != shape:
        detail = f"on disk {list(tensor.shape)}, the model has {list(shape)}"
        if len(shape) == 3 and tensor.shape == (shape[0], shape[2], shape[1]):
            detail += "; the last two axes are swapped (MLX conversions do this, and shift the norms by one as well)"
        problems.append(Problem("wrong shape", tensor.name, detail))
        return False
    return True
