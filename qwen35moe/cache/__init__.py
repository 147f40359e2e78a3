"""The state of a batch of conversations between forward calls.

value.py     `Cache`: the state of every layer, a value that belongs to the caller
states.py    `KVCache`, `DeltaNetState`: the state of one layer
rollback.py  `RollbackLog`: rolls back the last tokens of a Gated DeltaNet layer, exactly
layout.py    `TokenLayout`: the arrangement of a call's tokens for the layers
file.py      saving and loading
"""

from __future__ import annotations

from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate, KVCache, LayerState
from qwen35moe.cache.value import Cache, Snapshot

__all__ = ["Cache", "DeltaNetState", "DeltaNetUpdate", "KVCache", "LayerState", "Snapshot"]
