"""The mixture of experts in Triton, forward and backward, and without a sort for few pairs. See README.md for the tiling.

The contract is that of `experts`: hidden [N, D], gate_up [E, 2F, D] (gate rows first), down [E, D, F], indices [N, S],
weights [N, S]; the result is [N, D] in hidden's dtype, a token's experts added in the order of its slots:

    y_n = sum_s weights[n, s] down_e (silu(gate_e x_n) * up_e x_n),   e = indices[n, s]

Between forward and backward only the inputs, the products before the activation [N S, 2F] and the sort are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 64  # pairs up to which nothing is sorted; beyond half as many as experts, several would read the same one


@dataclass(frozen=True)
class Tile:
    """A program's block of the result, the depth of one step, and its warps and stages of loading ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, columns: int, depth: int) -> dict[str, int]:
        """Launch options for a product so wide and deep: no block is larger than that, and none below 16 (tl.dot)."""
        return {
            "BM": self.rows, "BN": min(self.columns, max(16, runtime.power_of_two(columns))),
            "BK": min(self.depth, max(16, runtime.power_of_two(depth))), "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels for so many rows per expert. Those that share a schedule have as many rows."""

    up: Tile
    product: Tile
    act_gradient: Tile
    weight_gradient: Tile

    @property
    def rows(self) -> int:
        return self.up.rows


# (pairs per expert up to which, tiles). Reasoned from shared memory and registers of a Hopper GPU, not tuned.
_HALF = (
    (16, Tiles(Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 4), Tile(16, 128, 128, 4, 3), Tile(128, 128, 16, 8, 7))),
    (64, Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 8, 4), Tile(128, 128, 32, 8, 7))),
    (None, Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(128, 256, 64, 8, 5))),
)
_SINGLE = (
    (16, Tiles(Tile(16, 32, 32, 4, 3), Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3), Tile(64, 64, 16, 4, 3))),
    (None, Tiles(Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3))),
)
_SCHEDULE, _COMBINE = 1024, 4096  # pairs a step of the schedule, numbers a program of the sum
_FEW_UP, _FEW_DOWN = (8, 256), (4, 512)  # columns and depth


def _tiles(dtype: torch.dtype, pairs: int, experts: int) -> Tiles:
    table = _SINGLE if dtype == torch.float32 else _HALF
    return next(tiles for most, tiles in table if most is None or pairs <= most * experts)


def unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None
) -> str | None:
    """Why these kernels cannot run this call, or None."""
    if tap is not None:
        return "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"
    experts = {"gate_up": gate_up, "down": down}
    reason = runtime.unsupported_device(hidden=hidden, **experts, indices=indices, weights=weights)
    if reason := reason or runtime.unsupported_dtype(*_FLOATS, hidden=hidden, weights=weights):
        return reason
    for name, tensor in experts.items():
        if tensor.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} {tensor.dtype}, the kernels take one dtype"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous, and a copy in every call would cost more than the kernels save"
        if tensor[0].numel() >= 1 << 31:
            return f"{name} has {tensor[0].numel()} numbers per expert, the kernels count to 2^31"
    if indices.numel() >= 1 << 31:
        return f"indices has {indices.numel()} pairs, the kernels count to 2^31"
    return None


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None) -> Tensor:
    """y [N, D]; see the top of this file."""
    keep = runtime.needs_gradient(hidden, gate_up, down, weights)
    run = _operation if keep or torch.compiler.is_compiling() else _forward
    return run(hidden, gate_up, down, indices, weights, keep)[0]


class _Schedule:
    """Which rows the programs own: pairs sorted by expert, cut into tiles. Nothing is read on the host, which only knows
    how many tiles there can be at most."""

    def __init__(self, order: Tensor, indices: Tensor, experts: int, rows: int) -> None:
        kernels = runtime.kernels("experts_kernels")

        self.order, pairs = order, order.numel()
        numbers = torch.arange(experts, device=order.device, dtype=torch.int32)
        by_row = indices.reshape(-1)[order].to(torch.int32)
        self.ends = torch.searchsorted(by_row, numbers, right=True, out_int32=True)
        # ceil(c / rows) <= (c + rows - 1) / rows, summed over the experts that have a pair
        self.count = (pairs + min(experts, pairs) * (rows - 1)) // rows
        self.tiles = torch.empty(2, self.count, dtype=torch.int32, device=order.device)
        self.place = torch.empty_like(order)
        kernels.schedule_kernel[(experts,)](
            order, self.ends, self.place, self.tiles, pairs, self.count, E=experts, BM=rows,
            BE=runtime.power_of_two(experts), B=min(_SCHEDULE, runtime.power_of_two(pairs)),
        )  # fmt: skip

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.order, self.ends, self.tiles


def _sorted_pairs(indices: Tensor, experts: int) -> Tensor:
    """order [P], int32. Narrow keys: the sort on a GPU passes over the data once for every few bits of them."""
    keys = indices.reshape(-1).to(torch.int16 if experts <= 1 << 15 else torch.int32)
    return keys.argsort(stable=True).to(torch.int32)


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and where `keep` the products before the activation [P, 2F] and the order of the pairs [P]."""
    hidden, indices, weights = hidden.contiguous(), indices.contiguous(), weights.contiguous()
    pairs, number = indices.numel(), gate_up.shape[0]
    none = hidden.new_empty((0, gate_up.shape[1]) if keep else 0), hidden.new_empty(0, dtype=torch.int32)
    if not pairs:
        return torch.zeros_like(hidden), *none
    with runtime.on_device_of(hidden):
        if not keep and pairs <= _FEW and pairs <= max(indices.shape[1], number // 2):
            return _few(hidden, gate_up, down, indices, weights), *none
        return _many(hidden, gate_up, down, indices, weights, keep)


def _many(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = runtime.kernels("experts_kernels")

    (width, inner), pairs, number = down.shape[1:], indices.numel(), gate_up.shape[0]
    tiles = _tiles(hidden.dtype, pairs, number)
    plan = _Schedule(_sorted_pairs(indices, number), indices, number, tiles.rows)
    act = hidden.new_empty(pairs, inner)
    pre = hidden.new_empty((pairs, 2 * inner) if keep else 0)
    options = tiles.up.options(inner, width)
    kernels.up_kernel[(plan.count * runtime.parts(inner, options["BN"]),)](
        hidden, gate_up, *plan.tables, act, pre, plan.count, D=width, F=inner, S=indices.shape[1], KEEP=keep, **options
    )
    rows = _product(tiles, plan, act, down, width, w_k=1, w_n=inner)
    y = _combined(rows, plan.place.view(indices.shape), weights)
    return y, pre, plan.order if keep else plan.order.new_empty(0)


def _product(tiles: Tiles, plan: _Schedule, left: Tensor, weight: Tensor, columns: int, *, w_k: int, w_n: int) -> Tensor:
    """[P, columns]: the rows of `left` times their expert's matrix."""
    kernel = runtime.kernels("experts_kernels").product_kernel

    out = left.new_empty(left.shape[0], columns)
    options = tiles.product.options(columns, left.shape[1])
    kernel[(plan.count * runtime.parts(columns, options["BN"]),)](
        left, weight, *plan.tables, out, plan.count, K=left.shape[1], N=columns, w_k=w_k, w_n=w_n, **options
    )
    return out


def _combined(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """[N, D]: the sum over each token's rows, at place [N, S], times its weights where given."""
    kernel = runtime.kernels("experts_kernels").combine_kernel

    (tokens, slots), width = place.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    several = runtime.power_of_two(slots)
    block = min(runtime.power_of_two(width), max(64, _COMBINE // several))
    kernel[(tokens, runtime.parts(width, block))](
        rows, place, rows if weights is None else weights, out, D=width, S=slots, WEIGHTED=weights is not None, BS=several,
        BD=block,
    )  # fmt: skip
    return out


def _few(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Pairs so few that hardly two share an expert: a program reads a few rows of weights for one pair, or one token."""
    kernels = runtime.kernels("experts_kernels")

    (width, inner), pairs, slots = down.shape[1:], indices.numel(), indices.shape[1]
    act = torch.empty(pairs, inner, dtype=torch.float32, device=hidden.device)
    y = torch.empty_like(hidden)
    sizes = {"D": width, "F": inner, "S": slots}
    columns, depth = (min(a, runtime.power_of_two(b)) for a, b in zip(_FEW_UP, (inner, width), strict=True))
    kernels.few_up_kernel[(pairs, runtime.parts(inner, columns))](hidden, gate_up, indices, act, **sizes, BN=columns, BK=depth)
    columns, depth = (min(a, runtime.power_of_two(b)) for a, b in zip(_FEW_DOWN, (width, inner), strict=True))
    kernels.few_down_kernel[(len(hidden), runtime.parts(width, columns))](
        act, down, indices, weights, y, **sizes, BN=columns, BK=depth
    )
    return y


def _backward(
    dy: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor, order: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden, gate_up and down, empty where not `wanted`, and of weights."""
    kernels = runtime.kernels("experts_kernels")

    if not indices.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (hidden, gate_up, down, weights))  # type: ignore[return-value]
    dy, hidden, weights = dy.contiguous(), hidden.contiguous(), weights.contiguous()
    (width, inner), (pairs, slots), number = down.shape[1:], (indices.numel(), indices.shape[1]), gate_up.shape[0]
    tiles = _tiles(hidden.dtype, pairs, number)
    with runtime.on_device_of(hidden):
        plan = _Schedule(order, indices, number, tiles.rows)
        options = tiles.act_gradient.options(inner, width)
        blocks = runtime.parts(inner, options["BN"])
        dpre, scaled = torch.empty_like(pre), hidden.new_empty(pairs, inner)
        shares = torch.empty(blocks, pairs, dtype=torch.float32, device=hidden.device)
        kernels.act_gradient_kernel[(plan.count * blocks,)](
            dy, down, pre, weights, *plan.tables, dpre, scaled, shares, pairs, plan.count, D=width, F=inner, S=slots, **options
        )
        dweights = shares.sum(0).view(indices.shape).to(weights.dtype)
        dhidden, dgate_up, ddown = (hidden.new_empty(0) for _ in range(3))
        if wanted[2]:
            ddown = _weight_gradient(tiles, plan, dy, scaled, slots, of_tokens="left")
        del scaled
        if wanted[1]:
            dgate_up = _weight_gradient(tiles, plan, dpre, hidden, slots, of_tokens="right")
        if wanted[0]:
            rows = _product(tiles, plan, dpre, gate_up, width, w_k=width, w_n=1)
            dhidden = _combined(rows, plan.place.view(indices.shape), None)
    return dhidden, dgate_up, ddown, dweights


def _weight_gradient(tiles: Tiles, plan: _Schedule, left: Tensor, right: Tensor, slots: int, *, of_tokens: str) -> Tensor:
    """[E, M, N]: left^T right, summed over each expert's rows. of_tokens: which of the two is to be gathered."""
    kernel = runtime.kernels("experts_kernels").weight_gradient_kernel

    tile, (m, n), number = tiles.weight_gradient, (left.shape[1], right.shape[1]), plan.ends.numel()
    options = tile.options(n, tile.depth) | {"BM": min(tile.rows, max(16, runtime.power_of_two(m)))}
    out = left.new_empty(number, m, n)
    blocks = runtime.parts(m, options["BM"]) * runtime.parts(n, options["BN"])
    kernel[(number * blocks,)](left, right, plan.order, plan.ends, out, M=m, N=n, S=slots, LEFT=of_tokens == "left", **options)
    return out


_ARGUMENTS = "Tensor hidden, Tensor gate_up, Tensor down, Tensor indices, Tensor weights"
_operation = torch.library.custom_op(
    "qwen35moe_kernels::experts", _forward, mutates_args=(), schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor)"
)
_gradient = torch.library.custom_op(
    "qwen35moe_kernels::experts_backward", _backward, mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}, Tensor pre, Tensor order, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operation.register_fake
def _shapes(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = indices.shape[0] * indices.shape[1]
    order = indices.new_empty(pairs if keep else 0, dtype=torch.int32)
    return hidden.new_empty(hidden.shape), hidden.new_empty((pairs, gate_up.shape[1]) if keep else 0), order


@_gradient.register_fake
def _gradient_shapes(
    dy: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor, order: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    given = zip((hidden, gate_up, down), wanted, strict=True)
    return *(x.new_empty(x.shape if want else 0) for x, want in given), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.set_materialize_grads(False)  # nobody needs a gradient of zeros for what is kept


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    *grads, dweights = _gradient(dy, *ctx.saved_tensors, list(wanted[:3]))
    kept = (grad if want else None for grad, want in zip(grads, wanted, strict=False))
    return *kept, None, dweights if wanted[4] else None, None


_operation.register_autograd(_differentiate, setup_context=_save)


def register(register: Callable[..., None]) -> None:
    """Enter the table in front of the PyTorch forms."""
    register("experts", "triton", experts, unsupported, before=runtime.place("gathered"), missing=runtime.missing())
