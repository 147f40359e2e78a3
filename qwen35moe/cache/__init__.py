"""The state of a batch of conversations between forward calls.

value.py     `Cache`: the state of every layer, a value that belongs to the caller
lengths.py   `RowCounts`: the part of it that counts the tokens of each row
states.py    `KVCache`, `DeltaNetState`: the state of one layer
view.py      `LayerView`: the same, as `cache[i]` shows it: to read and to edit
ids.py       the ids of the cached tokens, against which a prompt is checked
modes.py     tensors that outlive inference_mode
snapshot.py  `Snapshot`: an earlier state of a cache
rollback.py  `RollbackLog`: rolls back the last tokens of a Gated DeltaNet layer, exactly
static.py    one decoded token per row of a static cache, in device memory alone
layout.py    `TokenLayout`: the arrangement of a call's tokens for the layers
file.py      saving and loading
"""

from __future__ import annotations

from qwen35moe.cache.snapshot import Snapshot
from qwen35moe.cache.states import DeltaNetState, DeltaNetUpdate, KVCache, LayerState
from qwen35moe.cache.value import Cache
from qwen35moe.cache.view import LayerView

__all__ = ["Cache", "DeltaNetState", "DeltaNetUpdate", "KVCache", "LayerState", "LayerView", "Snapshot"]
