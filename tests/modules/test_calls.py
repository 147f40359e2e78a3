"""The Python cost of a decoded token, in calls of functions of the package, and the arguments of calls of operations."""

from __future__ import annotations

import ast
import inspect
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import qwen35moe
from qwen35moe import Config, Qwen3_5MoeForCausalLM, ops
from qwen35moe.backends import OPERATIONS
from tests.support.configs import TWO_LAYERS
from tests.support.floors import ROOT, files

CALLS, FILES = 95, 14  # limits for one decoded Gated DeltaNet layer with its mixture of experts
FOLDERS = tuple(str(ROOT / name) for name in ("qwen35moe", "kernels"))


@pytest.fixture
def model() -> Qwen3_5MoeForCausalLM:
    return Qwen3_5MoeForCausalLM(Config.from_dict(TWO_LAYERS)).init_weights(seed=3)


class Profile:
    """Counts the calls of Python functions of the packages of this repository while a layer runs."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        forward = layer.forward

        def profiled(*args: Any, **kwargs: Any) -> Any:
            previous = sys.getprofile()
            sys.setprofile(self.count)
            try:
                return forward(*args, **kwargs)
            finally:
                sys.setprofile(previous)

        layer.forward = profiled  # type: ignore[method-assign]

    def count(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            self.calls[frame.f_code.co_filename, frame.f_code.co_name] += 1


def test_one_decoded_layer_stays_within_its_limits(model: Qwen3_5MoeForCausalLM) -> None:
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([[5, 9, 7]]), cache=cache)
        model(torch.tensor([[4]]), cache=cache)  # values that are computed once are computed now
        profile = Profile(model.model.layers[0])
        model(torch.tensor([[8]]), cache=cache)
    table = "\n".join(f"{count:4} {Path(file).relative_to(ROOT)}:{name}" for (file, name), count in profile.calls.items())
    files_called = {file for file, _ in profile.calls}
    assert 20 < profile.calls.total() <= CALLS, table
    assert len(files_called) <= FILES, table


def test_calls_are_counted(model: Qwen3_5MoeForCausalLM) -> None:
    layer = model.model.layers[1].post_attention_layernorm
    profile = Profile(layer)
    layer(torch.ones(1, 24))
    assert profile.calls[str(ROOT / "qwen35moe/modules/norm.py"), "forward"] == 1
    assert any(name == "__call__" and file.endswith("operation.py") for file, name in profile.calls)


@pytest.mark.parametrize("path", files("qwen35moe/modules", "qwen35moe/models", "qwen35moe/cache"), ids=lambda path: path.name)
def test_operations_are_called_with_their_own_arguments(path: Path) -> None:
    """Type checkers cannot check these calls: `caller=` is added to the parameters of the definition."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        target = ast.unparse(node.func).split(".")
        if target[0] != "ops" or len(target) < 2 or target[1] not in OPERATIONS:
            continue
        signature = inspect.signature(getattr(ops, target[1]).definition)
        names = {keyword.arg for keyword in node.keywords if keyword.arg} - {"caller"}
        assert names <= signature.parameters.keys(), f"{path.name}:{node.lineno}: {names - signature.parameters.keys()}"


def test_the_package_is_the_checkout() -> None:
    """Otherwise the tests above would count the calls of another installation."""
    assert Path(qwen35moe.__file__).is_relative_to(ROOT)
