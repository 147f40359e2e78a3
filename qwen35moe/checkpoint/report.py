"""What a load did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assemble import Plan
from .dtypes import FLOATS
from .memory import ReadAhead


@dataclass
class LoadingReport:
    """What a load did, kept as `model.loading_report`."""

    path: Path
    dtype: torch.dtype
    files: int = 0
    nbytes: int = 0  # of all parameters, as they are in memory
    mapped: int = 0  # parameters whose memory is the file
    spliced: int = 0  # of these, put together from pieces of files
    copied: int = 0  # parameters that were read into memory
    stacked: int = 0  # parameters put together from several tensors, or from rows of one
    dequantised: int = 0  # stored tensors that were block-FP8
    converted: dict[str, int] = field(default_factory=dict)  # "F32 -> bfloat16": how many
    left_out: dict[str, int] = field(default_factory=dict)  # "mtp.*": how many tensors the model has no place for
    unaligned: int = 0  # mapped parameters that do not start at a multiple of 64 bytes
    notes: list[str] = field(default_factory=list)
    read_ahead: ReadAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"read_ahead": None}  # a thread is neither copied nor pickled with its model

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.path}: {self.nbytes / 1e6:,.1f} MB of {dtype} from {self.files} file(s)",
            f"parameters: {self.mapped} mapped, {self.spliced} of them in pieces; {self.copied} copied, {self.stacked} stacked "
            "from parts",
        ]
        if self.dequantised:
            lines.append(f"dequantised: {self.dequantised} tensors of block-FP8")
        lines += [f"converted: {how} ({count} parameters)" for how, count in self.converted.items()]
        lines += [f"left out: {what} ({count} tensors), no part of this model" for what, count in self.left_out.items()]
        return "\n".join([*lines, *self.notes])

    def count_mapped(self, plan: Plan, value: Tensor) -> None:
        """A parameter whose memory is its files'."""
        self.mapped += 1
        self.spliced += len(plan.reads) > 1
        self.unaligned += value.data_ptr() % 64 != 0

    def count(self, plan: Plan, dtype: torch.dtype) -> None:
        """A parameter that was read into memory of its own, as `dtype`."""
        self.stacked += len(plan.reads) > 1
        self.copied += len(plan.reads) == 1
        self.dequantised += sum(read.scale is not None for read in plan.reads)
        stored = {read.tensor.dtype for read in plan.reads if read.scale is None and FLOATS[read.tensor.dtype] != dtype}
        for name in () if plan.slot.is_island else stored:  # an island is widened in every model whose file has bf16
            how = f"{name} -> {str(dtype).removeprefix('torch.')}"
            self.converted[how] = self.converted.get(how, 0) + 1
