"""`qwen35moe adapter check | convert`: where the tensors of a LoRA adapter belong, and experts in the other form."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

HELP = "Check where the tensors of a LoRA adapter belong, or convert its experts between grouped and per expert."

_FORMS = {
    "linear": "a matrix",
    "grouped": "grouped experts, named by target_parameters",
    "swapped": "grouped experts with swapped axes, of an older peft: convert it",
    "expert": "single experts: after model.unfuse_experts(), or convert it",
    "whole": "in place of the model's weight",
    "tokens": "rows of the embedding",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the two commands."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="adapter_command")
    check = commands.add_parser("check", help="say for every tensor where it belongs; exit status 1 if one belongs nowhere")
    convert = commands.add_parser("convert", help="write the adapter with its experts in the other form")
    for command in (check, convert):
        command.add_argument("adapter", help="a folder with adapter_config.json and adapter_model.safetensors")
        command.add_argument("--base", help="the model: a folder, a Hub name or a preset (default: that of the adapter)")
    check.add_argument("--all", action="store_true", help="one line per tensor instead of one per kind")
    convert.add_argument("target", help="the folder to write")
    convert.add_argument("--to", required=True, choices=("grouped", "per_expert"), help="the form of the experts")
    orders = {"choices": ("rank", "expert"), "default": "rank"}
    convert.add_argument("--order", **orders, help="what varies fastest in grouped lora_B as read: rank (peft), or expert")
    convert.add_argument("--write-order", **orders, help="the same of what is written (default: rank)")


def run(options: argparse.Namespace) -> int | None:
    """Run one of the commands; 1 if a tensor of the adapter belongs nowhere."""
    from ..checkpoint.adapters import check_adapter, read_adapter
    from ..checkpoint.problems import Problem, fold

    adapter = read_adapter(options.adapter)
    config = _config(options.base or adapter.config.get("base_model_name_or_path"))
    if options.adapter_command == "convert":
        from ..checkpoint.adapter_forms import convert_adapter

        convert_adapter(
            options.adapter, options.target, config, form=options.to, order=options.order, write_order=options.write_order
        )
        print(f"{options.target}: {len(read_adapter(options.target).tensors)} tensors, experts {options.to.replace('_', ' ')}")
        return None
    checked = check_adapter(adapter, config)
    rows = []
    for landing in checked.landings:
        rank = f", rank {landing.rank}" if landing.rank else ""
        target = landing.target if options.all else re.sub(r"(?<=\.)\d+(?=\.)", "N", landing.target)
        rows.append(Problem(landing.form, landing.tensor.name, f"-> {target} ({_FORMS[landing.form]}{rank})"))
    lines = [f"{row.kind}: {row.subject} {row.detail}" for row in rows] if options.all else fold(rows)
    print("\n".join([*lines, *fold(checked.problems)]))
    counts = Counter(landing.form for landing in checked.landings)
    print(f"{len(adapter.tensors)} tensors: " + ", ".join(f"{number} {form}" for form, number in sorted(counts.items())))
    if counts["grouped"] + counts["swapped"]:
        print("Grouped lora_B is read in peft's order, column = rank * E + expert. No shape tells it from the other order.")
    if checked.problems:
        print(f"{len({problem.subject for problem in checked.problems})} tensors belong nowhere")
        return 1
    return None


def _config(base: object) -> Any:
    """The configuration of the model that an adapter is for."""
    from ..config import Config
    from ..loading import find

    if not isinstance(base, str) or not base:
        raise ValueError("adapter_config.json names no base model: give --base with a folder, a Hub name or a preset")
    if base.lower() in Config.presets():
        return Config.preset(base)
    if (Path(base) / "config.json").is_file():
        return Config.from_pretrained(base)
    return Config.from_pretrained(find(base))
