"""A model of the 35B's shape: on the GPU against the CPU in float64, beside transformers on the same GPU.

Four layers (three Gated DeltaNet, one attention) of full width with fewer experts and words, so that float64 on a CPU takes
seconds. Every model gets the same bfloat16 weights, and the experts that float64 chose: a flip of a near tie would hide errors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.models import WRITERS, WRITTEN
from benchmarks.gpu.rows import RIGHT, WRONG, Rows, bounded, said
from benchmarks.gpu.work import Work
from benchmarks.tools.common import relative_error
from qwen35moe import Config, Qwen3_5MoeForCausalLM, backends

BEYOND = 1.25  # times the peer's error
TENSOR_BEYOND, TENSOR = 8, {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of one tensor's gradient
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 0.0}  # the numerical contract's bound in float32
SMALL = {
    "hidden_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24, "vocab_size": 96, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
DECODED = 3


def configuration(small: bool, layers: int, **changes: Any) -> Config:
    """The 35B's decoder with its first layers."""
    config = Config.preset("35b-a3b").text_only()
    kinds = tuple(config.text_config.layer_types[:layers])
    return config.replace(num_hidden_layers=layers, layer_types=kinds, **(SMALL if small else changes))


def build(config: Config, device: str) -> Any:
    """A model in bfloat16 with random weights drawn on the device: the library's own init draws on the CPU, for minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model: Any = Qwen3_5MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter, generator)
    return model.requires_grad_(False)


def fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Ordinary gates; values that bfloat16 holds, also where the model keeps float32: transformers rounds these."""
    if name.endswith("A_log"):
        parameter.uniform_(1, 16, generator=generator).log_()
    elif name.endswith("dt_bias"):
        parameter.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        parameter.copy_(parameter + torch.log(-torch.expm1(-parameter)))  # the inverse of softplus
    elif name.endswith("conv1d.weight"):
        parameter.uniform_(-0.5, 0.5, generator=generator)
    elif name.endswith("linear_attn.norm.weight"):
        parameter.fill_(1)
    elif parameter.dim() == 1:
        parameter.normal_(0, 0.1, generator=generator)
    else:
        parameter.normal_(0, 0.02 * (WRITTEN if name.endswith(WRITERS) else 1), generator=generator)
    parameter.copy_(parameter.to(torch.bfloat16))


def run(rows: Rows, work: Work) -> None:
    """All comparisons; float64 is computed once."""
    if not rows.selects_any("model"):
        return
    tokens = 9 if work.small else 150
    config = configuration(work.small, 4, num_experts=64, vocab_size=8192)
    source = build(config, work.device)
    vocabulary = config.text_config.vocab_size
    ids = torch.randint(1, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(1))
    exact = reference(source, ids)
    for dtype in (torch.bfloat16, torch.float32):
        check_dtype(rows, work, source, ids, exact, dtype)


def reference(source: Any, ids: Tensor) -> SimpleNamespace:
    """Logits, gradients of all parameters and the routing, in float64 on the CPU."""
    model = clone(source, "cpu", torch.float64)
    out = model(ids, labels=ids, output_routing=True)
    gradients = gradients_of(model, out.loss)
    routing = out.routing.indices  # [layers, B * T, top_k]
    return SimpleNamespace(logits=out.logits.detach(), gradients=gradients, routing=routing)


def clone(source: Any, device: str, dtype: torch.dtype) -> Any:
    """The same weights in another dtype, with gradients."""
    with torch.device("meta"):
        model: Any = Qwen3_5MoeForCausalLM(source.config)
    weights = {}
    for name, value in source.state_dict().items():  # what the model keeps in float32 stays wider than bfloat16
        weights[name] = value.detach().to(device, torch.promote_types(value.dtype, dtype), copy=True)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(True)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def check_dtype(rows: Rows, work: Work, source: Any, ids: Tensor, exact: SimpleNamespace, dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    if not rows.selects_any(f"model/{name}"):
        return
    peer, errors = peer_errors(work, source, ids, exact, dtype)
    state: dict[str, Any] = {}

    def ours() -> dict[str, Any]:
        if not state:
            state["model"] = clone(source, work.device, dtype)
            with work.own_kernels():
                state["errors"] = our_errors(work, state["model"], ids, exact)
        return state["errors"]

    for what in ("logits", "gradients", "decode"):
        rows.measure(f"model/{name}/{what}", lambda what=what: judged(what, ours()[what], errors, peer, dtype))
    rows.measure(f"model/{name}/worst_gradient", lambda: worst_gradient(ours()["tensors"], errors["tensors"], dtype))


def worst_gradient(ours: dict[str, float], theirs: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """The tensor nearest its bound: a mean over tensors would hide one that is wrong."""
    bounds = {name: max(TENSOR_BEYOND * theirs[name], TENSOR[dtype]) for name in ours}
    name = max(ours, key=lambda name: ours[name] / bounds[name])
    return {**bounded(ours[name], bounds[name]), "note": f"{name}, the peer's {theirs[name]:.1e}"}


def judged(what: str, error: float, theirs: dict[str, Any], peer: str, dtype: torch.dtype) -> dict[str, Any]:
    """Our error beside the peer's; the decoded tokens' beside its logits'."""
    other = theirs["logits" if what == "decode" else what]
    bound = max(BEYOND * other, FLOOR[dtype])
    kind = "geometric mean over tensors" if what == "gradients" else "rms"
    return {"verdict": RIGHT if error <= bound else WRONG, "measured": error, "unit": f"error ({kind})",
            "target": f"<= {bound:.2g}", "note": f"{peer} {other:.2e}"}  # fmt: skip


def our_errors(work: Work, model: Any, ids: Tensor, exact: SimpleNamespace) -> dict[str, Any]:
    """Of the logits, the gradients, and the last tokens decoded one by one from a static cache."""
    ids, B, T = ids.to(work.device), *ids.shape
    routing = by_token(exact.routing, B, T).to(work.device)
    out = model(ids, labels=ids, routing=routing)
    errors = {"logits": rms(out.logits, exact.logits), **gradient_errors(gradients_of(model, out.loss), exact.gradients)}
    with torch.no_grad():
        cache, start = model.new_cache(B, max_length=T + 1), T - DECODED
        model(ids[:, :start], cache=cache, routing=routing[:, :start], logits_to_keep=1)
        steps = [model(ids[:, t : t + 1], cache=cache, routing=routing[:, t : t + 1]).logits for t in range(start, T)]
        errors["decode"] = rms(torch.cat(steps, 1), exact.logits[:, start:])
    return errors


def by_token(routing: Tensor, B: int, T: int) -> Tensor:
    """[layers, B * T, top_k] as [B, T, layers, top_k]."""
    return routing.view(len(routing), B, T, -1).permute(1, 2, 0, 3).contiguous()


def rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values; inf where not finite."""
    error = actual.detach().double().cpu() - expected
    value = (error.square().mean() / expected.square().mean()).sqrt().item()
    return value if value == value else float("inf")


def gradient_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors' relative errors, and their geometric mean."""
    if missing := set(expected) - set(actual):
        raise ValueError(f"no gradient of {sorted(missing)[0]}")
    errors = {name: max(relative_error(actual[name], value), 1e-12) for name, value in expected.items()}
    return {"gradients": math.exp(sum(map(math.log, errors.values())) / len(errors)), "tensors": errors}


def peer_errors(
    work: Work, source: Any, ids: Tensor, exact: SimpleNamespace, dtype: torch.dtype
) -> tuple[str, dict[str, Any]]:
    """transformers with eager attention and experts, in plain PyTorch, on the same device; without it, our definitions."""
    model = clone(source, work.device, dtype)
    try:
        errors = transformers_errors(work, model, ids, exact)
        return "transformers", errors
    except Exception as error:  # not installed, or without this model
        reason = said(error)
    with backends.use(**{name: definition(name) for name in backends.OPERATIONS}):
        return f"definitions (transformers: {reason})", our_errors(work, model, ids, exact)


def definition(operation: str) -> str:
    """The name of an operation's definition among its implementations."""
    function = backends.cases(operation)[0]
    return next(entry.name for entry in backends.implementations(operation) if entry.fn is function)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within the context these packages cannot be imported, as if they were not installed."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    absent: dict[str, Any] = dict.fromkeys([*packages, *before])
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def transformers_errors(work: Work, ours: Any, ids: Tensor, exact: SimpleNamespace) -> dict[str, Any]:
    """Of the logits and gradients."""
    from benchmarks.decode.models import Setting, Theirs
    from benchmarks.text_4b.peers import Transformers

    with hidden("fla", "causal_conv1d"):  # transformers binds them when its modeling file is imported
        theirs = Theirs(ours, Setting(experts="eager", attention="eager"))
    model = theirs.model.to(work.device).requires_grad_(True)
    replay = Transformers.__new__(Transformers)
    replay.model, ids = model, ids.to(work.device)
    with replay.replaying(exact.routing.to(work.device)):
        out = model(ids, labels=ids, use_cache=False)
    return {"logits": rms(out.logits, exact.logits), **gradient_errors(gradients_of(model, out.loss), exact.gradients)}
