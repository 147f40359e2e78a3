"""Runs a model on fake CUDA tensors, on a machine without a GPU, and reports what a real one would do.

`python -m tests.support.fake_gpu 9.0 SCENARIO ...` prints JSON for each scenario: the launches, the implementations that were
chosen, the tensors on another device, and the first synchronisation with the host. torch must be a CUDA build; Triton's
launches are counted, not run. A process of its own: without TRITON_INTERPRET the package registers its kernels as on a GPU.

A fake tensor has no values, so that anything that reads one raises: a scenario that ends has not synchronised.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import fake_gpu_capture, fake_gpu_generation
from tests.support.kernel_modules import KernelModule

ROOT = Path(__file__).resolve().parents[2]
# Operators that launch nothing: they make views, allocate, or read sizes.
NO_LAUNCH = frozenset(
    "view _unsafe_view expand slice select t transpose permute unsqueeze squeeze split split_with_sizes unbind alias "
    "as_strided detach unfold lift_fresh chunk diagonal _reshape_alias empty new_empty empty_like empty_strided "
    "new_empty_strided sym_size sym_stride sym_numel sym_storage_offset device".split()
)
# Bytes of shared memory that one program may use, by compute capability.
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (12, 0): 99 << 10}

# What a Hopper GPU runs: in a forward of several tokens with gradients, in one without, and in a decode step.
SEQUENCE = {
    "attention": ["torch"], "experts": ["triton"], "gated_delta_rule": ["triton"], "gated_rms_norm": ["triton"],
    "rms_norm": ["triton"], "rotary": ["triton"], "router": ["triton"], "short_convolution": ["triton"],
}  # fmt: skip
# Composed where a gradient may be needed.
FUSED = ("add_rms_norm", "add_shared_expert", "norm_rotary", "sigmoid_gate", "swiglu")
WITHOUT_GRADIENT = {name: SEQUENCE[name] for name in SEQUENCE if name != "rotary"} | dict.fromkeys(FUSED, ["triton"])
STEP = {name: SEQUENCE[name] for name in ("attention", "experts", "rms_norm", "router")}
STEP |= dict.fromkeys((*FUSED, "delta_net_step", "projections"), ["triton"])


def reports(*scenarios: str, capability: tuple[int, int] = (9, 0), timeout: float = 600.0) -> dict[str, dict[str, Any]]:
    """The report of each scenario, run in one new process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "tests.support.fake_gpu", f"{capability[0]}.{capability[1]}", *scenarios]
    process = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)
    if process.returncode:
        raise RuntimeError(process.stderr[-4000:])
    return json.loads(process.stdout.splitlines()[-1])


class Launch:
    """In place of a Triton kernel: counts its launches and checks the grid and the devices of its tensors."""

    def __init__(self, counter: Counter[str], name: str) -> None:
        self.counter, self.name = counter, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        import torch

        sizes = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or any(n > 65535 for n in sizes[1:]):
            raise AssertionError(f"{self.name}: grid {sizes}")

        def launch(*args: Any, **kwargs: Any) -> None:
            devices = {x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
            if devices != {"cuda"}:
                raise AssertionError(f"{self.name}: tensors on {sorted(devices)}")
            self.counter[self.name] += 1

        return launch


def run(capability: tuple[int, int], scenarios: list[str]) -> dict[str, dict[str, Any]]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from qwen35moe import backends
    from qwen35moe_kernels import runtime

    launches: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.split("::")[1]
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if any(x.is_cuda for x in tensors):
                if name not in NO_LAUNCH:
                    launches[name] += 1
                elsewhere.update(name for x in tensors if not x.is_cuda and x.dim())
            return out

    real = runtime.kernels

    def replaced(file: str) -> KernelModule:
        return KernelModule(file, real(file), lambda _, name: Launch(launches, name))

    patches = [
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        mock.patch.object(runtime, "shared_memory", lambda _: SHARED_MEMORY[capability]),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(runtime, "_shared_memory", lambda index: 227 << 10),  # of a Hopper
        mock.patch.object(runtime, "on_device_of", lambda _: nullcontext()),
        mock.patch.object(runtime, "kernels", replaced),
    ]
    for patch in patches:
        patch.start()
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        backends.implementations("experts")  # registers all, as on a machine with a GPU
    results = {}
    for scenario in scenarios:
        with FakeTensorMode():
            call = SCENARIOS[scenario](torch)
            launches.clear()
            elsewhere.clear()
            failure = None
            with backends.ran() as ran, Count():
                try:
                    call()
                except Exception as error:  # the report says what and where
                    frames = traceback.extract_tb(error.__traceback__)
                    where = [f for f in frames if "qwen35moe" in f.filename or "/tests/" in f.filename][-1]
                    failure = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        chosen: dict[str, list[str]] = {}
        for operation, name in sorted(ran.counts):
            chosen.setdefault(operation, []).append(name)
        results[scenario] = {
            "launches": sum(launches.values()), "most": dict(launches.most_common(12)), "chosen": chosen,
            "elsewhere": dict(elsewhere), "failure": failure,
        }  # fmt: skip
    return results


def small(torch: Any, **changes: Any) -> Any:
    """A text model of 4 layers with the heads of the published ones, in bfloat16."""
    from qwen35moe import Config, Qwen3_5MoeForCausalLM

    config = Config.preset("35b-a3b").text_config.replace(num_hidden_layers=4, **changes)
    return model_of(torch, Qwen3_5MoeForCausalLM, config)


def model_of(torch: Any, kind: Any, config: Any) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def ids(torch: Any, rows: int, tokens: int) -> Any:
    return torch.zeros(rows, tokens, dtype=torch.int64, device="cuda")


def prefill(torch: Any) -> Callable[[], object]:
    model = small(torch)
    return torch.no_grad()(lambda: model(ids(torch, 2, 129)))


def decode(torch: Any, max_length: int | None = None, layers: int = 4) -> Callable[[], object]:
    model = small(torch, num_hidden_layers=layers) if layers != 4 else small(torch)
    cache = model.new_cache(2, max_length=max_length)
    with torch.no_grad():
        model(ids(torch, 2, 129), cache=cache)
    return torch.no_grad()(lambda: model(ids(torch, 2, 1), cache=cache))


def decode_35b(torch: Any) -> Callable[[], object]:
    from qwen35moe import Config, Qwen3_5MoeForCausalLM

    model = model_of(torch, Qwen3_5MoeForCausalLM, Config.preset("35b-a3b").text_config)
    cache = model.new_cache(1, max_length=300)
    with torch.no_grad():
        model(ids(torch, 1, 129), cache=cache)
    return torch.no_grad()(lambda: model(ids(torch, 1, 1), cache=cache))


def training(torch: Any) -> Callable[[], object]:
    """The forward alone: torch's autograd engine runs a backward on a CUDA device's thread, which needs a driver."""
    model = small(torch)
    return lambda: model(ids(torch, 2, 129), labels=ids(torch, 2, 129), output_logits=False).loss


def masked(torch: Any) -> Callable[[], object]:
    model = small(torch)
    mask = torch.ones(2, 129, dtype=torch.int64, device="cuda")
    return torch.no_grad()(lambda: model(ids(torch, 2, 129), attention_mask=mask))


SCENARIOS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "prefill": prefill, "decode": decode, "decode_static": lambda torch: decode(torch, 300), "decode_35b": decode_35b,
    "training": training, "masked": masked, **fake_gpu_generation.SCENARIOS,
    **fake_gpu_capture.SCENARIOS,
    "images": lambda torch: importlib.import_module("tests.support.fake_gpu_vision").full_size(torch),
}  # fmt: skip


if __name__ == "__main__":
    first, *names = sys.argv[1:]
    major, minor = first.split(".")
    print(json.dumps(run((int(major), int(minor)), names)))
