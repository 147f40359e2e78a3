"""Settings of the whole suite: fixed seeds, uninitialised memory filled with NaN, no network.

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
from hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels run in Triton's interpreter. The variable is read when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

    # A CUDA build of torch gives fake tensors a CUDA device that does not exist. Autograd starts a thread for it, and then
    # fails in the forked children of later tests. (Fake CUDA tensors have their own process, tests/support/fake_gpu.py.)
    torch._C._ensureCUDADeviceGuardSet = lambda: None  # type: ignore[attr-defined]

# `make test` runs one process per core: more threads would compete for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Fills torch.empty with NaN, so that a value that was never written cannot be taken for zero. Operations without a
# deterministic form only warn (pyproject silences the warning).
torch.use_deterministic_algorithms(True, warn_only=True)

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
# `make soak`: other examples in every run, and more of them.
settings.register_profile(
    "soak", derandomize=False, deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test starts with the same seeds; torch's default dtype is restored after it."""
    random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo without compiled graphs, before the test and after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Calls:
    """The calls that `count_calls` counted, with their arguments."""

    def __init__(self) -> None:
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def count(self) -> int:
        return len(self.arguments)


@contextmanager
def count_calls(owner: Any, name: str) -> Iterator[Calls]:
    """Count the calls of `owner.name` (a function of a module, a method of a class), which still runs."""
    counter, original = Calls(), getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counter.arguments.append((args, kwargs))
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield counter


@pytest.fixture
def calls() -> Callable[[Any, str], AbstractContextManager[Calls]]:
    """`with calls(module, "launch") as launches: ...; assert launches.count == 3` proves which path ran."""
    return count_calls
