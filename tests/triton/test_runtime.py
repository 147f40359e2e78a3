"""Checks of the machine, and the order of the implementations in the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from qwen35moe import backends
from qwen35moe_kernels import runtime


def test_triton_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed", lambda package: False)
    assert runtime.triton_missing.__wrapped__() == "triton is not installed: pip install 'triton>=3.6'"
    monkeypatch.setattr(runtime, "installed", lambda package: True)
    for version, usable in (("3.5.1", False), ("3.6.0", True), ("3.10.0", True), ("4.0.0+git1a2b", True), ("2.3", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        reason = runtime.triton_missing.__wrapped__()
        assert reason is None if usable else reason == f"triton {version} is installed, these kernels need 3.6 or newer"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.interpreted() and runtime.place("torch") is None
    assert runtime.unsupported_device(x=cpu, state=None) is None
    assert runtime.unsupported_device(x=cpu, state=meta) == "state is on meta, not on CUDA"
    assert runtime.unsupported_cuda(x=cpu) == "x is on cpu, not on CUDA"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not runtime.interpreted() and runtime.place("torch") == "torch"
    assert runtime.unsupported_device(x=cpu) == "x is on cpu, not on CUDA"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "triton_missing", lambda: None)
    assert runtime.missing() == "there is no CUDA device"


def test_version_numbers() -> None:
    versions = {"3.7.1+cu130": (3, 7, 1), "3.7.1.post2": (3, 7, 1), "0.10.2.dev3+g1": (0, 10, 2), "2.6": (2, 6)}
    assert {version: runtime.version_numbers(version) for version in versions} == versions


def test_blocks() -> None:
    assert [runtime.power_of_two(size) for size in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]
    assert [runtime.parts(size, 32) for size in (0, 1, 32, 33)] == [0, 1, 1, 2]


PROGRAM = """
import json, sys
from qwen35moe import backends
entries = {}
for operation in ("short_convolution", "gated_rms_norm", "delta_net_step", "attention"):
    entries[operation] = [[entry.name, entry.missing] for entry in backends.implementations(operation)]
print(json.dumps([entries, "triton" in sys.modules]))
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_order_of_preference_without_importing_triton(interpret: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    entries, imported = json.loads(process.stdout)
    names = {operation: [name for name, _ in rows] for operation, rows in entries.items()}
    assert not imported
    assert names["attention"][0] == "flash_attn"
    if interpret == "1":  # last, so that it runs only when chosen by name
        assert names["short_convolution"] == ["causal_conv1d", "cpu", "torch", "direct", "triton"]
        assert [names[operation][-1] for operation in ("gated_rms_norm", "delta_net_step")] == ["triton"] * 2
        return
    assert names["short_convolution"] == ["causal_conv1d", "triton", "cpu", "torch", "direct"]
    assert [names[operation][0] for operation in ("gated_rms_norm", "delta_net_step")] == ["triton"] * 2
    if not torch.cuda.is_available():
        assert dict(entries["gated_rms_norm"])["triton"] == "there is no CUDA device"


def test_describe_lists_the_packages() -> None:
    text = backends.describe()
    assert "causal_conv1d" in text and "flash_attn" in text and "triton" in text
