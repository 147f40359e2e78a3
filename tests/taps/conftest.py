"""Fixtures of the tests of named values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen35moe.taps import active
from tests.taps.toy import VOCABULARY, B, CausalLM, T


@pytest.fixture
def model() -> CausalLM:
    return CausalLM()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


@pytest.fixture(autouse=True)
def no_tap_stays_active() -> Iterator[None]:
    yield
    assert not active.ACTIVE
