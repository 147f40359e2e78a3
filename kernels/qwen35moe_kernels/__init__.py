"""Fast paths for qwen35moe: own Triton kernels, and adapters to causal_conv1d, flash_attn, fla, sonic-moe, zentorch.

This package never imports qwen35moe. `qwen35moe.backends` imports it on first use and passes its `register` to the modules
below. Each implementation is registered with an `unsupported` function, which takes the arguments of the call and returns
None or the reason why the implementation cannot run them. An implementation that cannot run on this machine is registered
with `missing="..."`, the reason and the remedy, which `backends.describe()` shows.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

__all__ = ["register"]

# Each has a function `register(register)`. The order counts: of two that register before the same form, the later one stands
# next to it.
MODULES = (
    "convolution", "norm", "linear", "rotary", "sigmoid_gate", "router", "shared_expert", "gated_norm", "step", "causal_conv1d",
    "varlen", "flash_attn", "decode_attention", "delta_rule", "fla", "experts", "sonic_moe", "zentorch",
)  # fmt: skip


def register(register: Callable[..., None]) -> None:
    """Registers every implementation of this package."""
    for name in MODULES:
        module = f"{__name__}.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(register)
