"""The call of an expert's MLP in two parts, between which a tap reads or replaces the activations of all experts.

    x -> forward pre-hooks -> gate_proj, up_proj -> | -> down_proj -> forward hooks

A tap on expert_act needs the rows of every expert before the first down_proj runs, which no call of a single MLP allows. The
parts run the hooks in the order of `nn.Module.__call__`, each once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.hooks import BackwardHook

from qwen35moe.modules.hooks import project
from qwen35moe.modules.moe import MLP


class InterruptedCall:
    """One call of an MLP: `activate`, then `finish`. ValueError where the module computes something else than MLP.forward."""

    def __init__(self, mlp: nn.Module) -> None:
        mlp = getattr(mlp, "_orig_mod", mlp)  # of torch.compile, which cannot stop in between: it runs as written
        self.mlp: Any = mlp
        self.backward: Any = None  # a BackwardHook, if there are hooks of the backward
        # accelerate's hook replaces the forward of the instance by one that calls the hook around the old one.
        self.offload = mlp.__dict__.get("_hf_hook")
        own = ("forward" in mlp.__dict__ and self.offload is None) or type(mlp).__call__ is not MLP.__call__
        if own or getattr(type(mlp), "forward", None) is not MLP.forward:
            raise ValueError(
                f"a tap reads the activations of single experts, and {type(mlp).__name__} in place of an expert has a forward "
                "of its own, which may not compute them: tap mlp.routed, or put an MLP there"
            )

    def activate(self, x: Tensor) -> Tensor:
        """silu(gate x) * up x of the rows [rows, D], after the pre-hooks: [rows, F]."""
        mlp = self.mlp
        self.args, self.kwargs = self._run_pre_hooks((x,))
        full, self.partial_backward = mlp._get_backward_hooks()
        before = mlp._get_backward_pre_hooks()
        if full or before:
            self.backward = BackwardHook(mlp, full, before)
            self.args = self.backward.setup_input_hook(self.args)
        args, kwargs = self.args, self.kwargs
        if self.offload is not None:
            args, kwargs = self.offload.pre_forward(mlp, *args, **kwargs)
        return _activation(mlp, *args, **kwargs)

    def finish(self, activation: Tensor) -> Tensor:
        """down of the activation [rows, F], after the forward hooks: [rows, D]."""
        mlp = self.mlp
        out = project(mlp.down_proj, activation)
        if self.offload is not None:
            out = self.offload.post_forward(mlp, out)
        with_kwargs = {**_module._global_forward_hooks_with_kwargs, **mlp._forward_hooks_with_kwargs}
        for number, hook in (*_module._global_forward_hooks.items(), *mlp._forward_hooks.items()):
            arguments = (self.args, self.kwargs) if number in with_kwargs else (self.args,)
            result = hook(mlp, *arguments, out)
            out = out if result is None else result
        if self.backward is not None:
            out = self.backward.setup_output_hook(out)
        if self.partial_backward and out.grad_fn is not None:
            for hook in self.partial_backward:
                out.grad_fn.register_hook(_module._WrappedHook(hook, mlp))
        return out

    def _run_pre_hooks(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs: dict[str, Any] = {}
        mlp = self.mlp
        for number, hook in (*_module._global_forward_pre_hooks.items(), *mlp._forward_pre_hooks.items()):
            if number in mlp._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(mlp, args, kwargs) or (args, kwargs)
            elif (result := hook(mlp, args)) is not None:
                args = result if isinstance(result, tuple) else (result,)
        return args, kwargs


def _activation(mlp: Any, x: Tensor) -> Tensor:
    return F.silu(project(mlp.gate_proj, x)) * project(mlp.up_proj, x)
