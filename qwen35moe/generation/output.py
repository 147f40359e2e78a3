"""`GenerateOutput`: what generate(return_dict_in_generate=True) returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.utils._pytree as pytree
from torch import Tensor

from ..compat import short

NAMES = ("sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values")


class GenerateOutput(OrderedDict[str, Any]):
    """The results by name, as attributes and items, in the order of transformers' GenerateDecoderOnlyOutput.

    sequences [B*n, prompt + new] int64; scores, with output_scores: for each new token the scores [B*n, vocabulary] from which
    it was chosen, -inf where a filter removed it; logits, with output_logits: the same of the model's own logits;
    past_key_values: the cache, also as `output.cache` (its name since transformers 5.24). attentions and hidden_states are
    None. output[0] and to_tuple() count those that are present.
    """

    if TYPE_CHECKING:
        sequences: Tensor
        scores: tuple[Tensor, ...] | None
        logits: tuple[Tensor, ...] | None
        attentions: None
        hidden_states: None
        past_key_values: Any

    def __init__(self, values: Mapping[str, Any] = {}, /, **named: Any) -> None:  # noqa: B006
        results = {**values, **named}
        super().__init__((name, results[name]) for name in NAMES if results.get(name) is not None)

    def __getattr__(self, name: str) -> Any:
        if name in NAMES:
            return self.get(name)
        if name == "cache":
            return self.get("past_key_values")
        raise AttributeError(f"GenerateOutput has no {name!r}: it has {', '.join(NAMES)}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are present, in order."""
        return tuple(self.values())

    def __repr__(self) -> str:
        return f"GenerateOutput({', '.join(f'{name}={_shape(value)}' for name, value in self.items())})"


def _shape(value: Any) -> str:
    if isinstance(value, tuple) and value:
        return f"{len(value)} x {_shape(value[0])}"
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else short(value)


pytree.register_pytree_node(
    GenerateOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: GenerateOutput(dict(zip(names, values, strict=True))),
    serialized_type_name="qwen35moe.GenerateOutput",
)
