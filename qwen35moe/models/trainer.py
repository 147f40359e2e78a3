"""Whole checkpoints from transformers' Trainer.

Trainer saves a model that is not transformers' own as a bare file of weights: without config.json, so that it cannot be loaded
again, and not at all if its head is tied, which the file format refuses. There is no argument for another way to save. So its
`_save` gets a wrapper that calls `model.save_pretrained` for our models and itself for all others. The wrapper is installed
when a Trainer gets one of our models; without that, and without transformers, nothing is changed.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
from torch import nn

from qwen35moe.modules.unfused import UnfusedExperts


def save_whole_checkpoints(ours: type[nn.Module]) -> None:
    """Makes transformers' Trainer, if it has been imported, save models of the class `ours` by their save_pretrained."""
    module = sys.modules.get("transformers.trainer")
    trainer: Any = getattr(module, "Trainer", None)
    if trainer is None or hasattr(trainer._save, "saves_whole_checkpoints"):
        return
    original = trainer._save

    @functools.wraps(original)
    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, ours):
            original(self, output_dir, state_dict)
        elif self.args.should_save:
            _save_ours(self, model, self.args.output_dir if output_dir is None else output_dir, state_dict)

    _save.saves_whole_checkpoints = True  # type: ignore[attr-defined]
    trainer._save = _save


def _save_ours(trainer: Any, model: Any, folder: str, state_dict: dict[str, Any] | None) -> None:
    """Saves checkpoint, tokenizer or processor, and Trainer's arguments. state_dict: the gathered weights of a sharded model.

    Resuming reads the weights by the names in the state_dict, so that unfused experts are stored one by one.
    """
    os.makedirs(folder, exist_ok=True)
    unfused = any(isinstance(module, UnfusedExperts) for module in model.modules())
    model.save_pretrained(folder, layout="per_expert" if unfused else "grouped", state_dict=state_dict)
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.save(trainer.args, os.path.join(folder, "training_args.bin"))
