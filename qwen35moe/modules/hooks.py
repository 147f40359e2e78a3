"""Whether a fused implementation may read a weight without calling its module, and on which device a module computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has the forward of `kind` and no hooks."""
    unchanged = type(module).forward is kind.forward and "forward" not in module.__dict__
    return unchanged and not module._forward_hooks and not module._forward_pre_hooks


def device_of(module: Any) -> torch.device:
    """The device of a module's weight. Of a weight that accelerate keeps elsewhere until it is used, the device to which its
    hook brings it."""
    device = module.weight.device
    if device.type == "meta":
        device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or device)
    return device
