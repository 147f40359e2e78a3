"""Fast forms of the operations in plain PyTorch. Importing this package registers them.

Most are written for CPUs: fewer passes over memory, blocks that stay in cache, explicit backwards. Forms that run on any
device (SDPA, grouped_mm, chunks) are beside them.
"""

from __future__ import annotations

from . import (  # noqa: F401  each registers its implementations
    attention,
    convolution,
    decode_step,
    delta_rule,
    experts,
    gelu_linear,
    losses,
    norm,
    rope,
    vision_attention,
)
