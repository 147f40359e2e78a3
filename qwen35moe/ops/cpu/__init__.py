"""Fast forms of the operations in plain PyTorch. Importing this package registers them.

Most are for CPUs: fewer passes over memory, blocks that stay in cache, explicit backwards. Others run on any device: attention
by SDPA, experts by grouped_mm, the delta rule in chunks.
"""

from __future__ import annotations

from . import (  # noqa: F401  each registers implementations
    attention,
    attention_blocks,
    convolution,
    decode_step,
    delta_rule,
    experts,
    gelu_linear,
    linear,
    losses,
    norm,
    rope,
    vision_attention,
)
