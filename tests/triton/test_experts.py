"""The Triton mixture of experts: uneven loads, odd sizes, gradients, few assignments without a sort, torch.compile.

Blocks are small, so that short inputs span several; the interpreter's time grows with the number of programs.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from tests.support.compile_triton import Kernel, compiled
from tests.support.kernel_checks import DEVICE, ROUNDED, assert_close, draw, entry, gradients, refusal
from tests.support.peer import relative_error

loop_experts = ops.experts.definition

pytest.importorskip("triton")
OPERATION = "experts"
# Two sums of products; relative to the largest value of the result.
FORWARD = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks of 16, the smallest of tl.dot. The form without a sort is off unless a test turns it on."""
    from qwen35moe_kernels import experts

    if request.node.get_closest_marker("gpu"):  # the blocks of the launches
        yield
        return
    tile = experts.Tile(16, 16, 16, 4, 2)
    for table in ("_HALF", "_SINGLE"):
        monkeypatch.setattr(experts, table, ((None, experts.Tiles(tile, tile, tile, tile)),))
    monkeypatch.setattr(experts, "_FEW", 0)
    monkeypatch.setattr(experts, "_COMBINE", 64)
    with backends.use(experts="triton"):
        yield


def problem(
    tokens: int, top_k: int, experts: int, width: int, inner: int, *, load: str = "random", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """hidden, gate_up, down, indices, weights. load: the distribution of tokens over experts."""
    scores = draw(tokens, experts, seed=7)
    if load == "all to one":
        scores = torch.arange(experts, 0, -1.0, device=DEVICE).expand(tokens, experts)
    elif load == "empty":
        scores[:, 1::2] -= 50
    indices = scores.topk(top_k, dim=-1).indices
    if load == "repeated":
        indices[:, -1] = indices[:, 0]
    tensors = draw(tokens, width), draw(experts, 2 * inner, width, seed=1) * width**-0.5
    tensors += (draw(experts, width, inner, seed=2) * inner**-0.5,)
    weights = draw(tokens, top_k, seed=3).softmax(-1)
    return *(x.to(dtype) for x in tensors), indices, weights.to(dtype)


def close(args: tuple[Tensor, ...], dtype: torch.dtype = torch.float32, *, backward: bool = True) -> None:
    bound = FORWARD[dtype]
    assert_close(OPERATION, "triton", args, {}, dtype, forward=bound, backward=2 * bound if backward else None)


@pytest.mark.parametrize("size", [(1, 1, 3, 5, 2), (7, 2, 5, 18, 6), (17, 3, 4, 33, 20), (40, 2, 3, 16, 32)], ids=str)
def test_sizes_within_and_beyond_a_block(size: tuple[int, ...]) -> None:
    close(problem(*size))


@pytest.mark.parametrize("load", ["all to one", "empty", "repeated"])
def test_uneven_loads(load: str) -> None:
    close(problem(21, 3, 6, 12, 5, load=load))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions(dtype: torch.dtype) -> None:
    close(problem(9, 2, 5, 24, 10, dtype=dtype), dtype)
    *tensors, weights = problem(9, 2, 5, 24, 10, dtype=dtype)
    close((*tensors, weights.float()), dtype)


@pytest.mark.parametrize("size", [(1, 3, 7, 10, 6), (3, 2, 12, 33, 20), (2, 4, 16, 17, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_assignments_without_a_sort(size: tuple[int, ...], dtype: torch.dtype, monkeypatch, calls) -> None:
    from qwen35moe_kernels import experts

    for name, value in (("_FEW", 64), ("_FEW_UP", (4, 8)), ("_FEW_DOWN", (8, 4))):
        monkeypatch.setattr(experts, name, value)
    args = problem(*size, load="repeated", dtype=dtype)
    with calls(experts, "_few") as few, calls(experts, "_many") as many, torch.no_grad():
        out = backends.run(OPERATION, *args)
    assert (few.count, many.count) == (1, 0)
    exact = loop_experts(*(x.double() if x.is_floating_point() else x for x in args))
    assert out.dtype == dtype and (out - exact).abs().max() <= max(1e-6, ROUNDED[dtype]) * exact.abs().max()


def test_when_assignments_are_few(monkeypatch: pytest.MonkeyPatch, calls) -> None:
    """Up to 64 and up to half as many as experts, without a gradient."""
    from qwen35moe_kernels import experts

    monkeypatch.setattr(experts, "_FEW", 64)
    cases = [((8, 8, 256), True), ((9, 8, 200), False), ((1, 2, 3), True), ((2, 2, 3), False), ((1, 70, 80), False)]
    monkeypatch.setattr(experts, "_few", lambda hidden, *_: hidden)
    monkeypatch.setattr(experts, "_many", lambda hidden, *_: (hidden, hidden[:0], hidden[:0]))
    for (tokens, top_k, number), expected in cases:
        args = problem(tokens, top_k, number, 2, 1)
        with calls(experts, "_few") as few, calls(experts, "_many") as many:
            experts._forward(*args, keep=False)
            experts._forward(*args, keep=True)
        assert (few.count, many.count) == (expected, 2 - expected)


def test_no_tokens() -> None:
    args = problem(0, 2, 3, 5, 2)
    close(args)
    leaves = [args[0], args[1], args[2], args[4]]
    grads = gradients(lambda *x: backends.run(OPERATION, *x[:3], args[3], x[3]), *leaves)
    assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


def test_an_unused_expert_is_not_read_and_has_a_zero_gradient() -> None:
    hidden, gate_up, down, indices, weights = problem(9, 2, 6, 12, 5, load="empty")
    gate_up[1], down[3] = float("nan"), float("nan")
    grads = gradients(lambda *x: backends.run(OPERATION, *x, indices, weights), hidden, gate_up, down)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all((grad[1::2] == 0).all() and (grad[::2] != 0).any() for grad in grads[1:])


def test_only_required_gradients_are_computed(calls) -> None:
    from qwen35moe_kernels import experts

    args = problem(9, 2, 5, 12, 6)
    weight_products = {0: 0, 1: 1, 2: 1, 4: 0}  # index of the argument: launches of `weight_gradient_kernel`
    for index, expected in weight_products.items():
        with calls(experts, "_weight_gradient") as products, calls(experts, "_combined") as sums:
            (grad,) = gradients(lambda x, i=index: backends.run(OPERATION, *args[:i], x, *args[i + 1 :]), args[index])
        assert products.count == expected and sums.count == (2 if index == 0 else 1)
        (exact,) = gradients(lambda x, i=index: loop_experts(*args[:i], x, *args[i + 1 :]), args[index])
        assert (grad - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_the_backward_keeps_inputs_products_and_order() -> None:
    args = problem(9, 2, 5, 12, 6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        backends.run(OPERATION, args[0].requires_grad_(), *args[1:])
    own = [x for x in kept if not any(x.data_ptr() == argument.data_ptr() for argument in args)]
    assert [(tuple(x.shape), x.dtype) for x in own] == [((18, 12), torch.float32), ((18,), torch.int32)]


def in_order(left: Any, right: Any, dtype: Any = None) -> Any:
    """np.matmul that sums every element in the order of the inner index, whatever the shape."""
    total = np.zeros((*left.shape[:-1], right.shape[-1]), dtype or left.dtype)
    for k in range(left.shape[-1]):
        total += left[..., :, k, None] * right[..., k, None, :]
    return total


def test_the_same_arguments_give_the_same_bits_in_every_batch(monkeypatch: pytest.MonkeyPatch, calls) -> None:
    """The same call twice, and a token alone and in a batch. On a GPU, the bits of an element of a product do not depend on the
    other rows. The interpreter multiplies with NumPy, whose BLAS makes them depend on the shape on some processors; the test
    replaces these products by `in_order`, which checks the bits of everything else."""
    hidden, gate_up, down, indices, weights = problem(6, 3, 4, 12, 6, load="repeated")
    leaves = hidden, gate_up, down, weights

    def run(h: Tensor, g: Tensor, d: Tensor, w: Tensor) -> Tensor:
        return backends.run(OPERATION, h, g, d, indices, w)

    assert torch.equal(run(*leaves), run(*leaves))
    assert all(torch.equal(a, b) for a, b in zip(gradients(run, *leaves), gradients(run, *leaves), strict=True))
    views = hidden.mT.contiguous().mT, gate_up, down, weights.mT.contiguous().mT
    assert torch.equal(run(*views), run(*leaves))
    if DEVICE == "cpu":
        theirs = run(*leaves)
        monkeypatch.setattr(np, "matmul", in_order)
        with calls(np, "matmul") as products:
            ours = run(*leaves)
        assert products.count > 0 and (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    alone = torch.cat([backends.run(OPERATION, hidden[n : n + 1], gate_up, down, indices[n : n + 1], weights[n : n + 1])
                       for n in range(len(hidden))])  # fmt: skip
    assert torch.equal(alone, run(*leaves))


def test_the_schedule_contains_every_row_once() -> None:
    from qwen35moe_kernels import experts

    for assignments, number, rows in ((37, 5, 4), (1, 9, 16), (64, 3, 16), (5, 1, 2)):
        indices = torch.randint(number, (assignments, 1), generator=torch.Generator().manual_seed(assignments)).to(DEVICE)
        plan = experts._Schedule(experts._sorted_assignments(indices, number), indices, number, rows)
        experts_of_tiles, first = plan.tiles.tolist()
        sizes = torch.bincount(indices.reshape(-1), minlength=number).tolist()
        assert plan.ends.diff(prepend=plan.ends.new_zeros(1)).tolist() == sizes
        tiles = [(expert, start) for expert, start in zip(experts_of_tiles, first, strict=True) if expert >= 0]
        starts = [0, *plan.ends.tolist()]
        assert tiles == [(e, row) for e in range(number) for row in range(starts[e], starts[e + 1], rows)]
        assert torch.equal(plan.order[plan.row_of.long()].long(), torch.arange(assignments, device=DEVICE))
        assert all(indices.reshape(-1)[plan.order].diff() >= 0)


def test_forward_and_backward_launch_and_are_recorded(calls) -> None:
    from qwen35moe_kernels import experts

    args = problem(5, 2, 3, 8, 4)
    with backends.ran() as ran, calls(experts, "_Schedule") as schedules:
        backends.run(OPERATION, args[0].requires_grad_(), *args[1:]).sum().backward()
    assert ran.counts == {(OPERATION, "triton"): 1} and schedules.count == 2


def test_one_operation_under_torch_compile() -> None:
    args = problem(5, 2, 3, 8, 4)

    def call(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return backends.run(OPERATION, hidden, gate_up, down, args[3], weights)

    leaves = *args[:3], args[4]
    whole = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*leaves), call(*leaves))
    assert all(torch.equal(a, b) for a, b in zip(gradients(whole, *leaves), gradients(call, *leaves), strict=True))
    for keep in (True, False):
        torch.library.opcheck(
            torch.ops.qwen35moe_kernels.experts.default, (args[0].detach().requires_grad_(keep), *args[1:], keep),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_second_derivatives_are_those_of_the_definition() -> None:
    hidden, gate_up, down, indices, weights = problem(4, 2, 3, 8, 4)
    leaves = [x.requires_grad_() for x in (hidden, gate_up, down, weights)]
    second = []
    for function in (functools.partial(backends.run, OPERATION), ops.experts.definition):
        out = function(hidden, gate_up, down, indices, weights)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for actual, expected in zip(*second, strict=True):
        assert relative_error(actual, expected) <= 1e-5


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, gate_up, down, indices, weights = problem(4, 2, 3, 8, 4)

    def reason(*changed: Any, **options: Any) -> str | None:
        return refusal(OPERATION, "triton", *changed, **options)

    assert reason(hidden, gate_up, down, indices, weights) is None
    tapped = reason(hidden, gate_up, down, indices, weights, tap=lambda name, value: value)
    assert tapped.startswith("a tap reads expert_in, expert_act or expert_out, which this implementation")
    assert reason(hidden.double(), gate_up, down, indices, weights).startswith("hidden is float64, not one of")
    assert reason(hidden, gate_up, down, indices, weights.double()).startswith("weights is float64, not one of")
    mixed = reason(hidden, gate_up, down.bfloat16(), indices, weights)
    assert mixed == "hidden is torch.float32 and down torch.bfloat16, the kernels take one dtype"
    transposed = gate_up.mT.contiguous().mT
    assert reason(hidden, transposed, down, indices, weights).startswith("gate_up is not contiguous, and copying it in every")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert reason(hidden, gate_up, down, indices, weights) == "hidden is on cpu, not on CUDA"


def test_the_benchmark_of_dispatch_finds_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("benchmarks.moe.implementations")
    monkeypatch.setattr(module, "TRANSFORMERS", ())  # whose import takes seconds
    forms = module.implementations("cuda", [])
    assert forms["ours triton"] is entry(OPERATION, "triton").fn and "ours sonic_moe" in forms
    assert module.reasons("ours triton", forms["ours triton"], problem(4, 2, 3, 8, 4)) is None


# -------------------------------------------------------------------------------------------------- compiled for a Hopper

D, F, TOP_K, E = 2048, 512, 8, 256  # Qwen3.5-35B-A3B
INTEGERS = ("assignments", "num_tiles")
TABLES = {"order": "*i32", "ends": "*i32", "tiles": "*i32", "row_of": "*i32", "indices": "*i64", "dweights": "*fp32"}


def kernel(function: str, arguments: str, tile: Any = None, dtype: str = "bf16", **constants: Any) -> Kernel:
    types = {name: "i32" if name in INTEGERS else TABLES.get(name, f"*{dtype}") for name in arguments.split()}
    aligned = tuple(name for name in types if name not in INTEGERS)
    warps, stages = (4, 3) if tile is None else (tile.warps, tile.stages)
    return Kernel("qwen35moe_kernels.experts_kernels", function, types, constants, warps, stages, aligned=aligned)


def of_tiles(tiles: Any, dtype: str) -> list[Kernel]:
    """The kernels of one row of the tables, with the blocks of the launches."""

    def blocks(tile: Any, columns: int, depth: int) -> dict[str, int]:
        return {name: size for name, size in tile.options(columns, depth).items() if name.startswith("B")}

    sizes = {"D": D, "F": F, "TOP_K": TOP_K}
    product, weight = "left weight order ends tiles out num_tiles", "left right order ends out"
    gradient = "dy down pre weights order ends tiles dpre scaled dweights assignments num_tiles"
    tile = tiles.weight_gradient
    compilations = [
        kernel("up_kernel", "x gate_up order ends tiles act pre num_tiles", tiles.up, dtype, **sizes, KEEP=True,
               **blocks(tiles.up, F, D)),
        kernel("product_kernel", product, tiles.product, dtype, IN=F, OUT=D, w_k=1, w_n=F, **blocks(tiles.product, D, F)),
        kernel("product_kernel", product, tiles.product, dtype, IN=2 * F, OUT=D, w_k=D, w_n=1,
               **blocks(tiles.product, D, 2 * F)),
        kernel("act_gradient_kernel", gradient, tiles.act_gradient, dtype, **sizes, **blocks(tiles.act_gradient, F, D)),
    ]  # fmt: skip
    for rows, columns, left in ((D, F, True), (2 * F, D, False)):
        compilations.append(kernel("weight_gradient_kernel", weight, tile, dtype, ROWS=rows, COLUMNS=columns,
                                   TOP_K=TOP_K, LEFT=left, **blocks(tile, columns, tile.depth)))  # fmt: skip
    return compilations


def all_kernels() -> list[Kernel]:
    """Every kernel with every tile of a launch."""
    from qwen35moe_kernels import experts

    few = {"D": D, "F": F, "TOP_K": TOP_K}
    return [
        *(one for _, tiles in TILES["half"] for one in of_tiles(tiles, "bf16")),
        *(one for _, tiles in TILES["single"] for one in of_tiles(tiles, "fp32")),
        kernel("schedule_kernel", "order ends row_of tiles assignments num_tiles", E=E, BM=128, BE=E, B=experts._SCHEDULE),
        kernel("combine_kernel", "rows row_of weights out", D=D, TOP_K=TOP_K, WEIGHTED=True, BS=TOP_K,
               BD=TILES["combine"] // TOP_K),
        kernel("few_up_kernel", "x gate_up indices act", **few, BN=experts._FEW_UP[0], BK=experts._FEW_UP[1]),
        kernel("few_down_kernel", "act down indices weights out", **few, BN=experts._FEW_DOWN[0], BK=experts._FEW_DOWN[1]),
    ]


def _as_launched() -> dict[str, Any]:
    from qwen35moe_kernels import experts

    return {"half": experts._HALF, "single": experts._SINGLE, "combine": experts._COMBINE}


TILES = _as_launched()  # before a test replaces them


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel brings ptxas for Linux only")
@pytest.mark.slow  # `test_launches` compiles the launches of a call in every leg
def test_kernels_compile_for_hopper_without_spills() -> None:
    """The largest tiles in bfloat16, and all tiles of the kernels that need most; `table` compiles all."""
    every = all_kernels()
    largest_only = ("up_kernel", "product_kernel", "weight_gradient_kernel")
    largest = of_tiles(TILES["half"][-1][1], "bf16")
    chosen = largest + [one for one in every if one.name not in largest_only and one not in largest]
    usage = compiled(chosen)
    assert {used.name for used in usage} == {one.name for one in every}
    assert not [used for used in usage if used.local], usage
    assert max(used.shared for used in usage) <= 227 << 10, usage


# ------------------------------------------------------------------------------------------------------------ on a GPU

# A GPU rounds to nearest, the activation and the output of an expert: 2^-9 each.
ON_GPU = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ON_GPU), ids=str)
@pytest.mark.parametrize("load", ["random", "all to one"])
@pytest.mark.parametrize("tokens", [1, 8, 100, 300, 1100])
def test_at_the_sizes_of_35b(tokens: int, load: str, dtype: torch.dtype) -> None:
    """A quarter of the experts: up to 13, up to 38 and about 140 assignments per expert, which uses every row of the tables."""
    args = problem(tokens, TOP_K, E // 4, D, F, load=load, dtype=dtype)
    bound = ON_GPU[dtype]
    assert_close(OPERATION, "triton", args, {}, dtype, forward=bound, backward=4 * bound)
    if tokens <= 8:
        with torch.no_grad():
            out = backends.run(OPERATION, *args)
        exact = loop_experts(*(x.double() if x.is_floating_point() else x for x in args))
        assert (out - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 3, 5, 2), (2, 9, 33, 20), (3, 4, 128, 48), (8, 64, 96, 160), (4, 4, 40, 24)], ids=str)
def test_100_random_cases_of_odd_sizes(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = int(torch.randint(0, 200, (1,), generator=rng)) // int(torch.randint(1, 20, (1,), generator=rng))
        load = ("random", "all to one", "empty", "repeated")[int(torch.randint(0, 4, (1,), generator=rng))]
        for dtype in (torch.float32, torch.bfloat16):
            close(problem(tokens, *shape, load=load, dtype=dtype), dtype)


@pytest.mark.gpu
def test_auto_takes_it_and_the_host_does_not_synchronise() -> None:
    cases = [problem(tokens, TOP_K, E // 4, D, F, dtype=torch.bfloat16) for tokens in (4, 300)]

    def run(args: tuple[Tensor, ...]) -> None:
        backends.run(OPERATION, *args)
        backends.run(OPERATION, args[0].detach().requires_grad_(), *args[1:]).sum().backward()

    with backends.use(experts="auto"):
        for args in cases:
            run(args)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with backends.ran() as ran:
                for args in cases:
                    run(args)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert ran.counts == {(OPERATION, "triton"): 4}


def table() -> str:
    """`python -m tests.triton.test_experts` prints it."""
    every, lines = all_kernels(), []
    for one, needs in zip(every, compiled(every), strict=True):
        blocks = " ".join(f"{name}={size}" for name, size in one.constants.items() if name.startswith("B"))
        dtype = one.types.get("left", one.types.get("x", one.types.get("dy", "")))
        usage = f"{needs.registers:5} registers{needs.local:6} spilled{needs.shared:8} bytes shared"
        lines.append(f"{one.name:24}{dtype:6}{blocks:28}{usage}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
