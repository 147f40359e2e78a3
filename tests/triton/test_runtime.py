"""Checks of the machine, and the order of the implementations in the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

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


class OnGpu:
    """A tensor's properties that the choice of tiles reads."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "kib", "stages"), [((8, 9), 99, 3), ((8, 0), 163, 4), ((9, 0), 227, 4), ((9, 0), 48, 0)]
)
def test_the_experts_tiles_follow_the_shared_memory(
    capability: tuple[int, int], kib: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """stages: of the product with the widest tile; 0: no pipeline fits. tests/triton/test_launches.py compiles them."""
    from qwen35moe_kernels import experts

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=kib << 10))
    monkeypatch.setattr(runtime, "_shared_memory", runtime._shared_memory.__wrapped__)
    assert runtime.shared_memory(OnGpu()) == kib << 10
    assert runtime.shared_memory(torch.zeros(1)) >= 1 << 30
    assert runtime.hopper(OnGpu()) == (capability == (9, 0))
    table = experts._fitting.__wrapped__(torch.bfloat16, kib << 10, runtime.hopper(OnGpu()))
    if not stages:
        assert table == ()
        monkeypatch.setattr(runtime, "shared_memory", lambda _: kib << 10)
        x, indices = torch.zeros(2, 24), torch.zeros(2, 1, dtype=torch.int64)
        reason = experts.unsupported(x.bfloat16(), x, x, indices, torch.zeros(2, 1))
        assert reason == "a program may use 48 KiB of shared memory on cpu, the kernels need 49"
        return
    tiles = experts._tiles(OnGpu(), 1000, 1)
    assert tiles.product.stages == stages and tiles.up.stages == stages


def test_shared_memory_without_the_property(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm builds of torch have another name for it."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block=64 << 10))
    assert runtime._shared_memory.__wrapped__(0) == 64 << 10


def test_the_delta_rule_says_which_keys_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35moe_kernels import delta_rule

    monkeypatch.setattr(runtime, "shared_memory", lambda _: 99 << 10)
    monkeypatch.setattr(runtime, "unsupported_device", lambda **_: None)
    x, gates = torch.zeros(1, 3, 2, 128), torch.zeros(1, 3, 2)
    assert delta_rule.unsupported(x, x, x, decay=gates, beta=gates) is None
    reason = delta_rule.unsupported(x, x, x.requires_grad_(), decay=gates, beta=gates)
    assert reason == "float32 keys 128 wide with a gradient take 106 KiB of shared memory, cpu has 99"
