"""The adapter to flash-linear-attention, with a stand-in of the signature and checks of fla 0.6.0's source (see
docs/reference/adapters.md): names, dtypes and shapes of arguments; forward and backward against the definition; which function
ran; every unsupported reason."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.backends.operation import TABLE
from tests.support.kernel_checks import assert_close, draw, integers, refusal
from tests.support.stand_ins import received, require

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

OPERATION = "gated_delta_rule"
G, H, K, V = 2, 4, 8, 12


_laid_out: deque[tuple[Tensor, Tensor]] = deque(maxlen=4)  # as fla's tensor_cache: by the identity of the object


def _layout(bounds: Tensor) -> Tensor:
    """The bounds as they were when this object first came."""
    for known, values in _laid_out:
        if known is bounds:
            return values
    _laid_out.append((bounds, bounds.clone()))
    return _laid_out[-1][1]


def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    batch, tokens, _, width = q.shape
    state, bounds = options["initial_state"], options.get("cu_seqlens")
    require(k.shape == q.shape and v.shape[:2] == q.shape[:2], "reads past the end: q, k [B, T, H, K], v [B, T, HV, V]")
    require(g.shape == beta.shape == v.shape[:3], "reads past the end: g and beta [B, T, HV]")
    require(q.dtype == k.dtype == v.dtype, "Both operands must be same dtype")  # of tl.dot
    require(tokens > 0, "nothing is launched")
    require(options["scale"] == width**-0.5 and options["use_qk_l2norm_in_kernel"], "as in the definition")
    rows = batch
    if bounds is not None:
        require(batch == 1, "The batch size is expected to be 1 rather than the given one", ValueError)
        rows = len(bounds) - 1
        require(state is None or len(state) == rows, "The number of initial states is expected to be equal", ValueError)
        bounds = _layout(bounds)
        require(int(bounds[-1]) == tokens, "tokens behind the last bound are not written")
    if state is not None:
        require(state.shape == (rows, v.shape[2], width, v.shape[-1]), "reads past the end: initial_state [N, HV, K, V]")
    out, final = recurrent_gated_delta_rule(q, k, v, decay=g.float(), beta=beta, state=state, cu_seqlens=bounds)
    return out, final.float() if options["output_final_state"] else None


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
    cp_context: Any = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """float32 as well, which fla multiplies in TF32."""
    require(q.shape[2] == k.shape[2], "q and k must have the same number of heads", ValueError)
    require(v.shape[2] % q.shape[2] == 0, "num_v_heads (HV) must be evenly divisible by num_heads (H)", ValueError)
    require(not (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first or cp_context), "not in this stand-in")
    require(chunk_indices is None and not kwargs, "not in this stand-in")
    if cu_seqlens_cpu is not None:
        require(cu_seqlens is not None and torch.equal(_layout(cu_seqlens), _layout(cu_seqlens_cpu)), "two layouts")
    require(q.shape[-1] <= 256, "current kernel does not support head dimension larger than 256.", AssertionError)
    require(len(q) * v.shape[2] <= 65535, "Triton Error [CUDA]: invalid argument")
    return _rule(q, k, v, g, beta, {
        "scale": scale, "initial_state": initial_state, "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens,
    })  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, gv: Tensor | None = None,
    beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    require(gk is None and gv is None and g is not None and beta is not None, "not in this stand-in")
    require(not (use_gate_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first), "not in this stand-in")
    require(A_log is None and dt_bias is None and not kwargs, "not in this stand-in")
    assert g is not None and beta is not None
    out, final = _rule(q, k, v, g, beta, {
        "scale": scale, "initial_state": initial_state, "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens,
    })  # fmt: skip

    def backward(gradient: Tensor) -> None:
        raise NotImplementedError("Backward pass is not implemented yet and we do not have plans to implement it")

    return received(out, backward), final if final is None else received(final, backward)


VERSIONS = {"fla-core": "0.6.0", "triton": "3.6.0"}


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """fla 0.6 with Triton 3.6 on a machine with an A100: the adapter registers again, ahead of all others."""
    from qwen35moe_kernels import fla as adapter
    from qwen35moe_kernels import runtime

    module = ModuleType("fla.ops.gated_delta_rule")
    for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
        setattr(module, function.__name__, function)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        package = module if name == module.__name__ else ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    known, versions = importlib.metadata.version, dict(VERSIONS)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or known(name))
    monkeypatch.setattr(runtime, "unsupported_cuda", lambda **tensors: None)
    machine(monkeypatch, (8, 0))
    before = list(backends.implementations(OPERATION))
    backends.unregister(OPERATION, "fla")
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        adapter.register(backends.register)
    yield module
    TABLE[OPERATION].assign(before)


def machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str = "3.6.0", qla: bool = False) -> None:
    from qwen35moe_kernels import fla as adapter

    monkeypatch.setattr(adapter, "_capability", lambda device: capability)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton if name == "triton" else known(name))
    if qla:
        package = ModuleType("flash_qla")
        package.__spec__ = importlib.machinery.ModuleSpec("flash_qla", None)
        monkeypatch.setitem(sys.modules, "flash_qla", package)


def drawn(
    tokens: int, batch: int = 2, rows: int = 2, dtype: torch.dtype = torch.bfloat16, width: int = K, out: int = V
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:  # fmt: skip
    args = tuple(draw(batch, tokens, *shape, seed=i, dtype=dtype) for i, shape in enumerate([(G, width)] * 2 + [(H, out)]))
    gates = {"decay": -draw(batch, tokens, H, seed=3).exp() / 10, "beta": draw(batch, tokens, H, seed=4).sigmoid()}
    return args, gates | {"state": draw(rows, H, width, out, seed=5)}


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_forward_and_backward(tokens: int) -> None:
    args, options = drawn(tokens)
    assert_close(OPERATION, "fla", args, options, torch.bfloat16, forward=2**-7, backward=2**-6)
    del options["state"]
    assert_close(OPERATION, "fla", args, options, torch.bfloat16, forward=2**-7, backward=2**-6)


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_documents_from_states(dtype: torch.dtype) -> None:
    args, options = drawn(9, batch=1, rows=3)
    options["cu_seqlens"] = integers(0, 1, 5, 9).to(dtype)
    assert_close(OPERATION, "fla", args, options, torch.bfloat16, forward=2**-7, backward=2**-6)


def test_one_token_goes_through_the_recurrent_kernel(fla: ModuleType, calls: Any) -> None:
    """In float32 too, which it computes exactly, but not with a gradient, which it does not support."""
    with (
        calls(fla, "fused_recurrent_gated_delta_rule") as steps,
        calls(fla, "chunk_gated_delta_rule") as chunks,
        backends.ran() as ran,
    ):
        for dtype, gradient in ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)):
            args, options = drawn(1, dtype=dtype)
            state = options["state"].clone()
            out, final = backends.run(OPERATION, args[0].requires_grad_(gradient), *args[1:], **options)
            assert (out.dtype, final.dtype) == (dtype, torch.float32)
            assert torch.equal(state, options["state"])
        args, options = drawn(2)
        backends.run(OPERATION, *args, **options)
    assert (steps.count, chunks.count) == (2, 2)
    assert ran.counts == {(OPERATION, "fla"): 4}


@pytest.mark.usefixtures("fla")
def test_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(args: tuple[Tensor, ...], options: dict[str, Tensor], **other: Tensor) -> str | None:
        return refusal(OPERATION, "fla", *args, **(options | other))

    args, options = drawn(3)
    assert reason(args, options) is None
    wide = reason(drawn(3, dtype=torch.float32)[0], options)
    assert wide == "query is float32, not one of bfloat16, float16: fla multiplies float32 in TF32, to three digits"
    assert reason(drawn(3, dtype=torch.float64)[0], options) == "query is float64, not one of bfloat16, float16"
    assert "state is float64" in (reason(args, options, state=options["state"].double()) or "")
    assert "fla takes one dtype" in (reason((*args[:2], args[2].half()), options) or "")
    assert "264 and 12 wide: fla takes at most 256" in (reason(*drawn(2, width=264)) or "")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert reason(args, options) == "a graph is being compiled, and fla is not a torch.library operator"


@pytest.mark.usefixtures("fla")
def test_limits_of_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(args: tuple[Tensor, ...], options: dict[str, Tensor]) -> str | None:
        return refusal(OPERATION, "fla", *args, **options)

    assert reason(*drawn(0)) == "value [2, 0, 4, 12] is empty"
    rows = 16384
    args = tuple(torch.zeros(1, 2, *x.shape[2:], dtype=x.dtype).expand(rows, -1, -1, -1) for x in drawn(2)[0])
    gates = {name: torch.zeros(1, 2, H).expand(rows, -1, -1) for name in ("decay", "beta")}
    assert reason(args, gates) == "16384 rows of 4 heads: fla launches at most 65535 together"
    assert reason(tuple(x[1:] for x in args), {name: x[1:] for name, x in gates.items()}) is None
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: False)
    timed = reason(*drawn(2))
    assert timed == "deterministic algorithms are enabled, and fla chooses its tiles by timing them"
    assert reason(*drawn(1)) is None  # the recurrent kernel has one tile


def test_bounds_that_are_filled_again(fla: ModuleType, calls: Any) -> None:
    """fla keeps the layout of the chunks by the identity of cu_seqlens: one object per layout, and never the caller's."""
    (args, options), bounds = drawn(9, batch=1, rows=3), integers(0, 1, 5, 9)
    with backends.use(gated_delta_rule="fla"), calls(fla, "chunk_gated_delta_rule") as recorded:
        for values in ((0, 1, 5, 9), (0, 4, 5, 9)):
            bounds.copy_(integers(*values))
            for _ in range(2):
                out, final = backends.run(OPERATION, *args, **options, cu_seqlens=bounds)
            expected, state = recurrent_gated_delta_rule(*args, **options, cu_seqlens=bounds)
            assert (out - expected).abs().max() <= 2**-7 * expected.abs().max()
            assert (final - state).abs().max() <= 1e-5 * state.abs().max()
    seen = [options["cu_seqlens"] for _, options in recorded.arguments]
    assert seen[0] is seen[1] and seen[2] is seen[3] and seen[1] is not seen[2] and all(x is not bounds for x in seen)
    hosts = [options["cu_seqlens_cpu"] for _, options in recorded.arguments]
    assert hosts[0] is hosts[1] and all(x.dtype == torch.int64 and x is not bounds for x in hosts)


def test_bounds_of_inference_mode_do_not_reach_a_backward() -> None:
    from qwen35moe_kernels import fla as adapter

    bounds, device = integers(0, 2, 5), torch.device("cpu")
    with torch.inference_mode():
        assert adapter._bounds(bounds, device)["cu_seqlens"].is_inference()
        inside = bounds.clone()
        assert adapter._bounds(inside, device)["cu_seqlens"] is not adapter._bounds(inside, device)["cu_seqlens"]
    assert not adapter._bounds(bounds, device)["cu_seqlens"].is_inference()


@pytest.mark.usefixtures("fla")
def test_documents_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's own kernels accept them; flash-qla, which lays out the chunks itself, does not."""
    args, options = drawn(9, batch=1, rows=4)
    options["cu_seqlens"] = integers(0, 4, 4, 9, 9)
    assert_close(OPERATION, "fla", args, options, torch.bfloat16, forward=2**-7, backward=2**-6)
    wide, gates = drawn(3, batch=1, rows=2, width=128, out=128)
    for capability in ((9, 0), (12, 0)):
        machine(monkeypatch, capability, qla=True)
        assert refusal(OPERATION, "fla", *wide, **gates, cu_seqlens=integers(0, 1, 3)) is None
        empty = refusal(OPERATION, "fla", *wide, **gates, cu_seqlens=integers(0, 0, 3))
        assert (empty or "").startswith("a document of cu_seqlens is empty: flash-qla, to which fla dispatches, assigns")
        assert refusal(OPERATION, "fla", *args, **options) is None  # flash-qla takes heads of 128


def test_amd_numbers_are_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 has capability 9.4, and none of Hopper's defects."""
    from qwen35moe_kernels import fla as adapter

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    device = torch.device("cuda", 61)  # not cached
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "6.4")
        assert adapter._wrong_gradients(adapter._capability(device)) is None
    assert adapter._capability(torch.device("cuda", 62)) == (9, 4)


@pytest.mark.usefixtures("fla")
def test_training_avoids_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper with Triton 3.6 auto trains with another implementation, a forced choice raises, and `verify` reports why."""

    def reason(width: int = 128) -> str | None:
        args, options = drawn(2, width=width, out=width)
        args[1].requires_grad_()
        with torch.no_grad():
            assert refusal(OPERATION, "fla", *args, **options) is None  # the forward is right everywhere
        return refusal(OPERATION, "fla", *args, **options)

    assert reason() is None
    machine(monkeypatch, (9, 0), triton="3.7.1")
    assert reason() is None
    machine(monkeypatch, (9, 0), triton="3.6.0+git1")
    assert "wrong on Hopper GPUs with Triton 3.6.0+git1 (its issue 640)" in (reason() or "")
    report = backends.verify("fla", dtypes=[torch.bfloat16], device="cpu")
    assert not report.ran and "issue 640" in str(report)
    args, options = drawn(2)
    args[1].requires_grad_()
    with backends.ran() as ran:
        backends.run(OPERATION, *args, **options)
    assert ran.counts == {(OPERATION, "torch"): 1}
    with backends.use(gated_delta_rule="fla"), pytest.raises(ValueError, match="cannot run .*issue 640"):
        backends.run(OPERATION, *args, **options)
    machine(monkeypatch, (10, 0), triton="3.7.1")
    assert "returned NaN on this GPU (its issue 913)" in (reason() or "")
    for capability in ((9, 0), (10, 0)):
        machine(monkeypatch, capability, qla=True)
        assert reason() is None
        assert reason(width=64) is not None  # flash-qla takes 128 only
        with monkeypatch.context() as off:
            off.setenv("FLA_FLASH_QLA", "0")
            assert reason() is not None
    machine(monkeypatch, (12, 0))
    assert reason() is None


@pytest.mark.usefixtures("fla")
def test_an_older_fla_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35moe_kernels import fla as adapter

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert adapter.missing() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.1")
    assert (adapter.missing() or "").startswith("fla 0.5.1 is installed, the adapter needs 0.6 or newer")


def test_describe_names_the_command_that_installs_it() -> None:
    if refusal(OPERATION, "fla", *drawn(2)[0], **drawn(2)[1]) is None:
        pytest.skip("fla is installed on this machine")
    text = backends.describe(OPERATION)
    assert "fla" in text and ("flash-qla, which fla uses if it is installed" in text or "no CUDA device" in text)
