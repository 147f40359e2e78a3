"""Which implementation runs an operation: one table, and "no" comes with a reason.

    operation -> [implementation, implementation, ...]          in order of preference

Each implementation may have an unsupported: a function of exactly the call's arguments that returns None, or the reason
why it cannot run them. "auto" takes the first implementation without an unsupported. A forced choice that cannot run
raises ValueError with the reason; nothing falls back behind the caller's back.

    backends.use(gated_delta_rule="torch")           # process default, as a statement
    with backends.use(experts="triton"): ...         # scoped, as a context manager
    with backends.ran() as ran: model(ids)           # who ran, how often, with which shapes
    print(backends.describe())                       # every implementation, and why it is or is not used
    print(backends.verify())                         # every implementation against the definition in float64

What beats what: a model's own choice (`model.use_backends(...)`), then `backends.use(...)`, then "auto".

The table, the choices and the open recordings are process-wide. Under `torch.compile` the choice is made when the graph
is traced, without a log or a record.

table.py holds the implementations, choice.py picks one and runs it, calls.py and description.py say what happened,
verification.py judges.
"""

from __future__ import annotations

from .calls import Call, Ran
from .choice import checked_choices, checkpoint, checkpoint_contexts, choice_of, resolve, run, unregister, use
from .description import describe
from .table import ALIASES, OPERATIONS, Implementation, add_cases, cases, implementations, register
from .verification import Report, verify

__all__ = [
    "ALIASES",
    "OPERATIONS",
    "Call",
    "Implementation",
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
    "ran",
    "register",
    "resolve",
    "run",
    "unregister",
    "use",
    "verify",
]


def ran() -> Ran:
    """`with backends.ran() as ran:` collects every call: `.calls`, `.counts[operation, name]`, `print(ran)`."""
    return Ran()
