"""What a forward returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.routing import Routing


@dataclass
class ModelOutput:
    """The results of a forward call, as attributes and as a mapping of those that are there.

    logits [B, T, vocabulary] (or the last positions that were asked for); loss and aux_loss, scalars; router_logits, one
    [B*T, E] per sparse layer; hidden_states, the embedding, then one [B, T, D] per layer, the last after the final norm;
    attentions, one per layer: softmax weights [B, H, T, slots] of an attention layer, over the tokens in the cache and the
    new ones; the exact map [B, H, T, T] of a delta-net layer, over the new tokens only (what it has from before is in its
    memory, see docs/guide/attention_maps.md); routing; cache, the one that was given. Values at padded positions are zero.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: Routing | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cache: Cache | None = None

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return list(self.values())[key]
        if key not in self.keys():
            raise KeyError(f"{key!r} is not in this output, which has {', '.join(self.keys())}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Names of the results that are there."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name, None) is not None)

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, getattr(self, name)) for name in self.keys())

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default


class LossOutput(ModelOutput):
    """The result of a call with output_logits=False: everything but the logits."""

    @property
    def logits(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """There are none, and reading them says so."""
        raise AttributeError("the logits were not computed: the call said output_logits=False")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        """The constructor's None."""
