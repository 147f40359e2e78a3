"""Fixtures of the tests of the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.cache.common import CASE
from tests.support import peer


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model


@pytest.fixture(scope="module")
def double(model: Any) -> Any:
    return copy.deepcopy(model).double()
