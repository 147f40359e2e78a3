"""Fast paths for qwen35moe: own Triton kernels, and adapters to causal_conv1d, flash_attn, fla and sonic-moe.

This package never imports qwen35moe. `qwen35moe.backends` imports it on first use and hands it its `register`, through
which every fast path enters the table of implementations with an objection: a function of the call's arguments that
returns None or the reason why the path cannot run them. A path whose package is not installed is registered too, with
`missing="..."` saying so, and `backends.describe()` then tells the user what could be had.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["register"]


def register(register: Callable[..., None]) -> None:
    """Enter every fast path of this package in the table. None exists yet."""
