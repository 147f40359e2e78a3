"""The Triton delta rule against the recurrence in float64: lengths, gates and keys that are hard for a chunked form, packed
documents, forward and backward; memory of the backward, unsupported inputs, compilation for a GPU.

Without a GPU the kernels run in Triton's interpreter, whose time grows with chunks times heads, so the cases are small.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from tests.support.compile_triton import Kernel, compiled
from tests.support.delta_rule import (
    CUTS,
    GATES,
    KEYS,
    assert_within_bounds,
    call,
    doubles,
    inputs,
    recurrent_gated_delta_rule,
    with_gradients,
)
from tests.support.kernel_checks import DEVICE, draw, integers, refusal
from tests.support.peer import assert_close

pytest.importorskip("triton")
HEADS = (1, 2, 5, 7)  # G, H, K, V
ONE_HEAD = (1, 1, 5, 7)


def triton_rule(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The Triton kernels, chosen by name; checks that they ran."""
    with backends.use(gated_delta_rule="triton"), backends.ran() as ran:
        result = backends.run("gated_delta_rule", *args, **options)
    assert ran.counts == {("gated_delta_rule", "triton"): 1}
    return result


def drawn(length: int, **options: Any) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs(length, **{"batch": 1, "heads": HEADS} | options).items()}


def against_the_recurrence(values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values), **options)
    results = with_gradients(triton_rule, values, **options)
    assert_within_bounds(results, truth, values["decay"].min().item())
    return results


# ---------------------------------------------------------------------------------------------------- against the recurrence


@pytest.mark.parametrize("length", CUTS)
def test_every_length_with_and_without_a_state(length: int) -> None:
    against_the_recurrence(drawn(length, seed=length, heads=ONE_HEAD))
    if length in (1, 65):
        against_the_recurrence(drawn(length, seed=length, state=False))


@pytest.mark.parametrize("heads", [(1, 1, 33, 40), (2, 4, 3, 9)], ids=str)
def test_head_ratios_and_widths_in_a_batch(heads: tuple[int, int, int, int]) -> None:
    """Widths beyond a power of two, values in several blocks, rows of a batch side by side."""
    against_the_recurrence(drawn(5, batch=2, heads=heads))


@pytest.mark.parametrize("gates,keys", [*zip(GATES, itertools.cycle(KEYS), strict=False), ("ordinary", "correlated")])
def test_every_gate(gates: str, keys: str) -> None:
    several_chunks = not gates.startswith("-") or gates == "-0.0001"  # otherwise the second chunk is independent
    against_the_recurrence(drawn(67 if several_chunks else 33, gates=gates, keys=keys, heads=ONE_HEAD))


@pytest.mark.parametrize(
    "gates,keys,betas",
    [("none", "equal", "1"), ("-0.0001", "correlated", "1"), ("any", "equal", "1"), ("hard then soft", "correlated", "1"),
     ("ordinary", "any", "0")],
)  # fmt: skip
def test_every_extreme_of_beta(gates: str, keys: str, betas: str) -> None:
    """With beta 1 and equal keys every token overwrites the same value: the worst-conditioned triangular system."""
    against_the_recurrence(drawn(67, gates=gates, keys=keys, betas=betas, heads=ONE_HEAD))


def test_the_gate_gradient_at_hard_gates_is_exact() -> None:
    """All gates at -28: the true gradient is about e^-28 throughout."""
    values = drawn(66, gates="-28.0", state=False, heads=ONE_HEAD)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))["d_decay"]
    gradient = with_gradients(triton_rule, values)["d_decay"]
    assert 0 < truth.abs().max() < 1e-10
    assert (gradient - truth).abs().max() < 1e-13


def test_a_decay_of_minus_infinity_clears_the_state() -> None:
    """No NaN, and the result after it is that of a row that starts there."""
    values = drawn(9, heads=ONE_HEAD)
    values["decay"][:, 4] = float("-inf")
    out, final = call(triton_rule, values)
    rest, end = call(triton_rule, {name: t[:, 4:] for name, t in values.items() if name != "state"})
    assert_close(out[:, 4:], rest, 1e-6)
    assert_close(final, end, 1e-6)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [64, 1, 66], [0, 2, 0]], ids=str)
def test_packed_documents(lengths: list[int]) -> None:
    """Each document starts from its own state; an empty one returns its state. cu_seqlens may be on the host."""
    values = drawn(sum(lengths), state=False, heads=ONE_HEAD)
    values["state"] = draw(len(lengths), *ONE_HEAD[1:], seed=5)
    bounds = integers(*itertools.accumulate(lengths, initial=0))
    if 0 in lengths:
        out, final = call(triton_rule, values, cu_seqlens=bounds.cpu())
        one, end = call(triton_rule, values | {"state": values["state"][1:2]})
        assert_close(out, one, 1e-6)
        assert torch.equal(final[0], values["state"][0]) and torch.equal(final[2], values["state"][2])
        assert_close(final[1:2], end, 1e-6)
    else:
        against_the_recurrence(values, cu_seqlens=bounds)


def test_views() -> None:
    """query, key and value are views of one projection, as in the layer; state and gates are transposed views."""
    groups, heads, width, out = 1, 2, 4, 6
    mixed = draw(2, 6, 2 * groups * width + heads * out, seed=1)
    query, key, value = mixed.split([groups * width, groups * width, heads * out], dim=-1)
    values = {
        "query": query.unflatten(-1, (groups, width)), "key": key.unflatten(-1, (groups, width)),
        "value": value.unflatten(-1, (heads, out)), "decay": -draw(2, heads, 6, seed=2).abs().mT,
        "beta": draw(2, heads, 6, seed=3).sigmoid().mT, "state": draw(2, heads, out, width, seed=4).mT,
    }  # fmt: skip
    assert not any(tensor.is_contiguous() for tensor in values.values())
    against_the_recurrence(values)
    whole, _ = call(triton_rule, values)
    step = {name: t if name == "state" else t[:, ::2] for name, t in values.items()}
    assert_close(call(triton_rule, step)[0][:, 0], whole[:, 0], 1e-6)


# ---------------------------------------------------------------------------------------------------- dtypes, memory, compile


def test_bfloat16_within_its_roundings() -> None:
    """The bounds of `backends.verify`: float32 sums, gates and states, operands of bfloat16."""
    values = drawn(70, heads=(1, 2, 16, 24), dtype=torch.bfloat16)
    values |= {name: values[name].float() for name in ("decay", "beta", "state")}
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    results = with_gradients(triton_rule, values)
    for name, tensor in results.items():
        same = name in ("out", "d_query", "d_key", "d_value")
        assert tensor.dtype == (torch.bfloat16 if same else torch.float32)
        assert_close(tensor, truth[name], 2e-2 if name in ("out", "final") else 4e-2, name)


@pytest.mark.parametrize("result", [0, 1], ids=["output", "final state"])
def test_gradients_of_one_result_for_some_inputs(result: int) -> None:
    values = drawn(3, heads=ONE_HEAD)

    def gradients(form: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {n: t.clone().requires_grad_(n in ("key", "decay")) for n, t in leaves.items()}
        return torch.autograd.grad(call(form, leaves)[result].square().sum(), [leaves["key"], leaves["decay"]])

    truth = gradients(recurrent_gated_delta_rule, doubles(values))
    for gradient, expected in zip(gradients(triton_rule, values), truth, strict=True):
        assert_close(gradient, expected, 2e-5)


def test_second_derivatives_are_those_of_the_definition() -> None:
    values = {name: tensor.requires_grad_() for name, tensor in drawn(3, heads=ONE_HEAD).items()}
    second = []
    for rule in (triton_rule, ops.gated_delta_rule.definition):
        first = torch.autograd.grad(call(rule, values)[0].square().sum(), list(values.values()), create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), list(values.values())))
    for name, actual, expected in zip(values, *second, strict=True):
        assert_close(actual, expected, 1e-4, name)


def test_memory_kept_for_the_backward() -> None:
    """At most 46 KiB per token and layer at the sizes of 35B, inputs included; on meta tensors."""
    from qwen35moe_kernels import delta_rule

    tokens, half, wide = 4096, {"dtype": torch.bfloat16, "device": "meta"}, {"dtype": torch.float32, "device": "meta"}
    query, key = (torch.empty(1, tokens, 16, 128, **half, requires_grad=True) for _ in range(2))
    value = torch.empty(1, tokens, 32, 128, **half, requires_grad=True)
    decay, beta = (torch.empty(1, tokens, 32, **wide, requires_grad=True) for _ in range(2))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        delta_rule.gated_delta_rule(query, key, value, decay=decay, beta=beta)
    assert len(kept) == 9
    assert sum(tensor.nbytes for tensor in kept.values()) <= 46 * 1024 * tokens


def test_the_custom_operators_pass_opcheck() -> None:
    """torch.library's own check: fake tensors have the shapes of real ones, gradients are registered, nothing aliases."""
    from qwen35moe_kernels import delta_rule

    values = drawn(3, state=False, heads=ONE_HEAD)
    values["state"] = draw(2, *ONE_HEAD[1:], seed=5)
    leaves = tuple(tensor.requires_grad_() for tensor in values.values())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(delta_rule.delta_rule, (*leaves, integers(0, 1, 3)), test_utils=checks)


def test_one_operation_under_torch_compile() -> None:
    """No graph break and one node, also for packed documents."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def both(values: dict[str, Tensor], bounds: Tensor) -> Tensor:
        out, final = backends.run(
            "gated_delta_rule", values["query"], values["key"], values["value"], decay=values["decay"],
            beta=values["beta"], cu_seqlens=bounds,
        )  # fmt: skip
        return out.sum() + final.sum()

    values, bounds = drawn(5, state=False, heads=ONE_HEAD), integers(0, 2, 5)
    with backends.use(gated_delta_rule="triton"):
        compiled = torch.compile(both, backend=backend, fullgraph=True)
        assert_close(compiled(values, bounds), both(values, bounds), 1e-6)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if "qwen35moe_kernels" in str(node.target)]
    assert len(nodes) == 1


# ---------------------------------------------------------------------------------------------------- choosing


def test_unsupported() -> None:
    values = drawn(3)

    def reason(**changes: Tensor) -> str | None:
        options = values | changes
        return refusal("gated_delta_rule", "triton", *(options.pop(name) for name in ("query", "key", "value")), **options)

    assert reason() is None
    assert reason(query=values["query"].double()) == "query is float64, not one of float32, bfloat16"
    assert reason(value=values["value"].half()) == "value is float16, not one of float32, bfloat16"
    assert reason(state=values["state"].double()) == "state is float64, not one of float32, bfloat16"
    mixed = reason(value=values["value"].bfloat16())
    assert mixed == "query is torch.float32, key torch.float32 and value torch.bfloat16: the kernels take one dtype"
    wide = draw(1, 3, 1, 300)
    assert "keys are 300 wide: a program holds the state of keys up to 256 wide" in (reason(query=wide, key=wide) or "")
    wide = draw(1, 3, 1, 65)
    assert reason(query=wide, key=wide.requires_grad_()) is None  # tests/triton/test_runtime.py has a limit of shared memory
    assert reason(query=wide.bfloat16(), key=wide.bfloat16(), value=values["value"].bfloat16()) is None
    assert reason(**{name: t[:, :0] for name, t in values.items() if name != "state"}) == "query has no tokens"
    assert reason(query=values["query"].to("meta")) == "query is on meta, not on CUDA"


def test_its_place_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead of the PyTorch forms on a GPU, behind them in the interpreter, where auto does not take it."""
    from qwen35moe_kernels import delta_rule, runtime

    places = []
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        monkeypatch.setattr(runtime, "missing", lambda: None)
        delta_rule.register(lambda _, name, *args, **options: places.append((name, options["before"], options["missing"])))
    assert places == [("triton", "chunked_cpu", None), ("triton", None, None)]


# ---------------------------------------------------------------------------------------------------- a GPU and its compiler


def kernels_of_35b(*names: str) -> list[Kernel]:
    """For 16 key and 32 value heads of 128 in bfloat16, with the blocks and warps of the launches in delta_rule.py."""
    from qwen35moe_kernels import delta_rule_backward, delta_rule_forward

    wide = {"decay", "beta", "sums", "norms", "initial", "final", "d_final", "d_initial", "d_units", "d_decay", "d_beta"}
    integers = {"tokens", "total", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head"}
    constants = {"G": 16, "H": 32, "K": 128, "V": 128, "KP": 128, "BK": 32, "M": 64, "PACKED": False, "HAS_STATE": True,
                 "WIDEN": False, "spans": None, "bounds": None, "first_chunks": None}  # fmt: skip
    blocks = {"prepare": (0, 2), "recur": (32, 4), "outputs": (128, 4), "attend_back": (128, 4), "recur_back": (32, 4)}
    compilations = []
    for name in names:
        module = delta_rule_forward if hasattr(delta_rule_forward, name) else delta_rule_backward
        arguments = getattr(module, name).arg_names
        columns, warps = blocks.get(name, (64, 8))
        fixed = {key: value for key, value in (constants | {"BV": columns}).items() if key in arguments}
        types = {
            key: "fp32" if key == "scale" else "i32" if key in integers else "*fp32" if key in wide else "*bf16"
            for key in arguments if key not in fixed
        }  # fmt: skip
        aligned = tuple(key for key in types if key != "scale")
        compilations.append(Kernel(module.__name__, name, types, fixed, warps, 2 if "recur" in name else 1, aligned=aligned))
    return compilations


@pytest.mark.slow  # `test_launches` compiles the launches of a call in every leg
def test_kernels_compile_for_hopper_at_the_sizes_of_35b() -> None:
    """The interpreter accepts code that the compiler rejects. Shared memory suffices; only the last two kernels of the backward
    spill, a known number of bytes.

    `prepare` is left out: compiling it takes ten seconds.
    """
    spilled = {"queries_back": 168, "keys_back": 600}  # bytes per thread; Triton 3.6 and 3.7 differ by 8
    names = ("recur", "outputs", "attend_back", "recur_back", *spilled)
    for usage in compiled(kernels_of_35b(*names)):
        assert usage.local <= spilled.get(usage.name, 0) and usage.shared <= 227 * 1024, usage


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_at_the_sizes_of_35b(dtype: torch.dtype) -> None:
    values = drawn(331, heads=(16, 32, 64 if dtype == torch.float32 else 128, 128), dtype=dtype)
    values |= {name: values[name].float() for name in ("decay", "beta", "state")}
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    results = with_gradients(triton_rule, values)
    for name, tensor in results.items():
        bound = 2e-5 if dtype == torch.float32 else 2e-2 if name in ("out", "final") else 4e-2
        assert_close(tensor, truth[name], bound, name)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_synchronise() -> None:
    values, bounds = drawn(200, state=False, heads=(16, 32, 64, 128)), integers(0, 1, 70, 200)
    with_gradients(triton_rule, values, cu_seqlens=bounds)
    leaves = {name: tensor.requires_grad_() for name, tensor in values.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(triton_rule, leaves, cu_seqlens=bounds)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
