"""`backends.verify`: implementations against the definition of their operation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from tests.backends.rms_norms import doubled, not_on_cuda, plain


def norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for shape in ((2, 3, 4), (1, 7)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, x[0].flatten()[: shape[-1]].clone()), {"eps": 0.5}


@pytest.mark.usefixtures("own_table")
class TestVerify:
    @pytest.fixture(autouse=True)
    def cases(self, own_table: None) -> None:
        backends.add_cases("rms_norm", plain, norm_cases)

    def test_a_correct_implementation_passes_forward_and_backward(self) -> None:
        report = backends.verify("rms_norm", dtypes=(torch.float32, torch.bfloat16))
        assert report.ok and len(report.ran) == 4
        assert 0 < report.worst["rms_norm", "torch"] < 4e-2
        assert "rms_norm   torch           float32   2/2" in str(report)

    def test_a_wrong_value_fails(self) -> None:
        backends.register("rms_norm", "wrong", lambda x, weight, *, eps: plain(x, weight, eps=eps) + 1e-3)
        report = backends.verify("wrong")
        assert not report.ok and report.worst["rms_norm", "wrong"] > 1e-4
        assert "FAILED on 2, first case 0" in str(report)

    def test_a_wrong_gradient_fails(self) -> None:
        def wrong(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            return plain(x, weight.detach(), eps=eps)

        backends.register("rms_norm", "wrong", wrong)
        row = backends.verify("wrong").rows[0]
        assert row.forward < 1e-6 and row.backward == 1.0 and not row.ok

    def test_nan_missing_gradients_wrong_shapes_and_exceptions_fail(self) -> None:
        def raises(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            raise RuntimeError("no such kernel")

        backends.register("rms_norm", "nan", lambda x, weight, *, eps: plain(x, weight, eps=eps) * float("nan"))
        backends.register("rms_norm", "detached", lambda x, weight, *, eps: plain(x, weight, eps=eps).detach())
        backends.register("rms_norm", "narrow", lambda x, weight, *, eps: plain(x, weight, eps=eps)[..., :1])
        backends.register("rms_norm", "two", lambda x, weight, *, eps: (x, x))
        backends.register("rms_norm", "raises", raises)
        for name in ("nan", "detached", "narrow", "two", "raises"):
            report = backends.verify(name)
            assert not report.ok, name
            assert report.worst["rms_norm", name] == float("inf"), name
        assert "RuntimeError: no such kernel" in str(backends.verify("raises"))
        assert "2 outputs, the definition has 1" in str(backends.verify("two"))

    def test_an_unsupported_implementation_is_reported_as_not_run(self) -> None:
        backends.register("rms_norm", "fast", doubled, not_on_cuda)
        report = backends.verify("fast", device="cpu")
        assert not report.ok and not report.worst
        assert "did not run: query is on cpu, not on CUDA" in str(report)
        assert backends.verify("rms_norm", device="cpu").ok  # torch ran and is correct

    def test_an_implementation_without_backward_is_compared_in_the_forward_only(self) -> None:
        def forward_only(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            assert not x.requires_grad
            return plain(x, weight, eps=eps)

        backends.register("rms_norm", "fast", forward_only, differentiable=False)
        assert backends.verify("fast").ok

    def test_an_implementation_that_writes_into_its_arguments_fails(self) -> None:
        def overwriting(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
            y = x * weight * eps
            with torch.no_grad():
                x.zero_()
            return y.clone()

        backends.register("rms_norm", "overwriting", overwriting, differentiable=False)
        assert not backends.verify("overwriting").ok
        assert "it changed its argument x; callers go on using their tensors" in str(backends.verify("overwriting"))

    def test_integers_must_be_equal(self) -> None:
        def top(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
            return x * weight, x.argmax(-1)

        def bottom(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
            return x * weight, x.argmin(-1)

        backends.unregister("rms_norm", "torch")
        backends.register("rms_norm", "top", top)
        backends.register("rms_norm", "bottom", bottom)
        backends.add_cases("rms_norm", top, norm_cases)
        assert backends.verify("top").ok
        assert backends.verify("bottom").worst["rms_norm", "bottom"] == float("inf")

    def test_operation_and_implementation_names(self) -> None:
        with pytest.raises(ValueError, match="unknown name 'unknown'; implementations: .*torch"):
            backends.verify("unknown")
        assert {row.operation for row in backends.verify("rms_norm").rows} == {"rms_norm"}
        assert backends.cases("rms_norm") == (plain, norm_cases)
        assert backends.cases("delta_net_step")[0] is ops.delta_net_step.definition
        with pytest.raises(ValueError, match="unknown operation 'delta_step'; known: rms_norm"):
            backends.cases("delta_step")


def test_every_registered_implementation_passes() -> None:
    """The built-in cases, on the implementations of this repository."""
    report = backends.verify()
    print(report)
    assert report.ok, str(report)
    assert {row.operation for row in report.ran} >= {"rms_norm", "gated_delta_rule", "experts"}
