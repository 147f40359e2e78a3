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
`inspect.signature` (which the Trainer and peft read) see the fields; transformers' keywords of a table
are translated, and an unknown keyword is a TypeError.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from qwen35moe.compat import Keyword, read_keywords

P = ParamSpec("P")
First = TypeVar("First")
Value = TypeVar("Value")
Result = TypeVar("Result")

# Integers of the other widths become int64. attention_mask and cu_seqlens are converted where they are read.
INTEGERS = (
    "input_ids", "labels", "logits_to_keep", "position_ids", "seq_idx", "cache_position", "mm_token_type_ids",
    "image_grid_thw", "video_grid_thw",
)  # fmt: skip
NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


def takes(
    kind: Callable[P, Value],
    table: Iterable[Keyword] = (),
) -> Callable[[Callable[[First, Value], Result]], Callable[Concatenate[First, P], Result]]:
    """Makes a function (self, value of the dataclass `kind`) a function (self, fields of `kind`).

    table: transformers' keywords that it takes too (`qwen35moe.compat`). None in a field whose type has no None stands for its
    default. ValueError for anything but a tensor in a field annotated `Tensor | None`.
    """
    items = fields(kind)  # pyright: ignore[reportArgumentType]
    names = tuple(item.name for item in items)
    tensors = frozenset(item.name for item in items if item.type == "Tensor | None") | {"logits_to_keep"}
    defaults = frozenset(item.name for item in items if item.default not in (None, MISSING) and "None" not in str(item.type))
    parameters = inspect.signature(kind).parameters.values()
    positional = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    translates = hasattr(kind, "translated")
    public = tuple(item.name for item in items if not item.metadata.get("internal"))

    def decorate(function: Callable[[First, Value], Result]) -> Callable[Concatenate[First, P], Result]:
        @functools.wraps(function)
        def with_arguments(first: First, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            method = f"{type(first).__name__}.forward" if function.__name__ == "forward" else function.__name__
            named: dict[str, Any] = kwargs
            for name in kwargs:
                if name not in names:
                    named = read_keywords(method, table, kwargs, public)
                    break
            if len(args) > len(positional) or any(name in named for name in positional[: len(args)]):
                raise TypeError(_misplaced(method, len(args), positional, named))
            arguments: dict[str, Any] = {**dict(zip(positional, args, strict=False)), **named}
            for name, value in list(arguments.items()):
                if value is None:
                    if name in defaults:
                        del arguments[name]  # wrappers pass None for an argument that is not given
                elif name in tensors:
                    arguments[name] = _tensor(name, value)
            value: Any = kind(**arguments)  # pyright: ignore[reportCallIssue]
            return function(first, value.translated(method) if translates else value)

        set_signature(with_arguments, function, kind, public)
        return with_arguments

    return decorate


def _tensor(name: str, value: Any) -> Any:
    """The value of an argument that is a tensor, integers of narrow types as int64."""
    if isinstance(value, Tensor):
        return value.long() if name in INTEGERS and value.dtype in NARROW else value
    if name == "logits_to_keep":
        return value
    if type(value).__name__.endswith("Cache"):
        raise ValueError(f"{name} is a {type(value).__name__}: give a cache as past_key_values= or cache=")
    raise ValueError(f"{name} is a {type(value).__name__}: give a tensor")


def _misplaced(method: str, count: int, positional: tuple[str, ...], keywords: dict[str, Any]) -> str:
    """The message of Python for too many positional arguments, or for one that is given twice."""
    if count > len(positional):
        return f"{method}() takes from 1 to {len(positional) + 1} positional arguments but {count + 1} were given"
    twice = next(name for name in positional[:count] if name in keywords)
    return f"{method}() got multiple values for argument {twice!r}"


def set_signature(
    with_arguments: Any, function: Callable[..., Any], kind: Callable[..., Any], public: tuple[str, ...]
) -> None:
    """The first parameter of `function`, then the fields of `kind`; the documentation of both."""
    own, arguments = inspect.signature(function), inspect.signature(kind).parameters
    parameters = [next(iter(own.parameters.values())), *(arguments[name] for name in arguments if name in public)]
    with_arguments.__signature__ = own.replace(parameters=parameters)
    bases = reversed(inspect.getmro(kind))  # pyright: ignore[reportArgumentType]
    documents = [function.__doc__, *(base.__doc__ for base in bases if inspect.get_annotations(base))]
    with_arguments.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in documents if text)
