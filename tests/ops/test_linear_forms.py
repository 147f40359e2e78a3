"""The forms of the linear map on a CPU against float64, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qwen35moe import backends, ops
from qwen35moe.backends import measured
from qwen35moe.modules import hooks
from qwen35moe.ops.cpu import products

FORMS = ("torch", "split", "onednn", "gemv", "transposed", "widened", "packed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def multiplies(name: str, dtype: torch.dtype, rows: int) -> bool:
    """Whether a form is for these; fewer than `products.refusal` refuses, which looks at threads and switches too."""
    return {
        "torch": True, "split": dtype == torch.float32,
        "onednn": dtype == torch.float32 and rows == 1 and products.has_onednn(),
        "gemv": dtype == torch.bfloat16 and rows == 1, "transposed": dtype == torch.bfloat16 and rows <= 64,
        "widened": dtype in (torch.bfloat16, torch.float16),
    }[name]  # fmt: skip


CASES = [
    (name, dtype, rows) for name in FORMS[:-1] for dtype in DTYPES[:3] for rows in (1, 2, 5, 64, 67)
    if multiplies(name, dtype, rows)
]  # fmt: skip


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((y.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[torch.dtype, int], str]]:
    """No weight is too small for a choice. Gives the table of the choices, which are forgotten afterwards."""
    chosen: dict[tuple[torch.dtype, int], str] = {}
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(hooks, "SMALL", 0)
    monkeypatch.setattr(products, "_CHOSEN", chosen)
    monkeypatch.setattr(measured, "MEASURED", {})
    torch.use_deterministic_algorithms(False)  # with them, as in the rest of the suite, nothing is chosen by measurement
    yield chosen
    torch.use_deterministic_algorithms(True, warn_only=True)


def choose(chosen: dict[tuple[torch.dtype, int], str], dtype: torch.dtype, name: str) -> None:
    chosen.update({(dtype, kind): name for kind in range(len(products.ROWS) + 1)})


class TestForms:
    @pytest.mark.parametrize(("name", "dtype", "rows"), CASES)
    def test_against_float64(self, name: str, dtype: torch.dtype, rows: int) -> None:
        """Also for a part of a larger weight, and written into a part of a larger result."""
        weight, x = draw(2 * 43, 31, dtype=dtype)[43:], draw(rows, 31, dtype=dtype, seed=1)
        bound = 2e-6 if dtype == torch.float32 else 8e-3
        y = products.FORMS[name](x, weight, None)
        assert y.dtype == dtype and y.is_contiguous() and error(y, x, weight) < bound
        whole = torch.full((rows + 2, 43), float("nan"), dtype=dtype)
        assert products.FORMS[name](x, weight, whole[1:-1]).data_ptr() == whole[1:-1].data_ptr()
        assert error(whole[1:-1], x, weight) < bound and whole[[0, -1]].isnan().all()

    @pytest.mark.parametrize("rows", [1, 2, 67])
    def test_a_split_product_has_torchs_error(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Parts that divide the weight, that leave a rest, and one part, which is torch's product."""
        monkeypatch.setattr(products, "_PART", 8)
        for size in (48, 43, 13):
            weight, x = draw(size, 310), draw(rows, 310, seed=1)
            assert error(products.split_product(x, weight), x, weight) < 4e-7

    def test_blocks_of_a_widened_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks that do not divide the weight, and rows wider than a block."""
        weight, x = draw(43, 31, dtype=torch.bfloat16), draw(6, 31, dtype=torch.bfloat16, seed=1)
        for block in (1, 31, 5 * 31 + 2, 100_000):
            monkeypatch.setattr(products, "_BLOCK", block)
            assert error(products.widened_product(x, weight), x, weight) < 4e-3

    def test_widened_sums_are_rounded_once(self) -> None:
        weight, x = draw(43, 310, dtype=torch.bfloat16), draw(6, 310, dtype=torch.bfloat16, seed=1)
        wide = F.linear(x.float(), weight.float())
        assert torch.allclose(products.widened_product(x, weight).float(), wide, rtol=2**-8, atol=1e-4)

    def test_ambient_dtype_and_no_rows(self) -> None:
        weight = draw(43, 31, dtype=torch.bfloat16)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            assert products.widened_product(weight[:6], weight).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(before)
        assert products.product(weight[:0], weight).shape == (0, 43)


class TestOperation:
    @pytest.mark.parametrize("name", FORMS[1:5])
    @pytest.mark.parametrize("bias", [False, True])
    def test_every_form_with_three_axes_and_a_bias(self, name: str, bias: bool) -> None:
        for dtype in DTYPES:
            x, weight, b = draw(1, 1, 31, dtype=dtype), draw(43, 31, dtype=dtype), draw(43, dtype=dtype) if bias else None
            if name in ops.linear.named and products.refusal(name, 1, weight) is None:
                with backends.use(linear=name), torch.no_grad():
                    y = ops.linear(x, weight, b)
                exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
                assert y.shape == (1, 1, 43) and (y - exact).abs().max() / exact.abs().max() < 1e-2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients(self, dtype: torch.dtype) -> None:
        name = "split" if dtype == torch.float32 else "widened"
        x, weight, grad = draw(2, 5, 31, dtype=dtype), draw(43, 31, dtype=dtype, seed=1), draw(2, 5, 43, dtype=dtype, seed=2)
        for needs in ((True, True), (True, False), (False, True)):
            leaves = [t.clone().requires_grad_(n) for t, n in zip((x, weight), needs, strict=True)]
            exact = [t.double().requires_grad_(n) for t, n in zip((x, weight), needs, strict=True)]
            with backends.use(linear=name), backends.ran() as ran:
                ops.linear(*leaves).backward(grad)
            assert ran.counts["linear", name] == 1
            F.linear(*exact).backward(grad.double())
            for ours, theirs in zip(leaves, exact, strict=True):
                assert (ours.grad is None) == (theirs.grad is None)
                if ours.grad is not None and theirs.grad is not None:
                    scale = theirs.grad.abs().max()
                    assert (ours.grad - theirs.grad).abs().max() / scale < (1e-6 if dtype == torch.float32 else 1e-2)

    def test_a_second_derivative(self, any_size: dict) -> None:
        choose(any_size, torch.float32, "split")
        x, weight = draw(5, 31).requires_grad_(), draw(43, 31, seed=1).requires_grad_()
        first = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), weight)[0]
        expected = torch.autograd.grad(F.linear(x, weight).square().sum(), x, create_graph=True)[0]
        torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), weight)[0], rtol=1e-4, atol=1e-4)

    def test_calls_with_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"weight \[4, 7\] must be \[F, D\], with D = 5"):
            ops.linear(draw(3, 5), draw(4, 7))
        with pytest.raises(ValueError, match="x is torch.float32, weight is torch.float64"):
            ops.linear(draw(3, 5), draw(4, 5, dtype=torch.float64))
        with backends.use(linear="packed"), pytest.raises(ValueError, match="the weight is not packed"):
            ops.linear(draw(3, 5), draw(4, 5))


    def test_a_weight_that_is_not_contiguous(self, any_size: dict) -> None:
        """oneDNN would copy it at every call."""
        choose(any_size, torch.float32, "onednn")
        weight, x = draw(43, 62)[:, 31:], draw(1, 31)
        with backends.ran() as ran:
            y = ops.linear(x, weight)
        assert ran.counts["linear", "torch"] == 1 and error(y, x, weight) < 2e-6
        assert (products.refusal("onednn", 1, weight) or "").startswith("the weight is not contiguous")


class TestChoice:
    @pytest.mark.parametrize("name", ["torch", "split"])
    def test_it_follows_the_measurement_and_is_made_once(
        self, name: str, any_size: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kinds = []

        def measure(forms: dict) -> measured.Measured:
            kinds.append(set(forms))
            for form in forms.values():
                form(0)
            return measured.Measured(dict.fromkeys(forms, 1e-3), name)

        monkeypatch.setattr(measured, "measure", measure)
        weight = draw(43, 31)
        with backends.ran() as ran:
            for rows in (1, 1, 3, 4, 5, 16, 64, 65, 300, 1):
                ops.linear(draw(rows, 31), weight)
        one_row = {"onednn"} if products.has_onednn() else set()
        assert ran.counts["linear", name] == 10 and kinds == [{"split", "torch"} | one_row, *[{"split", "torch"}] * 4]
        titles = ["1 row", "up to 4 rows", "up to 16 rows", "up to 64 rows", "more than 64 rows"]
        assert list(measured.MEASURED["linear"]) == [f"float32, {title}" for title in titles]
        assert f"measured: float32, up to 4 rows: {name} (ms: " in backends.describe("linear")

    def test_the_first_form_unless_another_is_clearly_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1000))
        monkeypatch.setattr(measured.time, "perf_counter", lambda: next(clock))
        assert measured.measure({"first": lambda _: None, "second": lambda _: None}).chosen == "first"

        def slow(number: int) -> None:
            next(clock)

        assert measured.measure({"first": slow, "second": lambda _: None}).chosen == "second"
        assert measured.measure({"first": lambda _: None, "second": slow}).chosen == "first"

    def test_nothing_is_measured_with_deterministic_algorithms(self, any_size: dict) -> None:
        torch.use_deterministic_algorithms(True)
        with backends.ran() as ran:
            ops.linear(draw(3, 31), draw(43, 31))
        assert ran.counts["linear", "torch"] == 1 and not any_size

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torch_runs_where_others_must_see_its_operators(self, dtype: torch.dtype, any_size: dict) -> None:
        """Autocast, counters of operations, subclasses, float64."""
        choose(any_size, dtype, "split" if dtype == torch.float32 else "widened")
        x, weight = draw(3, 31, dtype=dtype), draw(43, 31, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear(x, weight).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            ops.linear(x, weight)
            products.product(x, weight)
        assert counter.get_total_flops() == 2 * 2 * 3 * 31 * 43

        class Marked(Tensor):
            pass

        assert type(ops.linear(x, weight.as_subclass(Marked))) is Marked
        assert ops.linear(x.double(), weight.double()).dtype == torch.float64

    def test_transforms(self, any_size: dict) -> None:
        choose(any_size, torch.float32, "split")
        x, weight = draw(2, 5, 31), draw(43, 31)
        torch.testing.assert_close(torch.vmap(lambda x: ops.linear(x, weight))(x), F.linear(x, weight))
        grad = torch.func.grad(lambda w: ops.linear(x, w).sum())(weight)
        torch.testing.assert_close(grad, x.sum((0, 1)).expand(43, 31))
        tangent = torch.func.jvp(lambda w: ops.linear(x, w), (weight,), (weight,))[1]
        torch.testing.assert_close(tangent, F.linear(x, weight))

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_a_compiled_graph_has_torchs_product(self, any_size: dict) -> None:
        choose(any_size, torch.float32, "split")
        x, weight = draw(3, 31), draw(43, 31)
        compiled = torch.compile(lambda x, w: ops.linear(x, w), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))

    def test_a_name_chosen_by_the_user_is_the_experts_too(self, any_size: dict) -> None:
        """One that cannot multiply the experts' rows is replaced by torch's product there."""
        choose(any_size, torch.bfloat16, "widened")
        x, weight = draw(3, 31, dtype=torch.bfloat16), draw(43, 31, dtype=torch.bfloat16)
        widened, plain = products.widened_product(x, weight), products.torch_product(x, weight)
        assert torch.equal(products.product(x, weight), widened)
        for name in ("torch", "onednn", "split", "packed"):
            with backends.use(linear=name):
                assert torch.equal(products.product(x, weight), plain)

    def test_a_registered_implementation_runs_every_projection(self, any_size: dict) -> None:
        linear = nn.Linear(31, 43, bias=False)
        backends.register("linear", "twice", lambda x, weight, bias=None: 2 * F.linear(x, weight, bias), before="packed")
        try:
            torch.testing.assert_close(hooks.project(linear, draw(3, 31)), 2 * linear(draw(3, 31)))
        finally:
            backends.unregister("linear", "twice")
        torch.testing.assert_close(hooks.project(linear, draw(3, 31)), linear(draw(3, 31)))


def doubled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("attached", ["hook", "subclass", "forward", "parametrization"])
def test_what_is_attached_to_a_linear_runs(attached: str, any_size: dict) -> None:
    choose(any_size, torch.float32, "split")
    linear, x = nn.Linear(31, 43, bias=True), draw(3, 31)
    plain = linear(x)
    if attached == "hook":
        linear.register_forward_hook(doubled)
    elif attached == "subclass":
        linear.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    elif attached == "forward":
        linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)  # type: ignore[method-assign]
    else:
        with torch.no_grad():
            assert linear.bias is not None
            linear.bias.mul_(2)
        nn.utils.parametrize.register_parametrization(linear, "weight", Double())
    torch.testing.assert_close(hooks.project(linear, x), 2 * plain)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight
