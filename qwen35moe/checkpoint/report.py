"""Counts of what loading a checkpoint did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assemble import Plan
from .dtypes import FLOATS, name_of
from .memory import ReadAhead


@dataclass
class LoadingReport:
    """What loading did; kept as `model.loading_report`."""

    path: Path
    dtype: torch.dtype
    files: int = 0
    nbytes: int = 0  # of all parameters, in memory
    mapped: int = 0  # parameters whose memory is the file
    stitched: int = 0  # of these, put together from mapped pieces of files
    copied: int = 0  # parameters that were read into memory
    stacked: int = 0  # parameters that were read from several tensors, or from rows of one
    dequantised: int = 0  # stored tensors that were block-FP8
    converted: dict[str, int] = field(default_factory=dict)  # "F32 -> bfloat16": number of parameters
    left_out: dict[str, int] = field(default_factory=dict)  # "mtp.*": number of tensors that are not in the model
    unaligned: int = 0  # mapped parameters that do not start at a multiple of 64 bytes
    notes: list[str] = field(default_factory=list)
    read_ahead: ReadAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"read_ahead": None}  # a thread is neither copied nor pickled with its model

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.nbytes / 1e6:,.1f} MB of {name_of(self.dtype)} from {self.files} file(s)",
            f"parameters: {self.mapped} mapped, {self.stitched} of them stitched from pieces; {self.copied} copied, "
            f"{self.stacked} stacked from parts",
        ]
        if self.dequantised:
            lines.append(f"dequantised: {self.dequantised} tensors of block-FP8")
        lines += [f"converted: {how} ({count} parameters)" for how, count in self.converted.items()]
        lines += [f"left out: {name} ({count} tensors), not part of this model" for name, count in self.left_out.items()]
        return "\n".join([*lines, *self.notes])

    def count_mapped(self, plan: Plan, value: Tensor) -> None:
        """Count a parameter whose memory is its files'."""
        self.mapped += 1
        self.stitched += len(plan.reads) > 1
        self.unaligned += value.data_ptr() % 64 != 0

    def count(self, plan: Plan, dtype: torch.dtype) -> None:
        """Count a parameter that was read into new memory as `dtype`."""
        self.stacked += len(plan.reads) > 1
        self.copied += len(plan.reads) == 1
        self.dequantised += sum(read.scale is not None for read in plan.reads)
        if plan.parameter.is_fp32:  # widened in every model whose file has bf16: not worth a line
            return
        for code in {read.tensor.dtype for read in plan.reads if read.scale is None and FLOATS[read.tensor.dtype] != dtype}:
            how = f"{code} -> {name_of(dtype)}"
            self.converted[how] = self.converted.get(how, 0) + 1
