"""Operations, their implementations, and the choice of one for each call.

    operation -> [implementation, implementation, ...]          in order of preference, the definition last

An implementation may not support a call: its function `unsupported`, of exactly the call's arguments, returns the reason or
None. "auto" runs the first implementation that supports the arguments. An implementation chosen by name that cannot run raises
ValueError with the reason; there is no silent fallback.

    backends.use(gated_delta_rule="torch")           # process default, as a statement
    with backends.use(experts="triton"): ...         # scoped, as a context manager
    with backends.ran() as ran: model(ids)           # what ran, how often, with which shapes
    print(backends.describe())                       # every implementation, and whether and why it is used
    print(backends.verify())                         # every implementation against the definition in float64
    backends.register("experts", "mine", fn, unsupported=None, before="triton")

The choice of a model (`model.use_backends(...)`) comes before `backends.use(...)`, and that before "auto".

The table, the choices and the open recordings are process-wide. Under `torch.compile` the choice is made when the graph is
traced, without a log or a record.

operation.py has the decorator and the table, registry.py the functions that take a name, signature.py and transforms.py what an
implementation takes and supports, choice.py `use` and activation checkpointing, values.py whether a check may read values,
record.py and report.py the record of calls and `describe`, verification.py `verify`, cases.py its arguments.
"""

from __future__ import annotations

from .cases import add_cases, cases
from .choice import checkpoint, checkpoint_contexts, use
from .operation import ALIASES, OPERATIONS, Implementation, Operation, choice_of, operation
from .record import Call, Ran
from .registry import checked_choices, implementations, is_builtin, register, resolve, run, unregister
from .report import describe
from .verification import Report, verify

__all__ = [
    "ALIASES",
    "OPERATIONS",
    "Call",
    "Implementation",
    "Operation",
    "Ran",
    "Report",
    "add_cases",
    "cases",
    "checked_choices",
    "checkpoint",
    "checkpoint_contexts",
    "choice_of",
    "describe",
    "implementations",
    "is_builtin",
    "operation",
    "ran",
    "register",
    "resolve",
    "run",
    "unregister",
    "use",
    "verify",
]


def ran() -> Ran:
    """`with backends.ran() as ran:` records every call: `.calls`, `.counts[operation, name]`, `print(ran)`."""
    return Ran()
