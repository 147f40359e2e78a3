"""Memory for parameters, each on its device: the mapped file itself, mapped pieces of it, or fresh memory that is filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen35moe.models.device_map import DeviceMap

from .assemble import Plan, Read, Slot
from .block_fp8 import VALUES
from .dtypes import FLOATS
from .headers import StoredTensor
from .memory import ReadAhead, available_memory, map_file, new_memory, view_of
from .report import LoadingReport
from .splice import Piece, Splicer
from .transfer import Copy, read_into


def fill(
    plans: Iterable[Plan], scales: Iterator[Tensor], dtype: torch.dtype, where: DeviceMap, weights: str, policy: str,
    report: LoadingReport,
) -> None:
    """Give every parameter its memory, and the model the parameters; on the meta device they only get their dtype.

    scales: of the block-FP8 reads for other devices than that, in order. weights, policy: see `load_model`.
    """
    files: dict[Path, mmap] = {}
    splicer = Splicer()
    copies: list[Copy] = []
    used: list[StoredTensor] = []
    for plan in plans:
        slot, kind, device = plan.slot, plan.slot.dtype_in(dtype), where.of(plan.slot.name)
        if device.type == "meta":
            _install(slot, slot.parameter.to(kind))
            continue
        through = dtype if policy == "transformers" and slot.is_island and kind != dtype else None
        report.nbytes += slot.parameter.numel() * kind.itemsize
        reads: Sequence[Read] = plan.reads
        may_map = device.type == "cpu" and weights == "map"
        value = None
        if may_map and all(_is_as_needed(read, kind, through) for read in reads):
            value, reads = _mapped(plan, kind, files, splicer)
        if value is None:
            value = new_memory(slot.shape, kind, device)
            report.count(plan, kind)
        else:
            report.count_mapped(plan, value)
            places = {read.at for read in reads}
            used += [read.tensor for read in plan.reads if read.at not in places]
        flat = value.view(-1)
        for read in reads:
            part = flat[read.at : read.at + read.tensor.numel]
            copies.append(_copy_of(read, part, through, None if read.scale is None else next(scales)))
        _install(slot, value)
    read_into(sorted(copies, key=lambda copy: (copy.file, copy.offset)))
    report.read_ahead = _read_ahead(used)


def _mapped(
    plan: Plan, dtype: torch.dtype, files: dict[Path, mmap], splicer: Splicer
) -> tuple[Tensor | None, Sequence[Read]]:
    """The parameter in the memory of its files, if it can be, and the reads that are still to be done."""
    source = plan.whole
    if source is not None:
        mapped = files.get(source.file) or files.setdefault(source.file, map_file(source.file))
        return view_of(mapped, source.offset, plan.slot.shape, dtype), ()
    pieces = [Piece(read.tensor.file, read.tensor.offset, read.at * dtype.itemsize, read.tensor.nbytes) for read in plan.reads]
    found = splicer(plan.slot.shape, dtype, pieces)
    if found is None:
        return None, plan.reads
    value, left = found
    places = {piece.at for piece in left}
    return value, [read for read, piece in zip(plan.reads, pieces, strict=True) if piece.at in places]


def _copy_of(read: Read, target: Tensor, through: torch.dtype | None, scale: Tensor | None) -> Copy:
    tensor = read.tensor
    if scale is None:
        return Copy(tensor.file, tensor.offset, FLOATS[tensor.dtype], target, through)
    return Copy(tensor.file, tensor.offset, VALUES, target, None, scale, tensor.shape[-1], tensor.name)


def _is_as_needed(read: Read, dtype: torch.dtype, through: torch.dtype | None) -> bool:
    """Whether the bytes on disk can serve as memory of the parameter.

    A header whose length is no multiple of the element size puts every tensor at an address that no element may have.
    """
    plain = read.scale is None and through is None
    return plain and FLOATS[read.tensor.dtype] == dtype and read.tensor.offset % dtype.itemsize == 0


def _install(slot: Slot, value: Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=slot.parameter.requires_grad)
    for module, leaf in slot.places:
        module._parameters[leaf] = parameter


def _read_ahead(used: list[StoredTensor]) -> ReadAhead | None:
    """Start fetching the mapped weights in the order of the model, which is the order in which a forward needs them.

    The embedding is first although a prompt reads few of its rows: fetching these one by one behind everything else that
    is requested takes longer than the whole (512 rows: 1.9 s against 1.0 s).
    """
    total = sum(tensor.nbytes for tensor in used)
    if not used or not ReadAhead.possible() or total > 0.8 * available_memory():
        return None  # what does not fit would push out what was fetched before
    return ReadAhead([(t.file, t.offset, t.offset + t.nbytes) for t in used if t.nbytes]).start()
