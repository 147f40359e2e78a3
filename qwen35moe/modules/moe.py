"""The feed-forward half of a layer: a sparse mixture of experts with a gated shared expert, or one dense MLP.

route -> chosen experts, weighted  +  sigmoid(gate) * shared expert
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.config import TextConfig
from qwen35moe.modules.hooks import (
    GLOBAL_PRE_HOOKS,
    add_residual,
    fusible,
    in_autocast_dtype,
    in_dtype_of,
    project,
    weight_of,
)
from qwen35moe.modules.initialise import Draws, Initialised, initialise
from qwen35moe.ops.cpu.packed_weight import PackedExperts
from qwen35moe.ops.experts import Tap, router_choice
from qwen35moe.routing import ForcedRouting, RouterOutput
from qwen35moe.taps import patched, tap, tapped

_EXPERT_VALUES = ("expert_in", "expert_act", "expert_out")


class MLP(Initialised):
    """down (silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, std: float = 0.02) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        initialise(self, std)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D]; returns [..., D]."""
        act = None if x.is_cpu and ops.swiglu.is_ordinary(self) else self._fused_act(x)
        if act is None:
            act = F.silu(project(self.gate_proj, x)) * project(self.up_proj, x)
        return project(self.down_proj, act)

    def _fused_act(self, x: Tensor) -> Tensor | None:
        """silu(gate x) * up x by a fused implementation of `ops.swiglu`; None where `forward` composes it."""
        gate, up = weight_of(self.gate_proj, nn.Linear, x.dtype), weight_of(self.up_proj, nn.Linear, x.dtype)
        if torch.is_grad_enabled() or gate is None or up is None:
            return None
        return ops.swiglu.fused(x, gate, up, caller=self)


class DenseMLP(MLP):
    """The feed-forward of dense models, with the tap `output`."""

    def __init__(self, config: TextConfig) -> None:
        assert config.intermediate_size is not None  # checked by the configuration of a dense model
        super().__init__(config.hidden_size, config.intermediate_size, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        return tap(self, "output", super().forward(x))


class Router(Initialised):
    """weight [E, D]; hidden [N, D] to logits [N, E], weights [N, k] and indices [N, k]. See `ops.router`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        initialise(self, config.initializer_range)

    def draw(self, draws: Draws, std: float) -> None:
        """normal(0, std)."""
        draws.normal(self.weight, std)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight
        if weight.dtype is not hidden.dtype:
            hidden = in_dtype_of(weight, hidden)
        return ops.router(hidden, weight, top_k=self.top_k, caller=self)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) [N, k] of the experts that logits [N, E] choose: for logits that a patch has replaced. A router
        that chooses otherwise overrides this too."""
        return router_choice(logits, self.top_k)

    def extra_repr(self) -> str:
        experts, width = self.weight.shape
        return f"num_experts={experts}, hidden_size={width}, top_k={self.top_k}"


class Experts(Initialised):
    """All experts of a layer: gate_up_proj [E, 2F, D] (gate rows first), down_proj [E, D, F]. See `ops.experts`.

    `model.pack_weights()` makes both a PackedExperts: a tensor of this shape that holds one packed matrix for each expert.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, inner, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        initialise(self, config.initializer_range)

    def draw(self, draws: Draws, std: float) -> None:
        """normal(0, std)."""
        draws.normal(self.gate_up_proj, std)
        draws.normal(self.down_proj, std)

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor, tap: Tap | None = None) -> Tensor:
        """hidden [N, D], indices and weights [N, k]; returns [N, D]. tap: see `ops.experts.by_expert`."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if gate_up.dtype is not hidden.dtype:
            hidden = in_dtype_of(gate_up, hidden)
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
            if indices.numel() < len(gate_up) and tap is None and not torch.is_grad_enabled() and type(gate_up) is nn.Parameter:
                chosen = indices.flatten()  # only these are cast, as in a decode step
                gate_up, down = gate_up[chosen], down[chosen]
                indices = torch.arange(len(chosen), dtype=indices.dtype, device=indices.device).view_as(indices)
            hidden, gate_up, down = in_autocast_dtype(hidden, gate_up, down)
        return ops.experts(hidden, gate_up, down, indices, weights, tap=tap, caller=self)

    def extra_repr(self) -> str:
        experts, width, inner = self.down_proj.shape
        packed = ", packed" if isinstance(self.down_proj, PackedExperts) else ""
        return f"num_experts={experts}, hidden_size={width}, intermediate_size={inner}{packed}"


class RouteLater:
    """In place of a RouterOutput: the block calls `route` for what its forward got, and stores the result here."""

    def __init__(self, forced: ForcedRouting | None) -> None:
        self.forced = forced
        self.result: RouterOutput | None = None


# For a block inside another module, which calls it with the hidden states alone.
_LATER: ContextVar[RouteLater | None] = ContextVar("later", default=None)


def chooses_inside(mlp: nn.Module) -> bool:
    """Whether a block, or what stands in its place, is to be called with the hidden states alone: see `routed_inside`."""
    if not isinstance(mlp, SparseMoeBlock) or mlp._forward_pre_hooks or GLOBAL_PRE_HOOKS:
        return True
    return "forward" in mlp.__dict__ and "router" not in inspect.signature(mlp.forward).parameters


def routed_inside(
    mlp: nn.Module, hidden: Tensor, forced: ForcedRouting | None, run: Callable[..., Tensor]
) -> tuple[Tensor, RouterOutput | None]:
    """mlp(hidden) and what its router chose, for a block that chooses when it is called: one with hooks on its input, which the
    router reads too, with a forward of the instance that takes no `router`, or inside another module (an adapter, a wrapper).
    Without a router run(mlp, hidden) and None; ValueError if `forced` was to replace its choice."""
    later = RouteLater(forced)
    if isinstance(mlp, SparseMoeBlock) and "forward" not in mlp.__dict__:
        return mlp(hidden, router=later), later.result  # by keyword: a hook returns the positional arguments
    if any(isinstance(part, SparseMoeBlock) for part in mlp.modules()):
        token = _LATER.set(later)
        try:
            change = mlp(hidden)
        finally:
            _LATER.reset(token)
    else:
        change = run(mlp, hidden)
    if later.result is None and forced is not None:
        raise ValueError(f"routing= has no effect on {type(mlp).__name__}, in which no router of this library was called")
    return change, later.result


@fusible
class SparseMoeBlock(Initialised):
    """y = experts(x) + sigmoid(w_s x) * shared_expert(x)."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config)
        self.experts: nn.Module = Experts(config)  # or UnfusedExperts
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size, config.initializer_range)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        initialise(self, config.initializer_range)

    def route(self, hidden: Tensor, forced: ForcedRouting | None = None) -> RouterOutput:
        """The router's choice for hidden [N, D], or that of `forced`."""
        logits, weights, indices = self.gate(hidden)
        if patched(self, "router_logits"):
            self._check_choice(logits, weights, indices)
            logits = tap(self, "router_logits", logits)
            indices, weights = self.gate.choose(logits)
        else:
            logits = tap(self, "router_logits", logits)
        if forced is not None:
            indices, weights = forced(self.layer, logits)
        return RouterOutput(logits, tap(self, "indices", indices), tap(self, "weights", weights))

    def forward(
        self, hidden: Tensor, router: RouterOutput | RouteLater | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """hidden [B, T, D]; returns [B, T, D]. router: the result of `route`; None and RouteLater call `route` here. With the
        residual stream, residual [B, T, D], returns its sum with the output."""
        rows = hidden.flatten(0, -2)
        if not isinstance(router, RouterOutput):
            later = _LATER.get() if router is None else router
            router = self.route(rows, None if later is None else later.forced)
            if later is not None:
                later.result = router
        arguments = rows, router.indices, router.weights
        if tapped(self, _EXPERT_VALUES):
            self._check_experts()
            arguments = (*arguments, partial(tap, self))
        routed = tap(self, "routed", self.experts(*arguments))
        shared = self.shared_expert(rows)
        if residual is not None:
            total = self._fused_sum(residual, routed, shared, rows)
            if total is not None:
                return total
        gate = project(self.shared_expert_gate, rows).sigmoid()
        output = tap(self, "output", (routed + tap(self, "shared", gate * shared)).view_as(hidden))
        return output if residual is None else add_residual(residual, output)

    def _fused_sum(self, residual: Tensor, routed: Tensor, shared: Tensor, rows: Tensor) -> Tensor | None:
        """residual plus the output of the block by a fused implementation of `ops.add_shared_expert`; None where `forward`
        composes it. It reads the weight of shared_expert_gate without calling it, and materialises no output."""
        weight = weight_of(self.shared_expert_gate, nn.Linear, rows.dtype)
        if weight is None or tapped(self, ("shared", "output")):
            return None
        total = ops.add_shared_expert.fused(residual.view_as(rows), routed, shared, rows, weight, caller=self)
        return None if total is None else total.view_as(residual)

    def _check_choice(self, logits: Tensor, weights: Tensor, indices: Tensor) -> None:
        """ValueError where the router, with its hooks, has not chosen as its method `choose` does: patched logits would
        choose by another rule than the model's."""
        kind = type(self.gate).__name__
        if hasattr(self.gate, "choose"):
            again, again_weights = self.gate.choose(logits)
            zeros = torch.zeros_like(logits)
            one, other = (zeros.scatter(-1, i, w.to(zeros.dtype)) for i, w in ((indices, weights), (again, again_weights)))
            if torch.allclose(one, other, rtol=1e-2, atol=1e-6, equal_nan=True):
                return
        raise ValueError(
            f"a patch of router_logits needs the rule by which {kind} chooses: give it a method choose(logits) -> (indices, "
            "weights) that agrees with its forward, or patch indices and weights"
        )

    def _check_experts(self) -> None:
        """ValueError where the experts are a module that takes no tap."""
        try:
            parameters = inspect.signature(self.experts.forward).parameters.values()
        except (TypeError, ValueError):
            return  # not Python: it is called with the tap
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if sum(p.kind in positional for p in parameters) < 4 and all(p.kind != p.VAR_POSITIONAL for p in parameters):
            raise ValueError(
                f"a tap reads {', '.join(_EXPERT_VALUES)}, which {type(self.experts).__name__} does not materialise: its "
                "forward takes (hidden, indices, weights), and for taps a fourth argument tap(name, value) -> value"
            )
