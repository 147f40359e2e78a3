"""Comparisons of single operations: the rule, the convolution, and one token of a layer as one operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.delta import peers
from benchmarks.delta.scenarios import DTYPES, FULL_SIZE, Answer, Comparison, Implementation, Scenario, Sizes, draw_gates
from qwen35moe import backends, ops
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule

direct_short_convolution = ops.short_convolution.definition
delta_net_step = ops.delta_net_step.definition
recurrent_gated_delta_rule = ops.gated_delta_rule.definition

DEFINITION_TOKENS = 64  # longest input on which a definition that loops over tokens is timed
_SLOW = {("gated_delta_rule", "recurrent"), ("short_convolution", "direct")}


def registered(
    scenario: Scenario, operation: str, args: tuple, kwargs: dict[str, Any], make: Callable[[Any], Implementation]
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """`make(function)` of our implementations that run these arguments, and the reasons why the others cannot."""
    running: dict[str, Implementation] = {}
    refused: dict[str, str] = {}
    for entry in backends.implementations(operation):
        with torch.set_grad_enabled(scenario.mode == "train"):
            reason = entry.refusal(args, kwargs)
        if reason is None and (operation, entry.name) in _SLOW and scenario.tokens > DEFINITION_TOKENS:
            reason = f"the definition is timed up to {DEFINITION_TOKENS} tokens only"
        if reason is None:
            running[f"ours {entry.name}"] = make(entry.fn)
        else:
            refused[f"ours {entry.name}"] = reason
    return running, refused


def auto(scenario: Scenario, operation: str, args: tuple, kwargs: dict[str, Any]) -> str:
    """The name of the implementation that the library chooses."""
    with torch.set_grad_enabled(scenario.mode == "train"):
        return f"ours {backends.resolve(operation, *args, **kwargs).name}"


def rule(scenario: Scenario, device: str, sizes: Sizes = FULL_SIZE) -> Comparison:
    """The rule alone; one token continues from a state. The truth covers one key head, since heads do not interact."""
    s, generator = scenario, torch.Generator().manual_seed(0)
    shapes = {"query": (sizes.groups, sizes.key), "key": (sizes.groups, sizes.key), "value": (sizes.heads, sizes.value)}
    values = {
        name: torch.randn(s.batch, s.tokens, *shape, generator=generator).to(device, DTYPES[s.dtype])
        for name, shape in shapes.items()
    }
    values["decay"] = draw_gates(s.gates, s.batch, s.tokens, sizes.heads, generator).to(device)
    values["beta"] = torch.rand(s.batch, s.tokens, sizes.heads, generator=generator).to(device)
    if s.tokens == 1:
        values["state"] = torch.randn(s.batch, sizes.heads, sizes.key, sizes.value, generator=generator).to(device)
    values = {name: tensor.requires_grad_(s.mode == "train") for name, tensor in values.items()}
    qkv = (values["query"], values["key"], values["value"])
    options = {name: tensor for name, tensor in values.items() if name not in ("query", "key", "value")}
    repeats = sizes.heads // sizes.groups
    ends = {"query": 1, "key": 1, "d_query": 1, "d_key": 1}

    def view(answer: Answer) -> Answer:
        axis = {"recurrent_state": 1, "state": 1, "d_state": 1}
        return {n: t.narrow(axis.get(n, 2), 0, ends.get(n, repeats)) for n, t in answer.items()}

    cotangents = {
        "out": torch.randn(values["value"].shape, generator=generator).to(device, DTYPES[s.dtype]),
        "recurrent_state": torch.randn(s.batch, sizes.heads, sizes.key, sizes.value, generator=generator).to(device),
    }

    def truth() -> Answer:
        """Outputs of the definition and gradients of the chunked form, both in float64: the tests compare the two."""
        part = {n: t.detach().double().requires_grad_(s.mode == "train") for n, t in view(values).items()}
        weights = {n: t.double() for n, t in view(cotangents).items()}
        by_chunks = Implementation(lambda: _ours(chunked_gated_delta_rule, part), part)
        with torch.no_grad():
            outputs = _ours(recurrent_gated_delta_rule, part)
        return (by_chunks.answer("train", weights) if s.mode == "train" else {}) | outputs

    compared: dict[str, Implementation] = {}
    refused: dict[str, str] = {}
    peer = peers.modeling()
    if peer is not None:
        theirs = peer.torch_recurrent_gated_delta_rule if s.tokens == 1 else peer.torch_chunk_gated_delta_rule
        compared["transformers"] = Implementation(lambda: peers.rule(theirs, values), values)
    fla, reason = peers.fla_rule(s, device)
    if reason is None:
        compared["fla"] = Implementation(lambda: peers.rule(fla, values), values)
    else:
        refused["fla"] = reason
    ours, reasons = registered(
        s, "gated_delta_rule", qkv, options, lambda function: Implementation(partial(_ours, function, values), values)
    )
    moved = 2 * values["state"].nbytes if s.tokens == 1 else 0
    chosen = auto(s, "gated_delta_rule", qkv, options)
    baseline = "transformers" if peer is not None else chosen
    return Comparison(
        compared | ours, truth, baseline, chosen, list(values.values()), cotangents, view,
        refused=refused | reasons, moved=moved,
    )


def _ours(function: Callable[..., Any], values: dict[str, Tensor]) -> Answer:
    named = {name: tensor for name, tensor in values.items() if name not in ("query", "key", "value")}
    out, state = function(values["query"], values["key"], values["value"], **named)
    return {"out": out, "recurrent_state": state}


def convolution(scenario: Scenario, device: str, sizes: Sizes = FULL_SIZE) -> Comparison:
    """The causal convolution and SiLU, from and to [B, T, C]."""
    s, generator = scenario, torch.Generator().manual_seed(0)
    x = torch.randn(s.batch, s.tokens, sizes.channels, generator=generator).to(device, DTYPES[s.dtype])
    weight = (torch.randn(sizes.channels, sizes.taps, generator=generator) / 2).to(device, DTYPES[s.dtype])
    leaves = {"x": x.requires_grad_(s.mode == "train"), "weight": weight.requires_grad_(s.mode == "train")}
    cotangents = {"out": torch.randn(x.shape, generator=generator).to(device, DTYPES[s.dtype])}

    def call(function: Callable[..., Any], x: Tensor, weight: Tensor) -> Answer:
        return {"out": function(x, weight)[0]}

    def truth() -> Answer:
        wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
        return Implementation(lambda: call(direct_short_convolution, **wide), wide).answer(s.mode, cotangents)

    compared: dict[str, Implementation] = {}
    refused: dict[str, str] = {}
    peer, package = peers.modeling(), peers.optional("causal_conv1d")
    if peer is not None:
        compared["transformers"] = Implementation(lambda: peers.convolution(peer.causal_conv1d_fn, x, weight), leaves)
    if package is not None and device.startswith("cuda"):
        compared["causal_conv1d"] = Implementation(lambda: peers.convolution(package.causal_conv1d_fn, x, weight), leaves)
    else:
        refused["causal_conv1d"] = "not installed" if package is None else "runs on a GPU only"
    ours, reasons = registered(
        s, "short_convolution", (x, weight), {}, lambda function: Implementation(partial(call, function, x, weight), leaves)
    )
    chosen = auto(s, "short_convolution", (x, weight), {})
    baseline = "transformers" if peer is not None else chosen
    return Comparison(
        compared | ours, truth, baseline, chosen, [x, weight], cotangents, refused=refused | reasons, moved=2 * x.nbytes
    )


def fused_step(scenario: Scenario, device: str, sizes: Sizes = FULL_SIZE) -> Comparison:
    """The operation delta_net_step: everything between the projections of a layer, for one token of each row."""
    s, dtype, generator = scenario, DTYPES[scenario.dtype], torch.Generator().manual_seed(0)

    def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, to)

    wide = torch.float32
    args = (
        random(s.batch, sizes.channels), random(s.batch, sizes.heads, sizes.value),
        random(s.batch, sizes.heads), random(s.batch, sizes.heads),
    )
    state = {
        "conv_state": random(s.batch, sizes.channels, sizes.taps - 1),
        "recurrent_state": random(s.batch, sizes.heads, sizes.key, sizes.value, to=wide),
    }
    options = {
        "conv_weight": random(sizes.channels, sizes.taps) / 2, "A_log": random(sizes.heads, to=wide),
        "dt_bias": random(sizes.heads, to=wide), "norm_weight": torch.ones(sizes.value, device=device),
        "groups": sizes.groups, "eps": 1e-6,
    }

    def call(function: Callable[..., Any], state: dict[str, Tensor]) -> Answer:
        out, conv_state, recurrent_state = function(*args, **state, **options)
        return {"out": out, "conv_state": conv_state, "recurrent_state": recurrent_state}

    def truth() -> Answer:
        with torch.no_grad():
            doubles = {n: v.double() if isinstance(v, Tensor) else v for n, v in (state | options).items()}
            out, conv_state, recurrent_state = delta_net_step(*(x.double() for x in args), **doubles)
        return {"out": out, "conv_state": conv_state, "recurrent_state": recurrent_state}

    def make(function: Callable[..., Any]) -> Implementation:
        own = {n: t.clone() for n, t in state.items()}  # it may be written in place
        return Implementation(partial(call, function, own))

    compared, refused = registered(s, "delta_net_step", args, state | options, make)
    moved = 2 * sum(t.nbytes for t in state.values()) + 2 * args[1].nbytes + args[0].nbytes
    chosen = auto(s, "delta_net_step", args, state | options)
    return Comparison(compared, truth, "ours torch", chosen, [*args, *state.values()], refused=refused, moved=moved)
