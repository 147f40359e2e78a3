"""torch.func, forward-mode AD and gradients of gradients of every operation, against autograd through its definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradgradcheck

from qwen35moe import backends, ops
from qwen35moe.backends.cases import CASES
from qwen35moe.backends.operation import TABLE
from tests.support.peer import assert_close, generator

# Operation -> number of its case in `backends.cases`: a small one that the fast form takes.
NUMBERS = {
    "rms_norm": 0, "add_rms_norm": 0, "gated_rms_norm": 0, "linear": 1, "projections": 2, "rotary": 0, "norm_rotary": 0,
    "attention": 1, "sigmoid_gate": 0, "vision_attention": 0, "gelu_linear": 0, "short_convolution": 2, "gated_delta_rule": 1,
    "delta_net_step": 0, "router": 0, "experts": 0, "swiglu": 0, "add_shared_expert": 0, "linear_cross_entropy": 1,
}  # fmt: skip
class Case:
    """A call of an operation as a function of its floating-point tensors: [sum of weighted outputs] and the outputs."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.op = TABLE[name]
        cases = [case for case in CASES[name](dtype, "cpu", generator(3)) if case[1].get("tap") is None]
        self.args, self.kwargs = cases[NUMBERS[name]]
        values = [*self.args, *self.kwargs.values()]
        self.places = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.is_floating_point()]
        self.inputs = tuple(values[i] for i in self.places)
        self.directions = tuple(torch.randn(x.shape, generator=generator(4), dtype=x.dtype) for x in self.inputs)

    def outputs(self, fn: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        values = [*self.args, *self.kwargs.values()]
        for place, x in zip(self.places, inputs, strict=True):
            values[place] = x
        count = len(self.args)
        result = fn(*values[:count], **dict(zip(self.kwargs, values[count:], strict=True)))
        result = result if isinstance(result, tuple) else (result,)
        return tuple(x for x in result if x.is_floating_point())

    def total(self, *inputs: Tensor, fn: Callable[..., Any] | None = None) -> Tensor:
        outputs = self.outputs(fn or self.op, *inputs)
        weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        return torch.stack([(x * weight).sum() for x, weight in zip(outputs, weights, strict=True)]).sum()

    def gradients(self, inputs: Sequence[Tensor], fn: Callable[..., Any] | None = None, create_graph: bool = False) -> Any:
        total = self.total(*inputs, fn=fn or self.op.definition)
        return torch.autograd.grad(total, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    def second(self, fn: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = self.leaves()
        gradients = self.gradients(leaves, fn, create_graph=True)
        product = torch.stack([(g * v).sum() for g, v in zip(gradients, self.directions, strict=True)]).sum()
        return torch.autograd.grad(product, leaves, allow_unused=True, materialize_grads=True)

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in self.inputs]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(range(len(self.inputs)))

    def batch(self) -> tuple[Tensor, ...]:
        """Three versions of every input."""
        return tuple(torch.stack([x, 1.1 * x, 0.7 * x]) for x in self.inputs)


# The forms whose backward cannot be differentiated, and that take the case.
ONCE = [
    (name, entry.name) for name in NUMBERS for entry in backends.implementations(name)
    if not entry.double_backward and not entry.missing and entry.builtin
    and entry.refusal(Case(name).args, Case(name).kwargs) is None
]  # fmt: skip


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 1e-10) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape
        assert_close(a, b, bound, f"input {number}") if b.abs().max() > 0 else assert_zero(a)


def assert_zero(x: Tensor) -> None:
    assert x.abs().max() < 1e-12


@pytest.fixture(params=NUMBERS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_operation_is_tried() -> None:
    assert tuple(NUMBERS) == backends.OPERATIONS


def test_torch_func_grad_and_vjp(case: Case) -> None:
    expected = case.gradients(case.leaves())
    assert_all_close(torch.func.grad(case.total, argnums=case.numbers)(*case.inputs), expected)
    outputs, vjp = torch.func.vjp(lambda *x: case.total(*x), *case.inputs)[:2]
    assert_all_close(vjp(torch.ones_like(outputs)), expected)


def test_jvp_and_forward_mode(case: Case) -> None:
    pairs = zip(case.gradients(case.leaves()), case.directions, strict=True)
    expected = torch.stack([(gradient * v).sum() for gradient, v in pairs]).sum()
    tangent = torch.func.jvp(case.total, case.inputs, case.directions)[1]
    assert_close(tangent, expected, 1e-10)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(case.inputs, case.directions, strict=True)]
        assert_close(forward_ad.unpack_dual(case.total(*duals)).tangent, expected, 1e-10)


def test_vmap_and_gradients_of_single_rows(case: Case) -> None:
    batch = case.batch()
    rows = [tuple(x[i] for x in batch) for i in range(3)]
    expected = [torch.stack(x) for x in zip(*(case.outputs(case.op.definition, *row) for row in rows), strict=True)]
    assert_all_close(torch.vmap(lambda *x: case.outputs(case.op, *x))(*batch), expected)
    per_row = torch.vmap(torch.func.grad(case.total, argnums=case.numbers))(*batch)
    gradients = [case.gradients([x.clone().requires_grad_() for x in row]) for row in rows]
    assert_all_close(per_row, [torch.stack(x) for x in zip(*gradients, strict=True)])


def test_vmap_over_weights_alone(case: Case) -> None:
    """An ensemble: one input, several weights (the second tensor)."""
    weights = case.batch()[1]
    axes = tuple(0 if i == 1 else None for i in case.numbers)
    actual = torch.vmap(lambda *x: case.outputs(case.op, *x), in_dims=axes)(case.inputs[0], weights, *case.inputs[2:])
    rows = [case.outputs(case.op.definition, case.inputs[0], w, *case.inputs[2:]) for w in weights]
    assert_all_close(actual, [torch.stack(x) for x in zip(*rows, strict=True)])


@pytest.mark.parametrize(("name", "form"), ONCE)
def test_gradients_of_gradients_of_a_form_with_its_own_backward(name: str, form: str) -> None:
    case = Case(name)
    with backends.use(**{name: form}):
        actual = case.second(case.op)
    assert_all_close(actual, case.second(case.op.definition))


@pytest.mark.parametrize(("name", "form"), ONCE)
def test_a_batch_of_gradients_of_such_a_form(name: str, form: str) -> None:
    """torch.autograd.grad(is_grads_batched=True), as torch.autograd.functional's vectorize=True."""
    case = Case(name)
    leaves = case.leaves()
    with backends.use(**{name: form}):
        total = case.total(*leaves)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=total.dtype)
    actual = torch.autograd.grad(total, leaves, scales, is_grads_batched=True, allow_unused=True, materialize_grads=True)
    expected = [torch.stack([g * s for s in scales]) for g in case.gradients(case.leaves())]
    assert_all_close(actual, expected)


def test_the_ordinary_backward_is_that_of_the_form_itself() -> None:
    """The bits of a first derivative do not depend on the door to the second."""
    case = Case("gated_rms_norm")
    form = TABLE["gated_rms_norm"].find("cpu").fn
    assert form is not None
    direct, through = case.gradients(case.leaves(), form), case.gradients(case.leaves(), case.op)
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))


@pytest.mark.parametrize("name", ["gated_delta_rule", "short_convolution", "attention", "experts"])
def test_gradgradcheck(name: str) -> None:
    case = Case(name)
    leaves = [x if i > 2 else x.clone().requires_grad_() for i, x in enumerate(case.inputs)]
    assert gradgradcheck(case.total, leaves, fast_mode=True, atol=1e-6, rtol=1e-4)


def test_hessian_and_functional_forms() -> None:
    case = Case("gated_rms_norm")
    f = lambda x: case.total(x, *case.inputs[1:])  # noqa: E731
    exact = lambda x: case.total(x, *case.inputs[1:], fn=case.op.definition)  # noqa: E731
    expected = torch.autograd.functional.hessian(exact, case.inputs[0])
    assert_close(torch.func.hessian(f)(case.inputs[0]), expected, 1e-10)
    assert_close(torch.autograd.functional.hessian(f, case.inputs[0]), expected, 1e-10)
    assert_close(torch.autograd.functional.jacobian(torch.func.grad(f), case.inputs[0]), expected, 1e-10)
    product = torch.autograd.functional.vhp(f, case.inputs[0], case.directions[0])[1]
    assert_close(product, torch.einsum("abcdef,abc->def", expected, case.directions[0]), 1e-10)


def test_a_form_chosen_by_name_says_that_it_does_not_support_a_transform() -> None:
    case = Case("experts")
    reason = "'sorted' cannot run experts: it does not support torch.func's grad"
    with backends.use(experts="sorted"), pytest.raises(ValueError, match=reason):
        torch.func.grad(case.total)(*case.inputs)


def test_attention_with_dropout_has_no_second_derivative() -> None:
    query, key, value = (torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = ops.attention(query, key, value, scale=0.3, dropout=0.5)
    with pytest.raises(ValueError, match="no second derivative with dropout"):
        torch.autograd.grad(out.sum(), query, create_graph=True)


def test_a_registered_form_that_is_not_differentiable_twice_says_so() -> None:
    backends.register("rms_norm", "theirs", lambda x, weight, *, eps: x * weight, double_backward=False)
    try:
        x = torch.randn(2, 5, requires_grad=True)
        with backends.use(rms_norm="theirs"):
            y = ops.rms_norm(x, torch.ones(5), eps=1e-6)
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.ones(2, 5))
        with pytest.raises(ValueError, match="'theirs' of rms_norm has no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
    finally:
        backends.unregister("rms_norm", "theirs")
