"""Comparisons of whole layers: Gated DeltaNet over many tokens, and one cached token through several layers in turn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.delta import peers
from benchmarks.delta.scenarios import DTYPES, FULL_SIZE, Answer, Comparison, Implementation, Scenario, Sizes
from qwen35moe import Config, backends
from qwen35moe.cache import DeltaNetState, DeltaNetUpdate
from qwen35moe.models.plan import plan_layout
from qwen35moe.models.text import Qwen3_5MoeTextModel
from qwen35moe.modules.context import LayerContext

PROMPT = 8  # tokens in the cache before the decoded one
# Forms that the tests compare with the definitions in float64; the rule's definition would take minutes at these sizes.
_TRUE = {"gated_delta_rule": "torch", "short_convolution": "direct"}


def build(scenario: Scenario, device: str, sizes: Sizes) -> tuple[list[Any], Any]:
    """Our layers with a model's initial weights and the gates of the scenario, and their configuration.

    A_log and dt_bias are rounded to the layers' dtype, as transformers stores them: both libraries have equal weights.
    """
    count = scenario.layers
    text = Config.preset("35b-a3b").replace(
        **{"num_hidden_layers": count, "layer_types": ("linear_attention",) * count, "hidden_size": sizes.hidden},
        **{"linear_num_key_heads": sizes.groups, "linear_num_value_heads": sizes.heads, "vocab_size": 8},
        **{"linear_key_head_dim": sizes.key, "linear_value_head_dim": sizes.value, "linear_conv_kernel_dim": sizes.taps},
        **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ).text_config
    dtype = DTYPES[scenario.dtype]
    model = Qwen3_5MoeTextModel(text).init_weights(seed=0, gates=scenario.gates).to(dtype).to(device)
    layers: list[Any] = [layer.get_submodule("linear_attn") for layer in model.layers]
    with torch.no_grad():
        for layer in layers:
            for gate in (layer.A_log, layer.dt_bias):
                gate.copy_(gate.to(dtype))
    return layers, text


def layer_context(x: Tensor) -> LayerContext:
    """The context of a forward without padding on x [B, T, D]; Gated DeltaNet does not read the rotation."""
    return LayerContext(plan_layout(x.shape[0], x.shape[1], x.device), (torch.empty(0), torch.empty(0)))


def layer(scenario: Scenario, device: str, sizes: Sizes = FULL_SIZE) -> Comparison:
    """One layer on normed inputs, without a cache: [B, T, D] to [B, T, D]."""
    s, train = scenario, scenario.mode == "train"
    (ours,), text = build(s, device, sizes)
    ours.requires_grad_(train)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(s.batch, s.tokens, sizes.hidden, generator=generator).to(device, DTYPES[s.dtype]).requires_grad_(train)
    cotangents = {"out": torch.randn(x.shape, generator=generator).to(device, DTYPES[s.dtype])}
    context = layer_context(x)

    def run(layer: Any, x: Tensor) -> Answer:
        return {"out": layer(x, context)[0]}

    def truth() -> Answer:
        wide, inputs = copy.deepcopy(ours).double(), x.detach().double().requires_grad_(train)
        with backends.use(**_TRUE):
            return Implementation(lambda: run(wide, inputs), _leaves(wide, inputs)).answer(s.mode, cotangents)

    compared = {"ours": Implementation(lambda: run(ours, x), _leaves(ours, x))}
    weights, baseline = list(ours.parameters()), "ours"
    if peers.modeling() is not None:
        (theirs,), _ = peers.layers([ours], text)
        theirs.requires_grad_(train)
        compared = {"transformers": Implementation(lambda: {"out": theirs(x)}, _leaves(theirs, x))} | compared
        weights, baseline = weights + list(theirs.parameters()), "transformers"
    return Comparison(compared, truth, baseline, "ours", [x, *weights], cotangents, weights=weights)


def _leaves(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x} | dict(layer.named_parameters())


class _Chain:
    """One token after the other through all layers, each of which continues from its own state."""

    def __init__(self, layers: list[Any], prompt: Tensor, token: Tensor) -> None:
        self.layers, self.token = layers, token
        self.context, before = layer_context(token), layer_context(prompt)
        with torch.inference_mode():
            self.states = [_state(layer(prompt, before)[1]) for layer in layers]

    def __call__(self) -> Answer:
        outputs = []
        for index, (layer, state) in enumerate(zip(self.layers, self.states, strict=True)):
            out, after, _ = layer(self.token, self.context, state)
            self.states[index] = _state(after)
            outputs.append(out)
        return {"out": torch.stack(outputs)}


def _state(update: DeltaNetUpdate) -> DeltaNetState:
    return DeltaNetState(update.conv_state, update.recurrent_state)


def step(scenario: Scenario, device: str, sizes: Sizes = FULL_SIZE) -> Comparison:
    """One token of each row through all layers, each with its own state: weights are read from memory, not from cache."""
    s, generator = scenario, torch.Generator().manual_seed(1)
    ours, text = build(s, device, sizes)
    tokens = torch.randn(s.batch, PROMPT + 1, sizes.hidden, generator=generator).to(device, DTYPES[s.dtype])
    prompt, token = tokens[:, :PROMPT], tokens[:, PROMPT:].contiguous()

    def truth() -> Answer:
        context = layer_context(tokens)
        with torch.no_grad(), backends.use(**_TRUE):
            wide = [copy.deepcopy(layer).double()(tokens.double(), context)[0][:, PROMPT:] for layer in ours]
        return {"out": torch.stack(wide)}

    compared = {"ours": Implementation(_Chain(ours, prompt, token))}
    baseline = "ours"
    if peers.modeling() is not None:
        compared = {"transformers": Implementation(_their_chain(ours, text, prompt, token))} | compared
        baseline = "transformers"
    weights = [p for layer in ours for p in layer.parameters()]
    state_bytes = s.batch * sizes.heads * sizes.key * sizes.value * 4 * s.layers
    moved = sum(w.nbytes for w in weights) + 2 * state_bytes
    return Comparison(compared, truth, baseline, "ours", [token, *weights], weights=weights, moved=moved)


def _their_chain(ours: list[Any], text: Any, prompt: Tensor, token: Tensor) -> Any:
    import transformers

    layers, config = peers.layers(ours, text)
    cache = transformers.DynamicCache(config=config)
    with torch.inference_mode():
        for layer in layers:
            layer(prompt, cache_params=cache)
    return lambda: {"out": torch.stack([layer(token, cache_params=cache) for layer in layers])}
