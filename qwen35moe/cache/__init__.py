"""The state of a batch of conversations between forward calls.

value.py     `Cache`: one value that belongs to the caller
states.py    the state of one layer: `KVCache` or `DeltaNetState`
rollback.py  `RollbackLog`: takes back the last tokens of a Gated DeltaNet layer, exactly
layout.py    `TokenLayout`: how the tokens of a call are arranged for the layers
file.py      saving and loading
"""

from __future__ import annotations

from qwen35moe.cache.states import DeltaNetState, KVCache, LayerState
from qwen35moe.cache.value import Cache, Snapshot

__all__ = ["Cache", "DeltaNetState", "KVCache", "LayerState", "Snapshot"]
