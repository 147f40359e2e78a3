"""Fixtures: a table of implementations that tests may change, and the inputs of rms_norm."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends import record
from qwen35moe.backends.operation import CHOICES, TABLE
from tests.backends.rms_norms import plain

cases_module: Any = importlib.import_module("qwen35moe.backends.cases")


@pytest.fixture
def own_table() -> Iterator[None]:
    """rms_norm has one implementation, `plain`, and nothing has run; all process-wide state is restored afterwards."""
    backends.implementations("rms_norm")
    entries = {name: op.entries for name, op in TABLE.items()}
    last = {name: (op.last, op.refused, dict(op.reasons)) for name, op in TABLE.items()}
    choices, logged, added = dict(CHOICES), set(record._logged), dict(cases_module._added)
    for op in TABLE.values():
        op.last, op.refused, op.reasons = None, (), {}
    for store in (record._logged, CHOICES):
        store.clear()
    TABLE["rms_norm"].assign([])
    backends.register("rms_norm", "torch", plain)
    yield
    for name, op in TABLE.items():
        op.assign(entries[name])
        op.last, op.refused, op.reasons = last[name]
    for store, before in ((CHOICES, choices), (record._logged, logged), (cases_module._added, added)):
        store.clear()
        store.update(before)


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor]:
    """Inputs of rms_norm."""
    return torch.ones(2, 3, 4), torch.ones(4)
