"""Fast paths for qwen35moe: own Triton kernels, and adapters to causal_conv1d, flash_attn, fla and sonic-moe.

This package never imports qwen35moe. `qwen35moe.backends` imports it on first use and hands it its `register`, through
which every fast path enters the table of implementations with an unsupported: a function of the call's arguments that
returns None or the reason why the path cannot run them. A path that cannot run on this machine is registered too, with
`missing="..."` saying why, and `backends.describe()` then tells the user what could be had.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

__all__ = ["register"]

# Each has a function `register(register)`. In order: what registers before the same form later comes nearer to it.
MODULES = (
    "convolution", "gated_norm", "step", "causal_conv1d", "flash_attn", "delta_rule", "fla", "experts", "sonic_moe",
)  # fmt: skip


def register(register: Callable[..., None]) -> None:
    """Enter every fast path of this package in the table."""
    for name in MODULES:
        module = f"{__name__}.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(register)
