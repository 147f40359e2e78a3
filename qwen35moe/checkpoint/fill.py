"""Memory for parameters, each on its device: the mapped file itself, mapped pieces of it, or new memory that is filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen35moe.files import available_memory
from qwen35moe.models.device_map import DeviceMap

from .assemble import Plan, Read
from .dtypes import TORCH_DTYPES
from .headers import StoredTensor
from .memory import ReadAhead, map_file, new_memory, view_of
from .parameters import ModelParameter
from .report import LoadingReport
from .stitch import Piece, Stitcher
from .transfer import Copy, read_into


def fill(
    plans: Iterable[Plan], scales: Iterator[Tensor], dtype: torch.dtype, device_map: DeviceMap, weights: str, policy: str,
    report: LoadingReport,
) -> None:
    """Give every parameter memory with its numbers and install it in the model; on the meta device only its dtype is set.

    scales: of the block-FP8 reads for all devices but meta, in order. weights, policy: see `load_model`.
    """
    files: dict[Path, mmap] = {}
    stitcher = Stitcher()
    copies: list[Copy] = []
    mapped: list[StoredTensor] = []
    for plan in plans:
        parameter, own_dtype = plan.parameter, plan.parameter.dtype_in(dtype)
        device = device_map.of(parameter.name)
        if device.type == "meta":
            _install(parameter, parameter.tensor.to(own_dtype))
            continue
        round_to = dtype if policy == "transformers" and parameter.is_fp32 and own_dtype != dtype else None
        report.nbytes += parameter.tensor.numel() * own_dtype.itemsize
        reads: Sequence[Read] = plan.reads
        may_map = device.type == "cpu" and weights != "copy" and round_to is None
        value = None
        if may_map and all(_can_map(read, own_dtype) for read in reads):
            value, reads = _mapped(plan, own_dtype, files, stitcher)
        if value is None:
            value = new_memory(parameter.shape, own_dtype, device)
            report.count(plan, own_dtype)
        else:
            report.count_mapped(plan, value)
            still_to_read = {read.at for read in reads}
            mapped += [read.tensor for read in plan.reads if read.at not in still_to_read]
        flat = value.view(-1)
        for read in reads:
            part = flat[read.at : read.at + read.tensor.numel]
            copies.append(_copy_of(read, part, round_to, None if read.scale is None else next(scales)))
        _install(parameter, value)
    read_into(sorted(copies, key=lambda copy: (copy.file, copy.offset)))
    report.read_ahead = _read_ahead(mapped)


def _mapped(
    plan: Plan, dtype: torch.dtype, files: dict[Path, mmap], stitcher: Stitcher
) -> tuple[Tensor | None, Sequence[Read]]:
    """The parameter in the memory of its files (None if that is not possible), and the reads that remain."""
    source = plan.whole
    if source is not None:
        mapped = files.get(source.file) or files.setdefault(source.file, map_file(source.file))
        return view_of(mapped, source.offset, plan.parameter.shape, dtype), ()
    pieces = [Piece(read.tensor.file, read.tensor.offset, read.at * dtype.itemsize, read.tensor.nbytes) for read in plan.reads]
    stitched = stitcher(plan.parameter.shape, dtype, pieces)
    if stitched is None:
        return None, plan.reads
    value, remaining = stitched
    offsets = {piece.at for piece in remaining}
    return value, [read for read, piece in zip(plan.reads, pieces, strict=True) if piece.at in offsets]


def _copy_of(read: Read, target: Tensor, round_to: torch.dtype | None, scale: Tensor | None) -> Copy:
    tensor = read.tensor
    dtype = TORCH_DTYPES[tensor.dtype]
    if scale is None:
        return Copy(tensor.file, tensor.offset, dtype, target, round_to)
    return Copy(tensor.file, tensor.offset, dtype, target, None, scale, tensor.shape[-1], tensor.name)


def _can_map(read: Read, dtype: torch.dtype) -> bool:
    """Whether the bytes on disk can serve as the memory of the parameter.

    If the length of a header is not a multiple of the element size, all tensors of its file are misaligned.
    """
    plain = read.scale is None and TORCH_DTYPES[read.tensor.dtype] == dtype
    return plain and read.tensor.offset % dtype.itemsize == 0


def _install(parameter: ModelParameter, value: Tensor) -> None:
    new = nn.Parameter(value, requires_grad=parameter.tensor.requires_grad)
    for module, leaf in parameter.owners:
        module._parameters[leaf] = new


def _read_ahead(mapped: list[StoredTensor]) -> ReadAhead | None:
    """Start fetching the mapped weights in the order of the model, which is the order in which a forward uses them.

    The embedding comes first although a prompt reads few of its rows: fetching those one by one, queued behind all other
    requests, takes longer than fetching the whole (512 rows: 1.9 s against 1.0 s).
    """
    total = sum(tensor.nbytes for tensor in mapped)
    if not mapped or not ReadAhead.possible() or total > 0.8 * available_memory():
        return None  # weights that do not fit would evict those that were fetched before
    return ReadAhead([(t.file, t.offset, t.offset + t.nbytes) for t in mapped if t.nbytes]).start()
