"""The measured implementations: our forms, transformers' three, other packages' kernels if installed, and yours (--impl).

Each is a function (hidden [N, D], gate_up [E, 2F, D], down [E, D, F], indices [N, top_k], weights [N, top_k]) -> [N, D].
The adapters follow the packages' documented signatures and are written for GPUs; they have not yet run on one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe.packed import Packed, by_hand
from qwen35moe import backends, ops

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
COPIES = 2 << 30  # the most bytes of weights that a form may copy
ZEROS = 64 << 30  # the most bytes of zeros that a backward may write
AUTO = "ours"
TAPPED = "tapped"  # the form for active taps, which is not measured


def implementations(device: str, extra: list[str]) -> dict[str, Form | str]:
    """Name -> function, or the reason why it cannot run on this machine."""
    forms: dict[str, Form | str] = {AUTO: ops.experts}
    for entry in backends.implementations("experts"):
        if entry.name != TAPPED:
            forms[f"ours {entry.name}"] = entry.fn or entry.missing or "it has no function"
    for kind in TRANSFORMERS:
        forms[f"transformers {kind}"] = _made(lambda kind=kind: transformers_experts(kind), "transformers")
    for name, (package, make) in ADAPTERS.items():
        forms[name] = _made(make, package) if device.startswith("cuda") else f"{package} runs on a GPU, this is {device}"
    forms |= {"ours packed": Packed(ops.experts, library=True), "packed by hand": Packed(by_hand)}
    for text in extra:
        forms[text.rpartition("=")[0] or text] = _imported(text)
    return forms


def reasons(name: str, form: Form, arguments: tuple[Tensor, ...]) -> str | None:
    """Why an implementation cannot run a case, or None."""
    assignments, expert = arguments[3].numel(), arguments[1][0].numel() + arguments[2][0].numel()
    copied = assignments * expert * arguments[1].element_size()
    if name in ("transformers batched_mm", "ours gathered") and copied > COPIES:
        return f"it would copy {copied / 1e9:.0f} GB of weights"
    filled = arguments[3].unique().numel() * (arguments[1].numel() + arguments[2].numel()) * arguments[1].element_size()
    if name in ("transformers eager", "ours loop") and arguments[1].requires_grad and filled > ZEROS:
        return f"its backward writes a zero gradient of all experts for every expert hit, {filled / 1e9:.0f} GB"
    if isinstance(form, Packed):
        return form.refusal(arguments[1])
    if name.startswith("ours "):
        entry = next(entry for entry in backends.implementations("experts") if entry.name == name[5:])
        return entry.refusal(arguments, {})
    return None


def training_products(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Only the six products of a forward and backward, by torch.mm on arbitrary rows.

    The weights' gradients are in fresh memory, as in every form.
    """
    counts = torch.bincount(indices.reshape(-1), minlength=gate_up.shape[0]).tolist()
    largest, inner = max(counts), down.shape[-1]
    rows = hidden[:1].expand(largest, -1).contiguous()
    act = rows[:, :1].expand(-1, inner).contiguous()
    up, out = rows.new_empty(largest, 2 * inner), torch.empty_like(rows)
    hit = [(expert, count) for expert, count in enumerate(counts) if count]
    for expert, n in hit:
        torch.mm(rows[:n], gate_up[expert].t(), out=up[:n])
        torch.mm(act[:n], down[expert].t(), out=out[:n])
    to_gate_up, to_down = torch.empty_like(gate_up), torch.empty_like(down)
    for expert, n in hit:
        torch.mm(rows[:n], down[expert], out=act[:n])
        torch.mm(rows[:n].t(), act[:n], out=to_down[expert])
        torch.mm(up[:n].t(), rows[:n], out=to_gate_up[expert])
        torch.mm(up[:n], gate_up[expert], out=out[:n])
    return out


def transformers_experts(kind: str) -> Form:
    """transformers' experts module of this model with one of its implementations; it reads the weights as attributes."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

    config: Any = SimpleNamespace(
        num_experts=1, hidden_size=1, moe_intermediate_size=1, hidden_act="silu", _experts_implementation=kind
    )
    module: Any = Qwen3_5MoeExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        delattr(module, name)

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        module.num_experts, module.gate_up_proj, module.down_proj = gate_up.shape[0], gate_up, down
        return module(hidden, indices, weights)

    return run


def sonic() -> Form:
    """PyPI sonic-moe (SM90, SM100): weights as [2F, D, E] and [D, F, E] views, assignments in token order."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        tokens = torch.arange(len(hidden), device=hidden.device, dtype=torch.int32).repeat_interleave(indices.shape[1])
        out, _ = moe_general_routing_inputs(
            hidden, weights.reshape(-1), tokens, indices.reshape(-1).int(), gate_up.permute(1, 2, 0), None,
            down.permute(1, 2, 0), None, gate_up.shape[0], torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True,
        )
        return out

    return run


def liger() -> Form:
    """liger-kernel's fused MoE in Triton; it takes our layout of the weights."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(hidden, gate_up, down, indices.int(), weights)

    return run


def scatter() -> Form:
    """scattermoe's two products, scattered to groups and back."""
    from scattermoe.parallel_experts import (  # pyright: ignore[reportMissingImports]
        flatten_sort_count,
        parallel_linear,
    )

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        order = flatten_sort_count(indices, num_experts=gate_up.shape[0])
        up = parallel_linear(hidden, gate_up.transpose(1, 2), indices.shape[1], *order, grouped_out=True)
        gate, up = up.chunk(2, dim=-1)
        return parallel_linear(F.silu(gate) * up, down.transpose(1, 2), 1, *order, grouped_in=True, gates=weights)

    return run


def vllm() -> Form:
    """vLLM's Triton kernel, with its tuned tiles if the package has a table for the device; no backward."""
    from vllm.model_executor.layers.fused_moe import fused_experts  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(hidden, gate_up, down, weights.float(), indices.int())

    return run


ADAPTERS: dict[str, tuple[str, Callable[[], Form]]] = {
    "sonic-moe": ("sonicmoe", sonic), "liger": ("liger_kernel", liger),
    "scattermoe": ("scattermoe", scatter), "vllm": ("vllm", vllm),
}


def _made(make: Callable[[], Form], package: str) -> Form | str:
    try:
        return make()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        return f"{package} is not installed"


def _imported(text: str) -> Form:
    """--impl [NAME=]package.module:function."""
    module, _, function = text.rpartition("=")[2].partition(":")
    if not module or not function:
        raise ValueError(f"--impl {text!r}: write [NAME=]package.module:function")
    try:
        implementation: Any = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that yours imports
        raise ValueError(f"--impl {text!r}: there is no module {module!r} (is its folder in PYTHONPATH?)") from None
    except AttributeError:
        raise ValueError(f"--impl {text!r}: the module {module!r} has no {function!r}") from None
    if not callable(implementation):
        raise ValueError(f"--impl {text!r}: {function!r} is a {type(implementation).__name__}, not a function")
    return cast(Form, implementation)
