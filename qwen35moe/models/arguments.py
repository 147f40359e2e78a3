"""`takes`: a function whose arguments are the fields of a dataclass, and which gets them as one value.

    @dataclass(frozen=True, eq=False)
    class TextInputs:
        input_ids: Tensor | None = None
        ...

    class TextModel(nn.Module):
        @takes(TextInputs)
        def forward(self, inputs: TextInputs) -> ModelOutput: ...

    model.forward(input_ids=ids)

Each argument is named, typed and described once, and passed on as part of the value. Type checkers, `help` and
`inspect.signature` (which the Trainer and peft read) see the fields; an unknown keyword is a TypeError.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from qwen35moe.compat import Keyword, read_keywords

P = ParamSpec("P")
First = TypeVar("First")
Value = TypeVar("Value")
Result = TypeVar("Result")


def takes(
    kind: Callable[P, Value],
    table: Iterable[Keyword] | None = None,
) -> Callable[[Callable[[First, Value], Result]], Callable[Concatenate[First, P], Result]]:
    """Makes a function (self, value of the dataclass `kind`) a function (self, fields of `kind`).

    table: transformers' keywords that it takes too (`qwen35moe.compat`). ValueError for anything but a tensor in a field
    annotated `Tensor | None`.
    """
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    tensors = [field.name for field in fields(kind) if field.type == "Tensor | None"]  # pyright: ignore[reportArgumentType]

    def decorate(function: Callable[[First, Value], Result]) -> Callable[Concatenate[First, P], Result]:
        @functools.wraps(function)
        def with_arguments(first: First, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            read: Any = kwargs if table is None else read_keywords(function.__name__, table, kwargs, names)
            try:
                value = kind(*args, **read)  # pyright: ignore[reportCallIssue]
            except TypeError as error:  # "TextInputs.__init__() got an unexpected keyword argument ..."
                raise TypeError(function.__qualname__ + str(error).partition("__init__")[2]) from None
            for name in tensors:
                argument = getattr(value, name)
                if argument is not None and not isinstance(argument, Tensor):
                    raise ValueError(f"{name} is a {type(argument).__name__}: give a tensor")
            return function(first, value)

        set_signature(with_arguments, function, kind)
        return with_arguments

    return decorate


def set_signature(with_arguments: Any, function: Callable[..., Any], kind: Callable[..., Any]) -> None:
    """The first parameter of `function`, then the fields of `kind`; the documentation of both."""
    own, arguments = inspect.signature(function), inspect.signature(kind)
    parameters = [next(iter(own.parameters.values())), *arguments.parameters.values()]
    with_arguments.__signature__ = own.replace(parameters=parameters)
    bases = reversed(inspect.getmro(kind))  # pyright: ignore[reportArgumentType]
    documents = [function.__doc__, *(base.__doc__ for base in bases if inspect.get_annotations(base))]
    with_arguments.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in documents if text)
