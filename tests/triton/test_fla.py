"""The adapter to flash-linear-attention, with a stand-in of fla's documented signature and checks (0.6): names, dtypes and
shapes of arguments; forward and backward against the definition; which function ran; every unsupported reason."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.backends.operation import TABLE
from tests.support.kernel_checks import assert_close, draw, integers, refusal
from tests.support.stand_ins import require

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

OPERATION = "gated_delta_rule"
HALF = (torch.float16, torch.bfloat16)
G, H, K, V = 2, 4, 8, 12


def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    batch, tokens, heads, width = q.shape
    state, bounds = options["initial_state"], options.get("cu_seqlens")
    require(k.shape == q.shape and v.shape[:2] == q.shape[:2], "q, k [B, T, H, K], v [B, T, HV, V]")
    require(v.shape[2] % heads == 0, "num_v_heads (HV) must be evenly divisible by num_heads (H)")
    require(g.shape == beta.shape == v.shape[:3], "g and beta must be of shape [B, T, HV]")
    require(q.dtype == k.dtype == v.dtype and g.dtype == torch.float32, "q.dtype == k.dtype == v.dtype, g in float32")
    require(options["scale"] == width**-0.5 and options["use_qk_l2norm_in_kernel"], "as in the definition")
    rows = batch
    if bounds is not None:
        require(batch == 1, "The batch size is expected to be 1 rather than the given one when using `cu_seqlens`")
        require(bounds.dtype == torch.int64 and int(bounds[-1]) == tokens, "cu_seqlens (torch.LongTensor)")
        rows = len(bounds) - 1
    if state is not None:
        expected = (rows, v.shape[2], width, v.shape[-1])
        require(state.shape == expected and state.dtype == torch.float32, "initial_state [N, HV, K, V] float32")
    out, final = recurrent_gated_delta_rule(q, k, v, decay=g, beta=beta, state=state, cu_seqlens=bounds)
    return out, final if options["output_final_state"] else None


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    require(q.dtype in HALF, "ChunkGatedDeltaRuleFunction does not support float32")
    require(not (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first or cp_context), "not in this stand-in")
    if cu_seqlens_cpu is not None:
        require(cu_seqlens is not None and torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu), "cu_seqlens, on the host as well")
    require(q.shape[-1] <= 256, "current kernel does not support head dimension larger than 256")
    return _rule(q, k, v, g, beta, {
        "scale": scale, "initial_state": initial_state, "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens,
    })  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, gv: Tensor | None = None,
    beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, g, beta, initial_state))
    require(not gradient, "Backward pass is not implemented yet")
    require(gk is None and gv is None and g is not None and beta is not None, "not in this stand-in")
    assert g is not None and beta is not None
    return _rule(q, k, v, g, beta, {
        "scale": scale, "initial_state": initial_state, "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens,
    })  # fmt: skip


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
