"""The mixture of experts in Triton, forward and backward, with a form without a sort for few assignments. Tiling: README.md.

The contract is that of `experts`: hidden [N, D], gate_up [E, 2F, D] (gate rows first), down [E, D, F], indices and weights
[N, top_k]; the result is [N, D] in hidden's dtype, the experts of a token added in the order of its indices:

    y_n = sum_j weights[n, j] down_e (silu(gate_e x_n) * up_e x_n),   e = indices[n, j]

A (token, expert) assignment is one entry of indices; there are P = N top_k. The backward keeps the inputs, the products before
the activation [N k, 2F] and the sorted order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FEW = 64  # assignments up to which nothing is sorted, if they are at most half as many as experts: few then share one


@dataclass(frozen=True)
class Tile:
    """A program's block of the result, the depth of one step, its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, columns: int, depth: int) -> dict[str, int]:
        """Launch options for a product of `columns` columns and depth `depth`: blocks no larger, and at least 16 (tl.dot)."""
        return {
            "BM": self.rows, "BN": min(self.columns, max(16, runtime.power_of_two(columns))),
            "BK": min(self.depth, max(16, runtime.power_of_two(depth))), "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """The tiles of all kernels. Those that share a schedule have the same number of rows."""

    up: Tile
    product: Tile
    act_gradient: Tile
    weight_gradient: Tile

    @property
    def rows(self) -> int:
        return self.up.rows

    def fitted(self, itemsize: int, most: int, hopper: bool) -> Tiles | None:
        """These tiles with as many pipeline stages as `most` bytes of shared memory hold, or None. A step of `up` loads rows
        of x and of two matrices, the others of one each."""
        fitted = {}
        for name in ("up", "product", "act_gradient", "weight_gradient"):
            tile: Tile = getattr(self, name)
            step = (tile.rows + tile.columns * (2 if name == "up" else 1)) * tile.depth * itemsize
            fits = (n for n in range(tile.stages, 0, -1) if 0 < _buffers(name, tile, n, hopper) <= (most - _OTHER) // step)
            if not (stages := next(fits, 0)):
                return None
            fitted[name] = replace(tile, stages=stages)
        return Tiles(**fitted)


def _buffers(name: str, tile: Tile, stages: int, hopper: bool) -> int:
    """Steps whose operands are in shared memory at a time, at most. Hopper's matrix instructions read it, so that the step in
    use is there as well. The rows of the weight's gradient are found through the order, and loading that takes stages."""
    if name == "weight_gradient":
        return stages - 2 if torch.version.hip else (stages + hopper) // 2
    return stages if hopper and tile.rows >= 64 else stages - 1


_LEAST = 49 << 10  # bytes that suffice for the smallest pipeline of every tile
_OTHER = 1024  # bytes of shared memory beside the stages: barriers, and indices of the rows
# (largest number of assignments per expert, tiles), from shared memory and registers of a Hopper GPU; not tuned.
_HALF = (
    (16, Tiles(Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 4), Tile(16, 128, 128, 4, 3), Tile(128, 128, 16, 8, 7))),
    (64, Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 8, 4), Tile(128, 128, 32, 8, 7))),
    (None, Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), Tile(128, 64, 64, 8, 4), Tile(128, 256, 64, 8, 5))),
)
_SINGLE = (
    (16, Tiles(Tile(16, 32, 32, 4, 3), Tile(16, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3), Tile(64, 64, 16, 4, 3))),
    (None, Tiles(Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3))),
)
_SCHEDULE, _COMBINE = 1024, 4096  # assignments per step of the schedule, elements per program of `combine_kernel`
_FEW_UP, _FEW_DOWN = (8, 256), (4, 512)  # columns and depth


def _tiles(hidden: Tensor, assignments: int, experts: int) -> Tiles:
    table = _fitting(hidden.dtype, runtime.shared_memory(hidden), runtime.hopper(hidden))
    return next(tiles for most, tiles in table if most is None or assignments <= most * experts)


@cache
def _fitting(dtype: torch.dtype, shared: int, hopper: bool) -> tuple[tuple[int | None, Tiles], ...]:
    """The table of a dtype, as its tiles fit into `shared` bytes; empty if one does not."""
    table = _SINGLE if dtype == torch.float32 else _HALF
    fitted = [(most, tiles.fitted(dtype.itemsize, shared, hopper)) for most, tiles in table]
    return () if any(tiles is None for _, tiles in fitted) else tuple(fitted)  # type: ignore[return-value]


def unsupported(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None
) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if tap is not None:
        return "a tap reads expert_in, expert_act or expert_out, which this implementation does not materialise"
    experts = {"gate_up": gate_up, "down": down}
    reason = runtime.unsupported_device(hidden=hidden, **experts, indices=indices, weights=weights)
    if reason := reason or runtime.unsupported_dtype(*_FLOATS, hidden=hidden, weights=weights):
        return reason
    if not _fitting(hidden.dtype, shared := runtime.shared_memory(hidden), runtime.hopper(hidden)):
        return f"a program may use {shared >> 10} KiB of shared memory on {hidden.device}, the kernels need {_LEAST >> 10}"
    for name, tensor in experts.items():
        if tensor.dtype != hidden.dtype:
            return f"hidden is {hidden.dtype} and {name} {tensor.dtype}, the kernels take one dtype"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous, and copying it in every call would take longer than the kernels save"
        if tensor[0].numel() >= 1 << 31:
            return f"{name} has {tensor[0].numel()} elements per expert, the kernels take fewer than 2^31"
    if indices.numel() >= 1 << 31:
        return f"indices has {indices.numel()} assignments, the kernels take fewer than 2^31"
    return None


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *, tap: Any = None) -> Tensor:
    """y [N, D]; see the top of this file."""
    keep = runtime.needs_gradient(hidden, gate_up, down, weights)
    run = _operation if keep or torch.compiler.is_compiling() else _forward
    return run(hidden, gate_up, down, indices, weights, keep)[0]


class _Schedule:
    """Assignments sorted by expert and cut into tiles of rows. The host reads nothing and launches the largest possible number
    of tiles."""

    def __init__(self, order: Tensor, indices: Tensor, experts: int, rows: int) -> None:
        kernels = runtime.kernels("experts_kernels")

        self.order, assignments = order, order.numel()
        every_expert = torch.arange(experts, device=order.device, dtype=torch.int32)
        by_row = indices.reshape(-1).index_select(0, order).to(torch.int32)
        self.ends = torch.searchsorted(by_row, every_expert, right=True, out_int32=True)
        # ceil(c / rows) <= (c + rows - 1) / rows, summed over the experts with an assignment
        self.count = (assignments + min(experts, assignments) * (rows - 1)) // rows
        self.tiles = torch.empty(2, self.count, dtype=torch.int32, device=order.device)
        self.row_of = torch.empty_like(order)
        kernels.schedule_kernel[(experts,)](
            order, self.ends, self.row_of, self.tiles, assignments, self.count, E=experts, BM=rows,
            BE=runtime.power_of_two(experts), B=_SCHEDULE,
        )  # fmt: skip

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.order, self.ends, self.tiles


def _sorted_assignments(indices: Tensor, experts: int) -> Tensor:
    """order [P], int32. Narrow keys save time: a GPU's radix sort makes one pass per few bits."""
    keys = indices.reshape(-1).to(torch.int16 if experts <= 1 << 15 else torch.int32)
    return keys.argsort(stable=True).to(torch.int32)


def _forward(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and if `keep` the products before the activation [N k, 2F] and the sorted order [N k]; else two empty tensors."""
    hidden, indices, weights = hidden.contiguous(), indices.contiguous(), weights.contiguous()
    assignments, experts = indices.numel(), gate_up.shape[0]
    none = hidden.new_empty((0, gate_up.shape[1]) if keep else 0), hidden.new_empty(0, dtype=torch.int32)
    if not assignments:
        return torch.zeros_like(hidden), *none
    with runtime.on_device_of(hidden):
        if not keep and assignments <= _FEW and assignments <= max(indices.shape[1], experts // 2):
            return _few(hidden, gate_up, down, indices, weights), *none
        return _many(hidden, gate_up, down, indices, weights, keep)


def _many(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = runtime.kernels("experts_kernels")

    (width, inner), assignments, experts = down.shape[1:], indices.numel(), gate_up.shape[0]
    tiles = _tiles(hidden, assignments, experts)
    plan = _Schedule(_sorted_assignments(indices, experts), indices, experts, tiles.rows)
    act = hidden.new_empty(assignments, inner)
    pre = hidden.new_empty((assignments, 2 * inner) if keep else 0)
    options = tiles.up.options(inner, width)
    kernels.up_kernel[(plan.count * runtime.parts(inner, options["BN"]),)](
        hidden, gate_up, *plan.tables, act, pre, plan.count, D=width, F=inner, TOP_K=indices.shape[1], KEEP=keep, **options
    )
    rows = _product(tiles, plan, act, down, width, w_k=1, w_n=inner)
    y = _combined(rows, plan.row_of.view(indices.shape), weights)
    return y, pre, plan.order if keep else plan.order.new_empty(0)


def _product(tiles: Tiles, plan: _Schedule, left: Tensor, weight: Tensor, columns: int, *, w_k: int, w_n: int) -> Tensor:
    """[N k, columns]: the rows of `left` times the matrix of their expert."""
    kernel = runtime.kernels("experts_kernels").product_kernel

    out = left.new_empty(left.shape[0], columns)
    options = tiles.product.options(columns, left.shape[1])
    kernel[(plan.count * runtime.parts(columns, options["BN"]),)](
        left, weight, *plan.tables, out, plan.count, IN=left.shape[1], OUT=columns, w_k=w_k, w_n=w_n, **options
    )
    return out


def _combined(rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    """[N, D]: the sum over the rows row_of [N, top_k] of each token, weighted if `weights` is not None."""
    kernel = runtime.kernels("experts_kernels").combine_kernel

    (tokens, top_k), width = row_of.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block_rows = runtime.power_of_two(top_k)
    block = min(runtime.power_of_two(width), max(64, _COMBINE // block_rows))
    kernel[(tokens, runtime.parts(width, block))](
        rows, row_of, rows if weights is None else weights, out, D=width, TOP_K=top_k, WEIGHTED=weights is not None,
        BS=block_rows, BD=block,
    )  # fmt: skip
    return out


def _few(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """For few assignments, which seldom share an expert: a program reads some rows of weights for one assignment or token."""
    kernels = runtime.kernels("experts_kernels")

    (width, inner), assignments, top_k = down.shape[1:], indices.numel(), indices.shape[1]
    act = torch.empty(assignments, inner, dtype=torch.float32, device=hidden.device)
    y = torch.empty_like(hidden)
    sizes = {"D": width, "F": inner, "TOP_K": top_k}
    columns, depth = (min(a, runtime.power_of_two(b)) for a, b in zip(_FEW_UP, (inner, width), strict=True))
    kernels.few_up_kernel[(assignments, runtime.parts(inner, columns))](
        hidden, gate_up, indices, act, **sizes, BN=columns, BK=depth
    )
    columns, depth = (min(a, runtime.power_of_two(b)) for a, b in zip(_FEW_DOWN, (width, inner), strict=True))
    kernels.few_down_kernel[(len(hidden), runtime.parts(width, columns))](
        act, down, indices, weights, y, **sizes, BN=columns, BK=depth
    )
    return y


def _backward(
    dy: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor, order: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, gate_up and down, empty unless their entry of `needed` is true, and of weights."""
    kernels = runtime.kernels("experts_kernels")

    if not indices.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (hidden, gate_up, down, weights))  # type: ignore[return-value]
    dy, hidden, weights = dy.contiguous(), hidden.contiguous(), weights.contiguous()
    (width, inner), (assignments, top_k), experts = down.shape[1:], (indices.numel(), indices.shape[1]), gate_up.shape[0]
    tiles = _tiles(hidden, assignments, experts)
    with runtime.on_device_of(hidden):
        plan = _Schedule(order, indices, experts, tiles.rows)
        options = tiles.act_gradient.options(inner, width)
        blocks = runtime.parts(inner, options["BN"])
        dpre, scaled = torch.empty_like(pre), hidden.new_empty(assignments, inner)
        partial_sums = torch.empty(blocks, assignments, dtype=torch.float32, device=hidden.device)
        kernels.act_gradient_kernel[(plan.count * blocks,)](
            dy, down, pre, weights, *plan.tables, dpre, scaled, partial_sums, assignments, plan.count, D=width, F=inner,
            TOP_K=top_k, **options
        )  # fmt: skip
        dweights = partial_sums.sum(0).view(indices.shape).to(weights.dtype)
        dhidden, dgate_up, ddown = (hidden.new_empty(0) for _ in range(3))
        if needed[2]:
            ddown = _weight_gradient(tiles, plan, dy, scaled, top_k, per_token="left")
        del scaled
        if needed[1]:
            dgate_up = _weight_gradient(tiles, plan, dpre, hidden, top_k, per_token="right")
        if needed[0]:
            rows = _product(tiles, plan, dpre, gate_up, width, w_k=width, w_n=1)
            dhidden = _combined(rows, plan.row_of.view(indices.shape), None)
    return dhidden, dgate_up, ddown, dweights


def _weight_gradient(tiles: Tiles, plan: _Schedule, left: Tensor, right: Tensor, top_k: int, *, per_token: str) -> Tensor:
    """[E, rows, columns]: left^T right summed over the rows of each expert. per_token: "left" or "right", the operand with a
    row per token, which the kernel gathers."""
    kernel = runtime.kernels("experts_kernels").weight_gradient_kernel

    tile, rows, columns, experts = tiles.weight_gradient, left.shape[1], right.shape[1], plan.ends.numel()
    options = tile.options(columns, tile.depth) | {"BM": min(tile.rows, max(16, runtime.power_of_two(rows)))}
    out = left.new_empty(experts, rows, columns)
    blocks = runtime.parts(rows, options["BM"]) * runtime.parts(columns, options["BN"])
    kernel[(experts * blocks,)](
        left, right, plan.order, plan.ends, out, ROWS=rows, COLUMNS=columns, TOP_K=top_k, LEFT=per_token == "left", **options
    )
    return out


_ARGUMENTS = "Tensor hidden, Tensor gate_up, Tensor down, Tensor indices, Tensor weights"
_operation = torch.library.custom_op(
    "qwen35moe_kernels::experts", _forward, mutates_args=(), schema=f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor)"
)
_gradient = torch.library.custom_op(
    "qwen35moe_kernels::experts_backward", _backward, mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}, Tensor pre, Tensor order, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operation.register_fake
def _shapes(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assignments = indices.shape[0] * indices.shape[1]
    order = indices.new_empty(assignments if keep else 0, dtype=torch.int32)
    return hidden.new_empty(hidden.shape), hidden.new_empty((assignments, gate_up.shape[1]) if keep else 0), order


@_gradient.register_fake
def _gradient_shapes(
    dy: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, pre: Tensor, order: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = zip((hidden, gate_up, down), needed, strict=True)
    return *(x.new_empty(x.shape if need else 0) for x, need in shapes), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.set_materialize_grads(False)  # no zero gradients for the saved outputs


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    needed = ctx.needs_input_grad
    *grads, dweights = _gradient(dy, *ctx.saved_tensors, list(needed[:3]))
    returned = (grad if need else None for grad, need in zip(grads, needed, strict=False))
    return *returned, None, dweights if needed[4] else None, None


_operation.register_autograd(_differentiate, setup_context=_save)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    options = {"before": runtime.place("gathered"), "missing": runtime.missing()}
    register("experts", "triton", experts, unsupported, **options, **runtime.FIRST_ORDER)
