"""Operations, and the table of their implementations.

An operation is a function with a definition and faster implementations with the same contract:

    @operation(name="recurrent")                                           # ops/delta_rule.py: the definition
    def gated_delta_rule(query, key, value, *, decay, beta, state=None, cu_seqlens=None): ...

    @gated_delta_rule.implementation("chunked_cpu", differentiable=False)  # ops/cpu/delta_rule.py
    def _(query, key, value, *, decay, beta, state=None, cu_seqlens=None): ...

    out, state = ops.gated_delta_rule(q, k, v, decay=decay, beta=beta, caller=self)

A call runs the implementation that was chosen by name, or else the first one available on this machine that supports the
arguments. The definition is last. `register` does the same by names, for users and for the optional package qwen35moe_kernels.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, overload

import torch

from qwen35moe import taps
from qwen35moe.taps.active import ACTIVE as ACTIVE_TAPS

from .record import RECORDING, note
from .signature import checked, equal, of_this_library
from .transforms import TRANSFORMS, active_transforms, forward_ad, interpreter, with_second_derivative

# The public names, in the order of a forward. `qwen35moe.ops` defines exactly these.
OPERATIONS: tuple[str, ...] = (
    *("rms_norm", "add_rms_norm", "gated_rms_norm", "linear", "projections", "rotary", "norm_rotary", "attention"),
    *("sigmoid_gate", "vision_attention", "gelu_linear", "short_convolution", "gated_delta_rule", "delta_net_step", "router"),
    *("experts", "swiglu", "add_shared_expert", "linear_cross_entropy"),
)
ALIASES = {"delta_rule": "gated_delta_rule", "convolution": "short_convolution"}
AUTO = "auto"
Params = ParamSpec("Params")
Result = TypeVar("Result")
Unsupported = Callable[..., "str | None"]
Form = TypeVar("Form", bound=Callable[..., Any])


@dataclass(frozen=True)
class Implementation:
    """An implementation of an operation and its requirements. See `backends.register` for the fields.

    first: the name of the operation's first parameter. absent: parameters with a default that `fn` does not take -> default.
    """

    operation: str
    name: str
    fn: Callable[..., Any] | None
    unsupported: Unsupported | None = None
    skips: tuple[str, ...] = ()
    differentiable: bool = True
    missing: str | None = None
    slower: Unsupported | None = None
    device: str | None = None
    compiles: bool = True
    transforms: tuple[str, ...] = TRANSFORMS
    double_backward: bool = True
    first: str = "the first argument"
    absent: Mapping[str, Any] = field(default_factory=dict)
    conditional: bool = field(init=False, default=False)  # False: it supports every call
    composable: bool = field(init=False, default=False)  # under every transform, differentiable any number of times
    own: bool = field(init=False, default=False)  # of this library, not registered by others

    def __post_init__(self) -> None:
        composable = self.differentiable and self.double_backward and self.transforms == TRANSFORMS
        needs = (self.unsupported, self.skips, self.missing, self.slower, self.device, self.absent)
        conditional = any(needs) or not (self.differentiable and self.compiles and self.transforms == TRANSFORMS)
        object.__setattr__(self, "conditional", conditional)
        object.__setattr__(self, "composable", composable)
        object.__setattr__(self, "own", self.fn is None or of_this_library(self.fn))

    @property
    def builtin(self) -> bool:
        """Whether it is one of this library in plain PyTorch: that it cannot run a call is not logged as a warning."""
        return getattr(self.fn, "__module__", "").startswith("qwen35moe.ops.")

    def refusal(self, args: tuple, kwargs: Mapping[str, Any], caller: Any = None) -> str | None:
        """The reason why this implementation cannot run this call, or None."""
        if self.device is not None:
            device = (args[0] if args else kwargs[self.first]).device
            if device.type != self.device:
                return f"{self.first} is on {device}, not on a {self.device.upper()}"
        if not self.compiles and torch.compiler.is_compiling():
            return "a graph is being compiled"
        for name, default in self.absent.items():
            if (value := kwargs.get(name, default)) is not default and not equal(value, default):
                return f"it does not take {name}="
        if self.unsupported is not None and (reason := self.unsupported(*args, **kwargs)):
            return reason
        if self.missing:
            return self.missing
        if self.skips and (ACTIVE_TAPS or kwargs.get("tap") is not None) and (reason := self._tapped(kwargs, caller)):
            return reason
        if self.transforms is not TRANSFORMS and not torch.compiler.is_compiling() and (
            interpreter() is not None or forward_ad._current_level >= 0  # a transform is active; checked at every call
        ):
            if names := [name for name in active_transforms() if name not in self.transforms]:
                return f"it does not support torch.func's {' and '.join(names)}"
        if not self.differentiable and torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    return "it has no backward and an input requires a gradient"
        return None

    def passed_over(self, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
        """The reason why "auto" prefers a later implementation although this one supports the call, or None."""
        return self.slower(*args, **kwargs) if self.slower is not None else None

    def _tapped(self, kwargs: Mapping[str, Any], caller: Any) -> str | None:
        """The reason if an active tap reads a value that it skips. Of a call with `tap=` the values belong to another module
        than the caller: those of the experts to the block."""
        if kwargs.get("tap") is not None:
            names = self.skips
        else:
            names = () if caller is None else tuple(name for name in self.skips if taps.tapped(caller, (name,)))
        return f"a tap reads {', '.join(names)}, which this implementation does not materialise" if names else None


PassedOver: TypeAlias = "tuple[tuple[Implementation, str, bool], ...]"  # (entry, reason, supported)
TABLE: dict[str, Operation[..., Any]] = {}
_INSIDE: Any = SimpleNamespace()  # the caller of an operation that another one calls


class Operation(Generic[Params, Result]):
    """A definition and its implementations. Calling it runs one of them."""

    def __init__(
        self, definition: Callable[Params, Result], name: str, composes: Sequence[str], transforms: tuple[str, ...]
    ) -> None:
        self.name, self.definition = definition.__name__, definition
        self.__name__, self.__doc__, self.__module__ = self.name, definition.__doc__, definition.__module__
        self.__wrapped__ = definition  # for inspect.signature and help()
        self.definition_name, self.composes = name, tuple(composes)
        self.entries: list[Implementation] = []
        self.candidates: tuple[Implementation, ...] = ()  # available on this machine
        self.builtin = True  # whether all candidates are of this library in plain PyTorch
        self.replaced = False  # whether "auto" may run an implementation that others have registered
        self.replaced_parts: tuple[str, ...] = ()  # those of `composes` that are `replaced`
        self.last: Implementation | None = None  # of the last call, and those that were passed over for it
        self.refused: PassedOver = ()
        self.pick: Callable[..., str | None] | None = None  # what "auto" runs of built-in candidates; None: go through them
        self.check: Callable[[str, tuple, dict[str, Any]], None] | None = None  # of the arguments of a call without `caller`
        self.reasons: dict[str, str] = {}  # implementation -> why it was passed over last, for describe()
        fields = checked(definition, self.name, name, definition, None, None, ())
        self.assign([Implementation(self.name, name, transforms=transforms, **fields)])

    @overload
    def __call__(self, *args: Params.args, **kwargs: Params.kwargs) -> Result: ...
    @overload
    def __call__(self, *args: Any, caller: torch.nn.Module | None, **kwargs: Any) -> Result: ...

    def __call__(self, *args: Any, caller: Any = None, **kwargs: Any) -> Any:
        """Run the implementation chosen for these arguments.

        caller: the calling nn.Module. Its `backend_choices` come before `backends.use`, its `path` names the layer in
        `backends.ran()`, and its active taps rule out implementations that do not materialise a tapped value.
        """
        if caller is None and not torch.compiler.is_compiling() and self.check is not None:
            self.check(self.name, args, kwargs)
        entry, refused = self.choose(args, kwargs, caller)
        # is_compiling() comes first: torch.compile would guard on the lists and attributes that follow.
        if not torch.compiler.is_compiling() and (RECORDING or entry is not self.last or refused != self.refused):
            note(self, entry, refused, args, kwargs, caller)
        if not entry.double_backward and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.twice(entry, args, kwargs)
        return entry.fn(*args, **kwargs)  # type: ignore[misc]

    def inside(self, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        """As a call, from inside another operation, which has checked its own arguments."""
        return self(*args, caller=_INSIDE, **kwargs)

    def is_ordinary(self, caller: torch.nn.Module) -> bool:
        """Whether nobody has chosen or registered an implementation or records calls: the caller may run the definition."""
        if CHOICES or recomputing or RECORDING or self.replaced or torch.compiler.is_compiling():
            return False
        return "backend_choices" not in caller.__dict__

    def choose(self, args: tuple, kwargs: dict[str, Any], caller: Any) -> tuple[Implementation, PassedOver]:
        """The implementation for these arguments, and the candidates that were passed over for it."""
        if not loaded:
            prepare()  # before the candidates are read: torch.compile would keep the list before registration
        if CHOICES or recomputing or (caller is not None and "backend_choices" in caller.__dict__):
            name = choice_of(self.name, caller)
            if name is not None:
                entry = self.find(name)
                if reason := entry.refusal(args, kwargs, caller):
                    raise ValueError(f"backend={name!r} cannot run {self.name}: {reason}")
                return entry, ()
            if any(choice_of(other, caller) for other in self.composes):
                return self.find(self.definition_name), ()
        if self.pick is not None and self.builtin and (name := self.pick(*args, **kwargs)) is not None:
            return self.named[name], ()
        refused: PassedOver = ()
        on_cpu = (args[0] if args else kwargs[self.candidates[0].first]).is_cpu
        for entry in self.candidates:
            if entry.device == "cpu" and not on_cpu:
                continue  # no reason is made up at every call on a GPU
            if self.replaced_parts and entry.own and entry.fn is not self.definition:
                parts = " and ".join(self.replaced_parts)
                refused += ((entry, f"it does not call the implementation that was registered for {parts}", True),)
                continue
            if not entry.conditional:
                return entry, refused
            reason = entry.refusal(args, kwargs, caller)
            slower = None if reason or entry.slower is None else entry.slower(*args, **kwargs)
            if reason is None and slower is None:
                return entry, refused
            refused += ((entry, reason or slower or "", reason is None),)
        for entry, _, supported in refused:
            if supported:
                return entry, ()  # no faster one supports the arguments
        reasons = [f"{entry.name}: {reason}" for entry, reason, _ in self.passed_over(refused)]
        raise ValueError(f"no implementation can run {self.name}: {'; '.join(reasons) or 'none is registered'}")

    def fused(self, *args: Any, caller: torch.nn.Module | None = None, **kwargs: Any) -> Result | None:
        """As a call, but None if the definition would run, for a caller that composes the definition itself."""
        entry, refused = self.choose(args, kwargs, caller)
        if entry.fn is self.definition:
            return None
        if not torch.compiler.is_compiling() and (RECORDING or entry is not self.last or refused != self.refused):
            note(self, entry, refused, args, kwargs, caller)
        return entry.fn(*args, **kwargs)  # type: ignore[misc]

    def twice(self, entry: Implementation, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run an implementation whose backward cannot be differentiated: a second derivative runs a composable one.

        One that others registered may compute something else than the definition, so that it has no second derivative.
        """
        others = (
            other.fn for other in self.candidates
            if entry.own and other.own and other.composable and not other.refusal(args, kwargs)
        )
        what = f"the implementation {entry.name!r} of {self.name}"
        assert entry.fn is not None
        return with_second_derivative(what, next(others, None), entry.fn, args, kwargs, cut=not entry.builtin)

    def passed_over(self, refused: PassedOver, chosen: Implementation | None = None) -> PassedOver:
        """`refused` and the implementations missing on this machine, in order of preference, up to `chosen`."""
        reasons = {entry.name: (entry, reason, supported) for entry, reason, supported in refused}
        preferred = self.entries[: self.entries.index(chosen)] if chosen in self.entries else self.entries
        reasons |= {entry.name: (entry, entry.missing, False) for entry in preferred if entry.missing}
        return tuple(reasons[entry.name] for entry in self.entries if entry.name in reasons)

    def implementation(
        self, name: str, unsupported: Unsupported | None = None, *, before: str | None = None, skips: Sequence[str] = (),
        differentiable: bool = True, missing: str | None = None, slower: Unsupported | None = None,
        device: str | None = None, compiles: bool = True, transforms: Sequence[str] = TRANSFORMS, double_backward: bool = True,
    ) -> Callable[[Form], Form]:
        """Decorator: register a function as an implementation, in front of the definition or of `before`. See `register`."""

        def add(fn: Form) -> Form:
            fields = checked(self.definition, self.name, name, fn, unsupported, slower, skips)
            options = {"device": device, "compiles": compiles, "transforms": transforms, "double_backward": double_backward}
            entry = Implementation(
                self.name, name, differentiable=differentiable, missing=missing, **fields, **options  # pyright: ignore
            )
            self.add(entry, before or self.definition_name)
            return fn

        return add

    def add(self, entry: Implementation, before: str | None) -> None:
        """Insert an implementation in front of the one named `before`, or last."""
        if any(other.name == entry.name for other in self.entries):
            raise ValueError(
                f"{self.name} already has an implementation {entry.name!r}: take another name, or unregister it"
            )
        index = len(self.entries) if before is None else self.entries.index(self.find(before))
        self.assign([*self.entries[:index], entry, *self.entries[index:]])

    def remove(self, name: str) -> None:
        """Remove an implementation."""
        entry = self.find(name)
        self.assign([other for other in self.entries if other is not entry])

    def assign(self, entries: Sequence[Implementation]) -> None:
        """Replace the list of implementations and the candidates."""
        self.entries = list(entries)
        self.candidates = tuple(entry for entry in self.entries if not entry.missing)
        self.builtin = all(entry.builtin for entry in self.candidates)
        self.named = {entry.name: entry for entry in self.candidates}
        first = next((i for i, entry in enumerate(self.candidates) if not entry.conditional), len(self.candidates))
        self.replaced = any(not entry.own for entry in self.candidates[: first + 1])  # those behind it never run
        for op in TABLE.values():
            if op.composes:
                op.replaced_parts = tuple(name for name in op.composes if name in TABLE and TABLE[name].replaced)

    def find(self, name: str) -> Implementation:
        """The implementation of that name; ValueError lists the known ones."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        prepare()  # the fast paths are registered when they are first needed
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = ", ".join(repr(entry.name) for entry in self.entries) or "none"
        raise ValueError(f"{self.name} has no implementation {name!r}; known: {names}")

    def __repr__(self) -> str:
        return f"<operation {self.name}: {', '.join(entry.name for entry in self.entries)}>"


CHOICES: dict[str, str] = {}  # backends.use: operation -> name; absent means "auto"
recomputing: list[object] = []  # recomputations in progress; on their threads the choices of their forwards apply
thread = threading.local()  # .choices: those of the forward that this thread recomputes
loaded = False  # whether the operations and the optional fast paths have registered


@overload
def operation(definition: Callable[Params, Result], /) -> Operation[Params, Result]: ...
@overload
def operation(
    *, name: str = "torch", composes: Sequence[str] = (), transforms: tuple[str, ...] = TRANSFORMS
) -> Callable[[Callable[Params, Result]], Operation[Params, Result]]: ...


def operation(
    definition: Any = None, /, *, name: str = "torch", composes: Sequence[str] = (), transforms: tuple[str, ...] = TRANSFORMS
) -> Any:
    """Decorator: turn a definition into an operation. name: of the definition among the implementations.

    composes: the operations that the definition calls. If an implementation of one of them is chosen by name, or "auto" may run
    one that others registered, the definition runs: the fused implementations of this operation call neither. transforms: those
    of torch.func that the definition supports.
    """

    def create(definition: Callable[..., Any]) -> Operation[..., Any]:
        op = Operation(definition, name, composes, transforms)
        TABLE[op.name] = op
        return op

    return create if definition is None else create(definition)


def choice_of(name: str, caller: Any = None) -> str | None:
    """The implementation chosen by name for an operation, None for "auto"."""
    if caller is not None:
        choices = caller.__dict__.get("backend_choices")
        if choices and name in choices:
            return None if choices[name] == AUTO else choices[name]
    return current_choices().get(name)


def current_choices() -> dict[str, str]:
    """The choices on this thread: those of `use`, or those of the forward that it recomputes."""
    choices = getattr(thread, "choices", None) if recomputing else None
    return CHOICES if choices is None else choices


def prepare() -> bool:
    """Import `qwen35moe.ops` and the optional fast paths, which registers their implementations. Once."""
    global loaded
    if not loaded:
        loaded = True  # before the imports: registering calls this function again
        try:
            importlib.import_module("qwen35moe.ops")  # not an import statement: its modules import this one
            _load_kernels()
        except BaseException:
            loaded = False  # the next call fails as well, instead of running without them
            raise
    return True


# torch.compile calls this function while it traces and treats the result as a constant, because an import cannot be traced.
# torch.compiler.assume_constant_result sets the same attribute, but calling it would import dynamo, which takes seconds.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_kernels() -> None:
    """Register the optional package. Only its absence is ignored: a broken installation raises instead of running slowly."""
    try:
        kernels = importlib.import_module("qwen35moe_kernels")
    except ModuleNotFoundError as error:
        if error.name != "qwen35moe_kernels":
            raise
        return
    from .registry import register  # it imports this module

    kernels.register(register)


def find_operation(name: str) -> Operation[..., Any]:
    """The operation of that name or alias; ValueError lists the known ones."""
    name = ALIASES.get(name, name)
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}")
    if name not in TABLE:
        prepare()
    return TABLE[name]
