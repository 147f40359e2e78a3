"""Runs a model on tensors that report the device cuda:0 and hold their data in CPU memory; counts synchronisations.

`python -m tests.support.pretend_gpu MODULE SCENARIO ...` prints JSON: for each scenario of MODULE.SCENARIOS the reads of the
device by the host with the line that reads, the copies from the host, the implementations that were chosen, and the
operations that got tensors of two devices. Any torch build works. Unlike a fake tensor (fake_gpu.py) such a tensor has values,
so that a scenario runs on past a read. Triton kernels are not run: what they write is zero.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.kernel_modules import KernelModule

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)
# Operators whose result has a size that the values decide, or that return a value: the host waits for them.
READS = frozenset("_local_scalar_dense equal nonzero masked_select unique_dim unique_consecutive _unique2 bincount".split())
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def reports(module: str, *scenarios: str, timeout: float = 600.0) -> dict[str, dict[str, Any]]:
    """The report of each scenario, run in one new process, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "tests.support.pretend_gpu", module, *scenarios]
    process = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)
    if process.returncode:
        raise RuntimeError(process.stderr[-4000:])
    return json.loads(process.stdout.splitlines()[-1])


class Log:
    """What happened since `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.reads: list[str] = []  # the host waits for the device
        self.copies: list[str] = []  # from the host, without waiting
        self.mixed: list[str] = []  # operators with tensors of both devices
        self.checks = 0  # asserted on the device
        self.attention: list[dict[str, Any]] = []  # arguments of scaled_dot_product_attention
        self.launches: Counter[str] = Counter()  # of Triton kernels


LOG = Log()


def where() -> str:
    """The innermost lines of the library that are running."""
    frames = [f for f in traceback.extract_stack() if "/qwen35moe" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])


class OnGpu(torch.Tensor):
    """A tensor on cuda:0 with its values in `data_on_cpu`."""

    data_on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> OnGpu:
        assert not isinstance(data, OnGpu)
        out = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=CUDA
        )
        out.data_on_cpu = data
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.data_on_cpu})"


def plain(x: Any) -> Any:
    """The CPU tensor behind x, or x."""
    return x.data_on_cpu if isinstance(x, OnGpu) else x


def values(tree: Any) -> Any:
    """A tree of tensors with their CPU data, off the graph, for a test that compares values."""
    return tree_map(lambda x: plain(x.detach()) if isinstance(x, torch.Tensor) else x, tree)


class Pretend(TorchDispatchMode):
    """While it is active, tensors that are made on a CUDA device are `OnGpu`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU data, with what a GPU would wait for noted in LOG."""
    namespace, name = func._schema.name.split("::")
    if namespace.startswith("qwen35moe"):  # an operation of the library: its own operators are of interest
        with Pretend():
            return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    if name == "to":  # not an operator of its own
        with Pretend():
            return func.decompose(*args, **kwargs)
    if name == "_scaled_dot_product_flash_attention":
        return _flash(*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = {id(plain(x)): x for x in tensors if isinstance(x, OnGpu)}
    on_cpu = [x for x in tensors if not isinstance(x, OnGpu) and x.dim()]
    device = kwargs.get("device")
    to_gpu = bool(on_gpu) if device is None else torch.device(device).type == "cuda"
    _note(name, args, kwargs, bool(on_gpu), on_cpu, to_gpu)
    if isinstance(args and args[0], OnGpu) and name == "copy_":
        to_gpu = True
    changed = {"device": torch.device("cpu") if to_gpu else device} if device is not None else {}
    changed |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
    out = func(*tree_map(plain, args), **(tree_map(plain, kwargs) | changed))
    if name == "_local_scalar_dense" or not to_gpu:
        return out
    if name in EMPTY:
        out.zero_()  # kernels, which would fill it, do not run
    return tree_map(lambda x: on_gpu.get(id(x)) if id(x) in on_gpu else OnGpu(x) if _is_cpu(x) else x, out)


def _is_cpu(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, OnGpu)


def _note(name: str, args: Any, kwargs: dict[str, Any], reads_gpu: bool, on_cpu: list[Any], to_gpu: bool) -> None:
    """Adds to LOG what the call costs on a GPU."""
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        target_on_gpu = to_gpu if name == "_to_copy" else isinstance(args[0], OnGpu)
        if isinstance(source, OnGpu) and not target_on_gpu:
            LOG.reads.append(f"copy to the host at {where()}")
        elif not isinstance(source, OnGpu) and target_on_gpu and source.numel():
            waits = not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
            (LOG.reads if waits and source.dim() else LOG.copies).append(f"copy from the host at {where()}")
        return
    if not reads_gpu:
        return
    if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        LOG.reads.append(f"{name} at {where()}")
    if name == "where" and any(_is_cpu(x) for x in args[1:]):
        LOG.reads.append(f"where with a number in a CPU tensor, which is copied, at {where()}")
    if name == "_assert_async":
        LOG.checks += 1
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            LOG.reads.append(f"{name} with a boolean mask at {where()}")
        if any(_is_cpu(i) for i in indices):
            LOG.reads.append(f"{name} with an index on the host at {where()}")
        on_cpu = [x for x in on_cpu if all(x is not i for i in indices)]
    if on_cpu:
        LOG.mixed.append(f"{name} with {[tuple(x.shape) for x in on_cpu]} on the host at {where()}")


class Launch:
    """In place of a Triton kernel: counts its launches and checks the grid and the devices of its tensors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            if any(_is_cpu(x) for x in (*args, *kwargs.values())):
                LOG.mixed.append(f"{self.name} with a tensor on the host at {where()}")
            LOG.launches[self.name] += 1

        return launch


def _flash(query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, scale: float | None = None, **_: Any) -> Any:
    """aten's flash kernel on the CPU data: grouped heads, a causal mask that is aligned to the last key."""
    tokens, positions, heads = query.shape[2], key.shape[2], query.shape[1]
    LOG.attention.append({"form": "flash", "dtype": str(query.dtype), "query": list(query.shape), "key": list(key.shape)})
    mask = torch.ones(tokens, positions, dtype=torch.bool).tril(positions - tokens) if is_causal else None
    key, value = (plain(x).repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    unused = [OnGpu(torch.zeros(1)) for _ in range(6)]
    out = OnGpu(_SDPA(plain(query), key, value, mask, dropout_p, scale=scale))
    return out, *unused[:3], tokens, positions, *unused[3:]


_SDPA, _TOLIST = F.scaled_dot_product_attention, torch.Tensor.tolist


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:
    """scaled_dot_product_attention on the CPU data; its arguments go to LOG."""
    if not isinstance(query, OnGpu):
        return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    form = "causal" if is_causal else "none"
    if attn_mask is not None:
        form = "mask"
    mask = {} if form != "mask" else {"strides": attn_mask.stride(), "mask_dtype": str(attn_mask.dtype)}
    shapes = {"query": list(query.shape), "key": list(key.shape)}
    LOG.attention.append({"form": form, "gqa": enable_gqa, "dtype": str(query.dtype), **shapes, **mask})
    if key.shape[1] != query.shape[1]:
        heads = query.shape[1]
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1, output_size=heads) for x in (key, value))
    tensors = [plain(x) for x in (query, key, value, attn_mask)]
    with _disable_current_modes():
        return OnGpu(_SDPA(*tensors, dropout_p, is_causal, scale=scale))


def _tolist(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, OnGpu):
        LOG.reads.append(f"tolist at {where()}")
    return _TOLIST(plain(tensor))


@contextmanager
def gpu() -> Iterator[None]:
    """Inside, torch behaves as with a Hopper GPU, as far as the library looks."""
    from qwen35moe import backends
    from qwen35moe_kernels import runtime

    real = runtime.kernels

    def replaced(file: str) -> KernelModule:
        return KernelModule(file, real(file), lambda _, name: Launch(name.rpartition(".")[2]))

    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "_lazy_init", lambda: None), (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_available", lambda: True), (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "synchronize", lambda *_: LOG.reads.append(f"synchronize at {where()}")),
            (torch.backends.cuda, "can_use_flash_attention", lambda *_: True),
            (torch.Tensor, "tolist", _tolist), (F, "scaled_dot_product_attention", _attention),
            (torch.Tensor, "pin_memory", lambda tensor: tensor), (runtime, "on_device_of", lambda _: nullcontext()),
            (runtime, "shared_memory", lambda _: 227 << 10), (runtime, "kernels", replaced),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        backends.implementations("experts")  # registers all, as on a machine with a GPU
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies from the host
        try:
            with Pretend():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def moved(model: Any, requires_grad: bool = False) -> Any:
    """The model with its parameters and buffers on cuda:0."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnGpu(parameter.data), requires_grad=requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model


def run(scenarios: dict[str, Callable[[], Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """scenario() prepares and returns the call that is looked at."""
    from qwen35moe import backends

    results = {}
    with gpu():
        for name in names:
            torch.manual_seed(0)
            failure = value = None
            chosen: dict[str, list[str]] = {}
            try:
                call = scenarios[name]()
                LOG.clear()
                with backends.ran() as ran:
                    value = call()
                for operation, implementation in sorted(ran.counts):
                    chosen.setdefault(operation, []).append(implementation)
            except Exception as error:  # the report says what and where
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
                place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])
                failure = f"{type(error).__name__}: {str(error)[:500]} ({place})"
            results[name] = {
                "reads": LOG.reads, "copies": LOG.copies, "mixed": LOG.mixed, "checks": LOG.checks,
                "attention": LOG.attention, "launches": dict(LOG.launches), "chosen": chosen, "failure": failure,
                "value": value if isinstance(value, float) else None,
            }  # fmt: skip
            LOG.clear()
    return results


if __name__ == "__main__":
    # Not __main__'s copies of the classes: those of the module, which the scenarios import.
    from tests.support import pretend_gpu

    first, *rest = sys.argv[1:]
    table = importlib.import_module(first).SCENARIOS
    print(json.dumps(pretend_gpu.run(table, rest or list(table))))
