"""The table of implementations: operation -> [implementation, ...], in order of preference.

Filled from three sides. The files of `qwen35moe.ops` register the PyTorch forms when they are imported; the optional
package `qwen35moe_kernels` registers its fast paths when the table is first used; anyone may add one more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen35moe import taps

# operation -> the module of qwen35moe.ops that defines and registers it. The names are public (CHANGELOG).
_HOMES = {
    "rms_norm": "norm",
    "gated_rms_norm": "norm",
    "rotary": "rope",
    "attention": "attention",
    "vision_attention": "vision_attention",
    "gelu_linear": "gelu_linear",
    "short_convolution": "convolution",
    "gated_delta_rule": "delta_rule",
    "delta_net_step": "decode_step",
    "router": "experts",
    "experts": "experts",
    "linear_cross_entropy": "losses",
}
_OPS = "qwen35moe.ops"
OPERATIONS: tuple[str, ...] = tuple(_HOMES)
ALIASES = {"delta_rule": "gated_delta_rule", "convolution": "short_convolution"}
AUTO = "auto"

Unsupported = Callable[..., "str | None"]


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. `skips` are the tap names that it computes internally and cannot show; `missing` is
    why it cannot run on this machine at all, whatever the inputs ("triton is not installed"); `slower` says why a later
    one is faster on these inputs."""

    operation: str
    name: str
    fn: Callable[..., Any] | None
    unsupported: Unsupported | None = None
    skips: tuple[str, ...] = ()
    differentiable: bool = True
    missing: str | None = None
    slower: Unsupported | None = None
    conditional: bool = field(init=False, default=False)  # whether anything at all could stand against a call

    def __post_init__(self) -> None:
        conditional = bool(self.unsupported or self.skips or self.missing or self.slower or not self.differentiable)
        object.__setattr__(self, "conditional", conditional)

    @property
    def own(self) -> bool:
        """Whether it is one of this library's plain PyTorch forms, which step aside for one another all the time."""
        return getattr(self.fn, "__module__", "").startswith("qwen35moe.ops.")

    def refusal(self, args: tuple, kwargs: dict[str, Any], caller: Any = None) -> str | None:
        """None, or the reason why this implementation cannot run this call."""
        if self.unsupported is not None and (reason := self.unsupported(*args, **kwargs)):
            return reason
        if self.missing:
            return self.missing
        if self.skips and caller is not None and taps.tapped(caller, self.skips):
            heard = ", ".join(name for name in self.skips if taps.tapped(caller, (name,)))
            return f"somebody listens to {heard}, which it never forms"
        if not self.differentiable and torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in tensors(args, kwargs)):
                return "it has no backward and an input requires a gradient"
        return None

    def passed_over(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why "auto" leaves this call to a later implementation although this one could run it, or None."""
        return self.slower(*args, **kwargs) if self.slower is not None else None


TABLE: dict[str, list[Implementation]] = {operation: [] for operation in OPERATIONS}
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
loaded = False  # whether all operations and the optional fast paths were asked to register


def tensors(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among a call's arguments, in order."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value


def register(
    operation: str,
    name: str,
    fn: Callable[..., Any] | None,
    unsupported: Unsupported | None = None,
    *,
    before: str | None = None,
    skips: Sequence[str] = (),
    differentiable: bool = True,
    missing: str | None = None,
    slower: Unsupported | None = None,
) -> None:
    """Add an implementation: last in the order of preference, or in front of the one named by `before`.

    unsupported(*args, **kwargs) -> None | reason gets exactly the call's arguments. skips: tap names that it goes around;
    it steps aside while somebody listens to one of them. differentiable=False: it steps aside when an input requires a
    gradient. missing: a reason why it cannot run on this machine whatever the inputs (fn may then be None): it is
    listed by `describe`, and its refusal is no warning. slower(*args, **kwargs) -> None | reason: why a later one is
    faster on these inputs; "auto" heeds it, a forced choice does not.
    """
    operation = operation_name(operation)
    if not name or name == AUTO:
        raise ValueError(f"{name!r} cannot be the name of an implementation")
    if fn is None and not missing:
        raise ValueError(f"{operation}: {name!r} has neither a function nor a reason (missing=) for having none")
    load_home(operation)
    entries = TABLE[operation]
    if any(entry.name == name for entry in entries):
        raise ValueError(f"{operation} already has an implementation {name!r}: take another name, or unregister it")
    entry = Implementation(operation, name, fn, unsupported, tuple(skips), differentiable, missing, slower)
    entries.insert(len(entries) if before is None else entries.index(find(operation, before)), entry)


def unregister(operation: str, name: str) -> None:
    """Remove an implementation again."""
    operation = operation_name(operation)
    TABLE[operation].remove(find(operation, name))


def implementations(operation: str) -> list[Implementation]:
    """The implementations of an operation, in order of preference."""
    operation = operation_name(operation)
    prepare()
    return list(TABLE[operation])


def operation_name(name: str) -> str:
    """The full name of an operation, aliases resolved; ValueError with the known ones."""
    name = ALIASES.get(name, name)
    if name not in TABLE:
        raise ValueError(f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}")
    return name


def find(operation: str, name: str) -> Implementation:
    """The implementation of that name; ValueError with the known ones."""
    for entry in TABLE[operation]:
        if entry.name == name:
            return entry
    known = implementations(operation)  # perhaps its home or the fast paths were not imported yet
    for entry in known:
        if entry.name == name:
            return entry
    names = ", ".join(repr(entry.name) for entry in known) or "none"
    raise ValueError(f"{operation} has no implementation {name!r}; known: {names}")


def load_home(operation: str) -> None:
    """Import the file that defines `operation`, so that its own entries are in the table, and first there.

    By name, because the files of `ops` import this one; from there the call finds them half imported and is idle.
    """
    module = f"{_OPS}.{_HOMES[operation]}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in {module, _OPS}:
            raise


def load_kernels() -> None:
    """Let the optional fast paths register themselves.

    Only their absence is forgiven: a broken install must not pass for a slow machine.
    """
    try:
        kernels = importlib.import_module("qwen35moe_kernels")
    except ModuleNotFoundError as error:
        if error.name != "qwen35moe_kernels":
            raise
        return
    kernels.register(register)


def prepare() -> bool:
    """Make sure, once, that everything which registers itself has done so."""
    global loaded
    if not loaded:
        loaded = True  # at once: what is registered here asks for the table
        try:
            for operation in OPERATIONS:
                load_home(operation)
            load_kernels()
        except BaseException:
            loaded = False  # the next call fails as well, instead of running without them
            raise
    return True


# torch.compile calls this function while it traces and takes the result for a constant: an import cannot be traced.
# This is what torch.compiler.assume_constant_result sets; calling that here would import dynamo, a matter of seconds.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def add_cases(operation: str, definition: Callable[..., Any], cases: Callable[..., Any]) -> None:
    """The definition of an operation, and the cases on which its implementations are judged.

    cases(dtype, device, generator) yields (args, kwargs); tensors in `dtype` on `device`, drawn from the CPU generator.
    """
    CASES[operation_name(operation)] = (definition, cases)


def cases(operation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(definition, cases) of an operation, as given to `add_cases`."""
    operation = operation_name(operation)
    load_home(operation)
    if operation not in CASES:
        raise ValueError(f"{operation} has no cases; with cases: {', '.join(CASES) or 'none'}")
    return CASES[operation]
