"""Adapter to zentorch, AMD's extension of torch for CPUs: `zentorch_fused_moe`, without a gradient.

zentorch multiplies by weights in a layout of its own and chooses by ZENDNNL_MATMUL_WEIGHT_CACHE where it keeps them:

    2   in the memory of the weights themselves, which then hold other numbers: saving the model writes garbage
    1   in a copy, found by the address of the weight, until the process ends
    0   nowhere: it converts the weights at every call

The meaning of an unset variable depends on the version and the processor, so this adapter sets 1 before it imports zentorch,
and it refuses 2. A copy is found by its address alone: after a weight has changed, or another tensor has taken its place in
memory, the old values are used (zentorch 2.13; its `zentorch_flush_moe_weight_cache` keeps the copies). Hence a weight that
zentorch has read stays in memory, and a call is refused if the weight has changed since.

Its kernels depend on the sizes, and it checks little: with bfloat16 on a processor without AVX-512 zentorch 2.13 gives NaN or
other wrong numbers for D = 768 and right results for D = 512. So every pair of sizes has a trial on weights of its own, and a
token of the first calls with a weight is computed by the definition too.

Importing zentorch takes seconds. It is imported by the first call of `experts`, and "auto" never takes it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe_kernels import runtime

_HOW = "pip install 'qwen35moe[zen]'"
_CACHE, _FILE = "ZENDNNL_MATMUL_WEIGHT_CACHE", "ZENDNNL_CONFIG_FILE"
_BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # as in `backends.verify`
_MANY = 64  # tokens beyond which the result of a first call is compared again
_SAMPLE = 16  # numbers of every expert that are compared with their values at the first call
_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
_lock = threading.RLock()  # zentorch has one scratch buffer for the process


class _Read(NamedTuple):
    """A weight that zentorch has read: the tensor it was passed, and its version and some of its bits at that time."""

    tensor: Tensor
    version: int | None
    sample: Tensor


class _Package(NamedTuple):
    """zentorch after its import. copies: whether it keeps copies; reason: why it is not used."""

    copies: bool
    reason: str | None


_read: dict[int, _Read] = {}  # address -> weight. An entry is never removed: its memory must not be used for another tensor
_package: _Package | None = None  # None: not imported by this adapter
_tried: dict[tuple[torch.dtype, int, int], str | None] = {}  # (dtype, D, F) -> why zentorch is not used for these sizes
_kept: list[Tensor] = []  # weights of the trials, of which zentorch has copies too
_compared: set[tuple[int, int]] = set()  # (address of a weight, kind of rows) whose first result was compared


def missing() -> str | None:
    """None, or the reason why zentorch cannot be used in this process."""
    if not runtime.installed("zentorch"):
        return f"zentorch is not installed: {_HOW}"
    version, ours = _version(), runtime.version_numbers(torch.__version__)[:2]
    if version is None:
        return f"zentorch is installed without its distribution: {_HOW}"
    if runtime.version_numbers(version)[:2] != ours:
        fitting = ".".join(map(str, ours))
        return f"zentorch {version} does not fit torch {torch.__version__}: pip install 'zentorch=={fitting}.*'"
    return _unsafe()


def _version() -> str | None:
    for distribution in ("zentorch", "zentorch-weekly"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def _unsafe() -> str | None:
    """None, or the reason why zentorch might write into the weights."""
    value = os.environ.get(_CACHE)
    advice = f"set {_CACHE}=1 (a copy of the weights) or 0 (no copy, slow for few tokens) before Python starts"
    if file := os.environ.get(_FILE):
        return f"{_FILE}={file} can let zentorch change the weights in place: unset it, and {advice}"
    if value is None and "zentorch" in sys.modules:
        return f"zentorch was imported without {_CACHE} and may change the weights in place: {advice}"
    if value not in (None, "0", "1"):
        return f"{_CACHE}={value} lets zentorch change the weights in place, and a model saved then is garbage: {advice}"
    return None


def _load() -> _Package:
    """Import zentorch, once."""
    global _package
    if _package is None:
        reason = _unsafe()
        if reason is None:
            os.environ.setdefault(_CACHE, "1")
            importlib.import_module("zentorch")
            if not hasattr(torch.ops.zentorch, "zentorch_fused_moe"):
                reason = f"zentorch {_version()} has no operator zentorch_fused_moe: {_HOW}"
        _package = _Package(os.environ.get(_CACHE) != "0", reason)
    return _package


def _trial(dtype: torch.dtype, D: int, inner: int) -> str | None:
    """None, or the reason: zentorch changed an argument or computed something else than the definition, for one token (its
    layout for decoding) and for several (that for prompts), the second call with the copies of the first."""
    generator = torch.Generator().manual_seed(0)
    E, top_k = 4, 2

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    gate_up, down = draw(E, 2 * inner, D), draw(E, D, inner)
    _kept.extend((gate_up, down))
    for tokens in (1, 8, 64):
        indices = torch.rand(tokens, E, generator=generator).topk(top_k).indices
        arguments = {"hidden": draw(tokens, D), "gate_up": gate_up, "down": down, "indices": indices}
        arguments["weights"] = torch.rand(tokens, top_k, generator=generator).to(dtype)
        before = {name: x.clone() for name, x in arguments.items()}
        for _ in range(2):
            y = _call(*arguments.values())
            if changed := [name for name, x in arguments.items() if not torch.equal(x, before[name])]:
                return f"zentorch {_version()} changed {', '.join(changed)} in a trial call, with {_CACHE}=1 or 0 too"
            if reason := _wrong(y, _definition(*before.values())):
                return f"{reason} in a trial call in {dtype} with D={D}, F={inner}"
    return None


def _wrong(y: Tensor, expected: tuple[Tensor, Tensor]) -> str | None:
    error = ((y - expected[0]).abs().max() / expected[1].max()).item()
    return None if error <= _BOUNDS[y.dtype] else f"zentorch {_version()} was wrong by {error:.1e}"


def _definition(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = sum_j w_j o_j, o_j = down_{e_j} (silu(gate_{e_j} x) * up_{e_j} x), in float32; and sum_j |w_j o_j|, its scale."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    scale = torch.zeros_like(total)
    for expert in indices.unique().tolist():
        token, choice = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden[token].float(), gate_up[expert].float()).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert].float()) * weights[token, choice, None].float()
        total.index_add_(0, token, out)
        scale.index_add_(0, token, out.abs())
    return total, scale


def _call(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The operator, which checks neither strides nor indices. It takes two experts or more: where all tokens choose the same
    one, a row of zeros is added that chooses another."""
    hidden, weights = hidden.contiguous(), weights.float().contiguous()
    rows, (first, last) = len(hidden), (int(x) for x in indices.aminmax())
    indices = indices.to(torch.int32).contiguous()
    if first == last:
        hidden, weights = torch.cat([hidden, torch.zeros_like(hidden[:1])]), torch.cat([weights, torch.zeros_like(weights[:1])])
        indices = torch.cat([indices, torch.full_like(indices[:1], (first + 1) % len(gate_up))])
    y = torch.zeros_like(hidden)
    torch.ops.zentorch.zentorch_fused_moe(y, hidden, gate_up, down, None, None, weights, indices, False, "silu")
    return y[:rows]


def _sample(weight: Tensor) -> Tensor:
    """Bits of numbers in the middle row of every expert."""
    integers = torch.int16 if weight.element_size() == 2 else torch.int32
    return weight.detach()[:, weight.shape[1] // 2, :_SAMPLE].contiguous().view(integers)


def _changed(name: str, weight: Tensor) -> str | None:
    """None, or the reason: zentorch would go on using other values than the weight's."""
    seen = _read.get(weight.data_ptr())
    if seen is None:
        return None
    if weight.shape != seen.tensor.shape or weight.dtype != seen.tensor.dtype:
        shapes = f"{list(weight.shape)} and {list(seen.tensor.shape)}"
        return f"{name} shares its memory with another weight that zentorch has read ({shapes}): pass a copy, {name}.clone()"
    if _package is not None and not _package.copies:
        return None
    version = None if weight.is_inference() else weight._version
    if version == seen.version and torch.equal(_sample(weight), seen.sample):
        return None
    return (
        f"{name} has changed since zentorch copied it, and zentorch goes on using its copy: take another implementation, pass "
        f"a new tensor ({name}.clone()), or set {_CACHE}=0 before Python starts"
    )


def _remember(weight: Tensor) -> _Read:
    version = None if weight.is_inference() else weight._version
    return _read.setdefault(weight.data_ptr(), _Read(weight, version, _sample(weight)))


def unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None
) -> str | None:
    """None, or the reason why zentorch cannot run this call."""
    if _package is not None and _package.reason:
        return _package.reason
    if reason := _tried.get((hidden.dtype, hidden.shape[-1], down.shape[-1])):
        return reason
    if tap is not None:
        return "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"
    tensors = {"hidden": hidden, "gate_up": gate_up, "down": down}
    for name, tensor in {**tensors, "indices": indices, "weights": weights}.items():
        if not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return f"{name} is not an ordinary tensor on the CPU"
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu"):
        return "a dispatch mode or autocast is active, which does not reach what zentorch computes"
    if reason := runtime.unsupported_dtype(*_BOUNDS, **tensors):
        return reason
    if hidden.dtype == torch.bfloat16 and not _AVX512:
        return "hidden is bfloat16, in which zentorch gives wrong results on a processor without AVX-512"
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} {tensor.dtype}, zentorch takes one dtype"
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if not tensor.is_contiguous():  # a copy would be another weight for zentorch at every call
            return f"{name} is not contiguous, as zentorch requires"
    if len(gate_up) < 2:
        return "gate_up has one expert, zentorch takes two or more"
    if indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < 0 or high >= len(gate_up):
            return f"indices holds {low if low < 0 else high}, and there are {len(gate_up)} experts"
    return _changed("gate_up", gate_up) or _changed("down", down)


def slower(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, *_: Tensor, **__: object) -> str:
    """Why "auto" takes another implementation."""
    return 'it keeps the weights and a copy of them until the process ends, and runs only by name: use(experts="zentorch")'


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None) -> Tensor:
    """y [N, D], as `experts` defines it. The first call imports zentorch, and the first with a weight copies it."""
    if not indices.numel():
        return torch.zeros_like(hidden)
    with _lock:
        sizes = hidden.dtype, hidden.shape[1], down.shape[2]
        if not (reason := _load().reason):
            if sizes not in _tried:
                _tried[sizes] = _trial(*sizes)
            reason = _tried[sizes]
        if reason:
            raise ValueError(f"backend='zentorch' cannot run experts: {reason}")
        kind = gate_up.data_ptr(), (len(hidden) > 1) + (len(hidden) > _MANY)
        before = None if kind in _compared else (_sample(gate_up), _sample(down))
        # zentorch's tables hold addresses of tensor objects too: it gets the object that it has read first, which lives on.
        y = _call(hidden, _remember(gate_up).tensor, _remember(down).tensor, indices, weights)
        if before is not None:
            for name, weight, sample in zip(("gate_up", "down"), (gate_up, down), before, strict=True):
                if not torch.equal(_sample(weight), sample):
                    raise RuntimeError(f"zentorch {_version()} has changed {name}: its values are lost, load the model again")
            _compare(sizes, y, hidden, gate_up, down, indices, weights)
            _compared.add(kind)
    return y


def _compare(sizes: tuple[torch.dtype, int, int], y: Tensor, hidden: Tensor, *args: Tensor) -> None:
    """RuntimeError if the result for the last token is not that of the definition."""
    gate_up, down, indices, weights = args
    expected = _definition(hidden[-1:], gate_up, down, indices[-1:], weights[-1:])
    if expected[1].isfinite().all() and expected[1].any() and (reason := _wrong(y[-1:], expected)):
        _tried[sizes] = f"{reason} for {len(hidden)} tokens, as the first call with these weights showed"
        raise RuntimeError(f"{_tried[sizes]}: take another implementation")


def register(register: Callable[..., None]) -> None:
    """Registers in front of the definition, behind all forms that "auto" takes."""
    options: dict[str, Any] = {"before": "loop", "missing": missing(), "slower": slower, "device": "cpu"}
    options |= {"differentiable": False, "compiles": False, "transforms": ()}
    register("experts", "zentorch", experts, unsupported, **options)
