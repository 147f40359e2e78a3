"""Settings of the whole suite: the same numbers on every run, fresh memory full of NaN, no network.

Environment variables are set before torch or transformers is imported by any test.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `make test` runs one process per core: more than one thread in each would only take turns.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# torch.empty now yields NaN, so that a value which nobody wrote cannot pass for zero. Operations that have no
# deterministic form only warn (and pyproject silences the warning).
torch.use_deterministic_algorithms(True, warn_only=True)

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and there is none"))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seeds and leaves torch's default dtype as it was."""
    random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


class Calls:
    """What `calls` saw: how often, and with which arguments."""

    def __init__(self) -> None:
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def count(self) -> int:
        return len(self.arguments)


@contextmanager
def count_calls(owner: Any, name: str) -> Iterator[Calls]:
    """Count the calls that go through `owner.name` (a module's function, a class's method) and let them pass."""
    seen, original = Calls(), getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.arguments.append((args, kwargs))
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield seen


@pytest.fixture
def calls() -> Callable[[Any, str], AbstractContextManager[Calls]]:
    """`with calls(module, "launch") as launches: ...; assert launches.count == 3`: proof of which path ran."""
    return count_calls
