"""The sparse mixture of experts: the router, and the sum over the chosen experts.

    p = softmax(W_r x),  chosen = the S largest,  w_e = p_e / sum of the chosen
    y = sum over chosen e of w_e * down_e (silu(gate_e x) * up_e x)

Shazeer et al. 2017. Expert weights are grouped: gate_up [E, 2F, D] (gate rows first), down [E, D, F].

Every form takes hidden [N, D], gate_up, down, indices [N, S] and weights [N, S] and returns [N, D] in hidden's dtype:

    loop       the definition
    sorted     pairs sorted by expert, a product per expert hit, streamed (sorted_experts.py): CPUs
    grouped    pairs sorted by expert, torch's grouped_mm, nothing read on the host: GPUs
    gathered   a copy of the chosen weights for every token, one batched product: very few pairs
    watched    shows the values inside

"auto" chooses by `_gathering_is_slower` and its neighbours below, where the measurements stand. A token's experts are
added in the order of their numbers (loop, watched, sorted where the rows of all pairs take more than 32 MB and more than a
float32 sum) or of its slots (the others), always the same for the same arguments; on a GPU, loop and watched need
torch.use_deterministic_algorithms(True) for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.cpu.sorted_experts import sorted_experts
from qwen35moe.ops.precision import wide_dtype

Watch = Callable[[str, Tensor], Tensor]  # shown a value by name, returns what is to be used in its place


def router(hidden: Tensor, weight: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The router's logits, and the weights and indices of the experts it chooses, largest first.

    hidden [N, D], weight [E, D]; returns logits [N, E] and weights [N, S] in hidden's dtype, indices [N, S]. As in
    transformers the product is in the weights' dtype and the softmax in float32 at least.
    """
    logits = F.linear(hidden, weight)
    indices, weights = router_choice(logits, top_k)
    return logits, weights, indices


def router_choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(indices, weights) [N, S] that logits [N, E] choose, largest first."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1)
    chosen, indices = probabilities.topk(top_k, dim=-1)
    return indices, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype)


def chosen_weights(logits: Tensor, indices: Tensor) -> Tensor:
    """The weights [N, S] that logits [N, E] give to experts chosen elsewhere: p_e over the sum of the chosen."""
    probabilities = logits.to(wide_dtype(logits)).softmax(-1).gather(-1, indices)
    return (probabilities / probabilities.sum(-1, keepdim=True)).to(logits.dtype)


def loop_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The definition, expert by expert.

    hidden [N, D], gate_up [E, 2F, D], down [E, D, F], indices [N, S], weights [N, S]; returns [N, D] in hidden's
    dtype, summed in float32 at least.
    """
    dtype = wide_dtype(hidden)
    total = torch.zeros_like(hidden, dtype=dtype)
    for expert in range(gate_up.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if token.numel():
            gate, up = F.linear(hidden[token], gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down[expert])
            total = total.index_add(0, token, out.to(dtype) * weights[token, slot, None].to(dtype))
    return total.to(hidden.dtype)


def grouped_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same through torch's grouped_mm: no number of rows is read on the host, so it can be compiled whole.

    Arguments and result as in the definition.
    """
    dtype, experts, slots = wide_dtype(hidden), gate_up.shape[0], indices.shape[1]
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(experts, device=flat.device), right=True).to(torch.int32)
    gate, up = F.grouped_mm(hidden[order // slots], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    by_slot = out[order.argsort()].view(*indices.shape, hidden.shape[1])  # gathered and summed, not scattered: no atomics
    return (by_slot.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(hidden.dtype)


def gathered_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same with a copy of the chosen experts' weights for every pair, [N S, 2F, D] and [N S, D, F]: nothing to sort.

    Arguments and result as in the definition.
    """
    dtype, flat = wide_dtype(hidden), indices.reshape(-1)
    rows = hidden.repeat_interleave(indices.shape[1], dim=0)[..., None]
    gate, up = torch.bmm(gate_up[flat], rows).chunk(2, dim=1)
    out = torch.bmm(down[flat], F.silu(gate) * up).view(*indices.shape, hidden.shape[1])
    return (out.to(dtype) * weights.to(dtype)[..., None]).sum(1).to(hidden.dtype)


def _cannot_group(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> str | None:
    if watch is not None:
        return _UNSEEN
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"grouped_mm takes float32 and bfloat16, hidden is {hidden.dtype}"
    if torch.compiler.is_compiling() and hidden.dtype != torch.bfloat16:
        return f"compiled, grouped_mm takes bfloat16 alone, hidden is {hidden.dtype}"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0"
    widths = hidden.shape[-1], down.shape[-1]
    if any(width * hidden.element_size() % 16 for width in widths):
        return f"grouped_mm needs rows of whole 16 bytes, the widths are {widths[0]} and {widths[1]} of {hidden.dtype}"
    return None


_UNSEEN = "somebody listens to expert_in, expert_act or expert_out, which it never forms whole"


def _shows_nothing(*args: Tensor, watch: Watch | None = None) -> str | None:
    return None if watch is None else _UNSEEN


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value


def watched_experts(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, watch: Watch | None = None
) -> Tensor:
    """The same, showing watch(name, value) the rows of all experts, those of one after those of the one before.

    expert_in [R, D], expert_act [R, F] and expert_out [R, D] with R = N S; what watch returns is used.
    """
    watch = watch or _unchanged
    flat, slots = indices.reshape(-1), indices.shape[1]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    rows = watch("expert_in", hidden[order // slots]).split(counts)
    acts = []
    for x, weight in zip(rows, gate_up.unbind(0), strict=False):
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        acts.append(F.silu(gate) * up)
    inner = watch("expert_act", torch.cat(acts)).split(counts)
    out = watch("expert_out", torch.cat([F.linear(x, weight) for x, weight in zip(inner, down.unbind(0), strict=False)]))
    dtype = wide_dtype(hidden)
    scaled = out.to(dtype) * weights.reshape(-1)[order].to(dtype)[:, None]
    return torch.zeros_like(hidden, dtype=dtype).index_add(0, order // slots, scaled).to(hidden.dtype)


# Which form "auto" takes. CPU: 2 cores of Zen 4 (AVX-512 bf16), docs/reports/moe_benchmark.md. CUDA: derived from bytes.
_COPIED = 1 << 20  # CPU: bytes of chosen weights up to which copying them costs less than a product per expert
_FEW_PAIRS = 32  # CUDA: copies move three times the bytes of distinct experts, but in 3 launches instead of some 15


def _gathering_is_slower(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, *_: Tensor, **__: object
) -> str | None:
    pairs = indices.numel()
    if hidden.device.type != "cpu":
        return None if pairs <= _FEW_PAIRS else f"{pairs} pairs: above {_FEW_PAIRS} it copies too much"
    copied = pairs * (gate_up[0].numel() + down[0].numel()) * hidden.element_size()
    return None if copied <= _COPIED else f"it would copy {copied} bytes of weights, above {_COPIED}"


def _grouping_is_slower(hidden: Tensor, *_: Tensor, **__: object) -> str | None:
    if hidden.device.type == "cpu":
        return "on a CPU it touches fresh memory for every pair: half the speed of sorted at 2048 tokens of 35b-a3b"
    return None


def _router_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for tokens, width, experts, top_k in ((7, 12, 5, 2), (1, 8, 16, 4)):
        hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(experts, width, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (hidden, weight), {"top_k": top_k}


def _expert_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for tokens, width, inner, experts, top_k in ((7, 12, 5, 6, 2), (1, 8, 3, 4, 4), (70, 16, 8, 3, 1), (9, 24, 16, 5, 2)):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        scores = torch.rand(tokens, experts, generator=generator)
        indices = scores.topk(top_k, dim=-1).indices.to(device)
        weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(device, dtype)
        tensors = random(tokens, width), random(experts, 2 * inner, width), random(experts, width, inner)
        yield (*tensors, indices, weights), {}


backends.register("router", "torch", router)
backends.add_cases("router", router, _router_cases)
backends.register("experts", "gathered", gathered_experts, _shows_nothing, slower=_gathering_is_slower)
backends.register("experts", "grouped", grouped_experts, _cannot_group, slower=_grouping_is_slower)
backends.register("experts", "sorted", sorted_experts, _shows_nothing)
backends.register("experts", "loop", loop_experts, _shows_nothing)
backends.register("experts", "watched", watched_experts)
backends.add_cases("experts", loop_experts, _expert_cases)
