"""One token of Gated DeltaNet in one or two launches: against its definition, and in the model.

The model uses it for one token per row, without a gradient, without a tap on a value that it does not materialise, without
recorded segments, without hooks on the modules that it replaces, and unless a form of an operation inside it was chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, taps
from tests.support import peer
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, entry, refusal
from tests.support.peer import FULL, LINEAR, generator, odd_shape

pytest.importorskip("triton")
OPERATION = "delta_net_step"
SIZES = [(3, 2, 6, 8, 12, 4), (1, 1, 3, 5, 24, 2), (2, 3, 3, 16, 7, 1)]

CASES = [*((size, torch.float32) for size in SIZES), *((SIZES[0], dtype) for dtype in DTYPES[1:])]


def arguments(
    batch: int, groups: int, heads: int, width: int, out: int, taps_: int, dtype: torch.dtype, gates: str = "ordinary"
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    channels = 2 * groups * width + heads * out
    A_log, dt_bias = (x.to(DEVICE) for x in peer._gates(torch.Size([heads]), generator(5), gates))
    args = draw(batch, channels, dtype=dtype), draw(batch, heads, out, seed=1, dtype=dtype)
    args += draw(batch, heads, seed=2, dtype=dtype), draw(batch, heads, seed=3, dtype=dtype)
    return args, {
        "conv_state": draw(batch, channels, taps_ - 1, seed=4, dtype=dtype),
        "recurrent_state": draw(batch, heads, width, out, seed=5),
        "conv_weight": draw(channels, taps_, seed=6, dtype=dtype), "A_log": A_log, "dt_bias": dt_bias,
        "norm_weight": 1 + 0.2 * draw(out, seed=7), "groups": groups, "eps": 1e-6,
    }  # fmt: skip


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("size,dtype", CASES, ids=str)
def test_against_the_definition(size: tuple[int, ...], dtype: torch.dtype, launches: int, monkeypatch, calls) -> None:
    from qwen35moe_kernels import step

    if launches == 2:
        monkeypatch.setattr(step, "_FEW", 0)
        monkeypatch.setattr(step, "_COLUMNS", 4)
    args, options = arguments(*size, dtype)
    with calls(step, "normed") as norms:
        assert_close(OPERATION, "triton", args, options, dtype, forward=max(4e-6, ROUNDED[dtype]))
    assert norms.count == (launches == 2 and size[4] > 4)


@pytest.mark.parametrize("gates", ["transformers", "hard"])
def test_at_other_gates(gates: str) -> None:
    args, options = arguments(*SIZES[0], torch.float32, gates)
    assert_close(OPERATION, "triton", args, options, torch.float32, forward=4e-6)


@pytest.mark.parametrize("a", [-90.0, -17.0, -9.7, 0.0, 19.0, 90.0])
def test_the_decay_over_the_range_of_a(a: float) -> None:
    """A direct formula of softplus loses its digits at one end of the range."""
    args, options = arguments(*SIZES[0], torch.float32)
    args = (*args[:2], torch.full_like(args[2], a), args[3])
    options |= {"dt_bias": torch.zeros_like(options["dt_bias"]), "A_log": torch.zeros_like(options["A_log"])}
    assert_close(OPERATION, "triton", args, options, torch.float32, forward=4e-6)


def test_equal_and_zero_keys() -> None:
    args, options = arguments(*SIZES[0], torch.float32)
    for tensor in (args[0], options["conv_state"].mT):
        tensor[..., :32] = 0  # both queries and both keys
    assert_close(OPERATION, "triton", args, options, torch.float32, forward=4e-6)


def test_inputs_are_not_written_to_and_may_be_views() -> None:
    args, options = arguments(*SIZES[0], torch.float32)
    before = [x.clone() for x in (*args, options["conv_state"], options["recurrent_state"])]
    with backends.use(delta_net_step="triton"), backends.ran() as ran:
        outputs = backends.run(OPERATION, *args, **options)
        transposed = options | {name: options[name].mT.contiguous().mT for name in ("conv_state", "recurrent_state")}
        again = backends.run(OPERATION, *args, **transposed)
    assert ran.counts == {(OPERATION, "triton"): 2}
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    unchanged = (*args, options["conv_state"], options["recurrent_state"])
    assert all(torch.equal(a, b) for a, b in zip(unchanged, before, strict=True))


@pytest.mark.parametrize("name", ["triton", "fused_cpu", "torch"])
@pytest.mark.parametrize("launches", [1, 2])
def test_active_rows_are_written_in_place(name: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of an active row becomes the new one, in its own memory; the others keep theirs."""
    from qwen35moe_kernels import step

    if launches == 2:
        monkeypatch.setattr(step, "_FEW", 0)
        monkeypatch.setattr(step, "_COLUMNS", 4)
    args, options = arguments(*SIZES[0], torch.float32)
    active = torch.tensor([True, False, True], device=DEVICE)
    run = entry(OPERATION, name).fn
    y, conv_state, after = run(*args, **options)
    before = options["recurrent_state"].clone()
    other = run(*args, **options, active=active)
    assert other[2] is options["recurrent_state"]
    assert torch.equal(other[0], y) and torch.equal(other[1], conv_state)
    assert torch.equal(other[2], torch.where(active[:, None, None, None], after, before)) and not torch.equal(after, before)


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = arguments(*SIZES[0], torch.float32)
    assert refusal(OPERATION, "triton", *args, **options) is None
    wide = options | {"recurrent_state": options["recurrent_state"].double()}
    assert refusal(OPERATION, "triton", *args, **wide) == "recurrent_state is float64, not float32"
    large = options | {"recurrent_state": torch.empty(1, 1, 256, 256, device=DEVICE)}
    too_large = "recurrent_state has 256 x 256 elements per head, one program holds 32768"
    assert refusal(OPERATION, "triton", *args, **large) == too_large
    double = options | {"A_log": options["A_log"].double()}
    assert refusal(OPERATION, "triton", *args, **double).startswith("A_log is float64, not one of")
    strided = options | {"recurrent_state": options["recurrent_state"].mT.contiguous().mT, "active": torch.ones(3) > 0}
    in_place = "recurrent_state is not contiguous and would be written in place"
    assert refusal(OPERATION, "triton", *args, **strided) == in_place
    trained = options | {"recurrent_state": options["recurrent_state"].clone().requires_grad_()}
    with backends.use(delta_net_step="triton"), pytest.raises(ValueError, match="it has no backward and an input"):
        backends.run(OPERATION, *args, **trained)
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal(OPERATION, "triton", *args, **options) == "recurrent_state is on cpu, not on CUDA"


# --------------------------------------------------------------------------------------------------------------- the model

CASE = odd_shape(
    7, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, num_experts=5, num_experts_per_tok=2,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_conv_kernel_dim=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model.to(DEVICE)


@torch.no_grad()
def decoded(model: Any, *, max_length: int | None = None, record: int = 0) -> tuple[Tensor, Any]:
    """Logits of two tokens, one at a time, after a prompt of six, and the cache after them."""
    ids = CASE.ids(2, 8).to(DEVICE)
    cache = model.new_cache(2, max_length, record=record)
    model(ids[:, :6], cache=cache)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(6, 8)]
    return torch.cat(steps, dim=1), cache


@pytest.fixture
def in_front() -> Any:
    """The kernel ahead of the definition, as on a GPU."""
    kernel = entry(OPERATION, "triton")
    options: dict[str, Any] = {"skips": kernel.skips, "differentiable": False}
    backends.register(OPERATION, "fused", kernel.fn, kernel.unsupported, before="fused_cpu", **options)
    yield
    backends.unregister(OPERATION, "fused")


def steps(ran: Any) -> dict[str, int]:
    """Number of calls of every operation of the delta-net layers."""
    counts: dict[str, int] = {}
    for call in ran.calls:
        if call.operation in (OPERATION, "short_convolution", "gated_delta_rule", "gated_rms_norm"):
            counts[call.operation] = counts.get(call.operation, 0) + 1
    return counts


COMPOSED = {"short_convolution": 6, "gated_delta_rule": 6, "gated_rms_norm": 6}  # 2 layers, the prompt and 2 tokens
FUSED = {"short_convolution": 2, "gated_delta_rule": 2, "gated_rms_norm": 2, OPERATION: 4}


@pytest.mark.usefixtures("in_front")
@pytest.mark.parametrize("max_length", [None, 20], ids=["growing", "static"])
def test_the_model_decodes_with_it(model: Any, max_length: int | None) -> None:
    with backends.ran() as ran:
        logits, cache = decoded(model, max_length=max_length)
    assert steps(ran) == FUSED
    assert {call.path for call in ran.calls if call.operation == OPERATION} == {f"layers.{i}.linear_attn" for i in (0, 2)}
    with backends.use(delta_net_step="torch"), backends.ran() as ran:
        expected, other = decoded(model, max_length=max_length)
    assert steps(ran) == COMPOSED
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    for layer in (0, 2):
        for name in ("conv_state", "recurrent_state"):
            one, two = getattr(cache[layer], name), getattr(other[layer], name)
            assert one.shape == two.shape and (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.usefixtures("in_front")
def test_the_model_composes_the_operations_where_needed(model: Any) -> None:
    with backends.ran() as ran:
        expected, _ = decoded(model)
    assert steps(ran) == FUSED
    layer = model.model.layers[0].linear_attn

    def composed_in_layer_0(ran: Any) -> bool:
        return {call.path for call in ran.calls if call.operation == OPERATION} == {"layers.2.linear_attn"}

    with backends.ran() as ran, taps.record(model, "layers.0.linear_attn.decay") as recorded:
        logits, _ = decoded(model)
    assert composed_in_layer_0(ran) and len(recorded["layers.0.linear_attn.decay"]) == 3
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    names = [f"layers.0.linear_attn.{name}" for name in ("qkv", "gate", "normed", "state", "output")]
    with backends.ran() as ran, taps.record(model, names) as recorded:
        decoded(model)
    assert steps(ran) == FUSED
    with backends.use(delta_net_step="torch"), taps.record(model, names) as other:
        decoded(model)
    for name in names:
        assert len(recorded[name]) == len(other[name]) == 3
        for one, two in zip(recorded[name], other[name], strict=True):
            assert one.shape == two.shape and (one - two).abs().max() <= 1e-5 * two.abs().max()
    for module in (layer.conv1d, layer.norm):
        handle = module.register_forward_hook(lambda *_: None)
        with backends.ran() as ran:
            decoded(model)
        handle.remove()
        assert composed_in_layer_0(ran)
    with backends.ran() as ran:
        decoded(model, record=2)
    assert OPERATION not in steps(ran)
    with backends.use(gated_delta_rule="torch"), backends.ran() as ran:
        decoded(model)
    assert steps(ran) == COMPOSED


@pytest.mark.usefixtures("in_front")
def test_gradients_flow_through_one_cached_token(model: Any) -> None:
    ids = CASE.ids(2, 7).to(DEVICE)
    cache = model.new_cache(2)
    model(ids[:, :6], cache=cache)
    with backends.ran() as ran:
        logits = model(ids[:, 6:], cache=cache).logits
    assert OPERATION not in steps(ran)
    logits.sum().backward()
    grad = model.model.layers[0].linear_attn.in_proj_qkv.weight.grad
    assert grad is not None and grad.abs().max() > 0
    model.zero_grad()


@pytest.mark.usefixtures("in_front")
def test_one_operation_under_torch_compile() -> None:
    args, options = arguments(*SIZES[0], torch.float32)

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        return backends.run(OPERATION, *args, **options)

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(*args), call(*args), strict=True))
    names = "conv_state recurrent_state conv_weight A_log dt_bias norm_weight groups eps".split()
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.delta_net_step.default, (*args, *(options[name] for name in names)),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
