"""`qwen35moe inspect`: what a checkpoint holds, part by part, from its headers alone; no weight is read."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# canonical names: the text model's parts by the first word that fits, in the order in which they are shown
_TEXT_PARTS = (
    (".linear_attn.", "Gated DeltaNet"),
    (".self_attn.", "attention"),
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_expert", "shared expert, router"),
    (".mlp.gate.", "shared expert, router"),
    (".mlp.", "MLP"),
    ("embed_tokens.", "embedding"),
    ("norm", "norms"),
)
_OTHER_PARTS = {"head": "output head", "visual": "vision tower", "mtp": "multi-token prediction"}
_ORDER = ("embedding", *dict.fromkeys(name for _, name in _TEXT_PARTS if name != "embedding"), *_OTHER_PARTS.values())
_NO_PARAMETERS = ("_scale_inv", "_scale", "rotary_emb.inv_freq")  # stored beside the weights, not parameters


@dataclass
class Part:
    """What is stored of one part of the model. dtypes: parameters by stored dtype; experts: how they lie on disk."""

    name: str
    tensors: int = 0
    parameters: int = 0
    routed: int = 0  # of the parameters, those of routed experts
    nbytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    layouts: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Any, layout: str | None) -> None:
        self.tensors += 1
        self.nbytes += tensor.nbytes
        if name.endswith(_NO_PARAMETERS):
            return
        self.parameters += tensor.numel
        self.dtypes[tensor.dtype] += tensor.numel
        if layout is not None:
            self.routed += tensor.numel
            self.layouts.add(layout)

    def active(self, chosen: int, experts: int) -> int:
        """Parameters that one token uses: `chosen` of the `experts` routed experts and everything else."""
        return self.parameters - self.routed + (self.routed * chosen // experts if experts else 0)


def survey(folder: str) -> dict[str, Any]:
    """The facts that `inspect --json` prints."""
    from ..checkpoint.folder import config_file
    from ..checkpoint.headers import read_headers
    from ..config import Config
    from ..loading import find

    header = read_headers(find(folder))
    config = Config.from_pretrained(config_file(header))
    text = config.text_config
    found, unknown = _parts(header.tensors.values())
    parts = [_described(part, text.num_experts_per_tok, text.num_experts) for part in found]
    stored = {part["name"] for part in parts}
    described = config.num_parameters(vision=_OTHER_PARTS["visual"] in stored, mtp=_OTHER_PARTS["mtp"] in stored, lm_head=True)
    in_text = [part for part in parts if part["name"] not in (_OTHER_PARTS["visual"], _OTHER_PARTS["mtp"])]
    return {
        "folder": str(header.folder),
        "model_type": config.model_type,
        "architectures": config.architectures,
        "layers": dict(Counter(text.layer_types)),
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.num_experts_per_tok if text.num_experts else 0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization": (config.quantization_config or {}).get("quant_method"),
        "files": len(header.files),
        "bytes": header.nbytes,
        "parameters": sum(part["parameters"] for part in parts),
        "active_parameters": sum(part["active_parameters"] for part in parts),
        "active_text_parameters": sum(part["active_parameters"] for part in in_text),
        "described_parameters": described,
        "parts": parts,
        "unknown_tensors": unknown,
    }


def _parts(tensors: Any) -> tuple[list[Part], list[str]]:
    """The parts that are there, in the order of the model, and the names that belong to none."""
    from ..checkpoint import names

    parts: dict[str, Part] = {}
    unknown: list[str] = []
    for tensor in tensors:
        name = names.canonical(tensor.name)
        if name is None:
            unknown.append(tensor.name)
            continue
        which = names.part_of(name)
        title = _OTHER_PARTS.get(which) or next((title for word, title in _TEXT_PARTS if word in name), None)
        if title is None:
            unknown.append(tensor.name)
            continue
        layout = None
        if ".mlp.experts." in name:
            layout = "grouped" if names.grouped_experts(name) else "per expert"
        parts.setdefault(title, Part(title)).add(name, tensor, layout)
    return [parts[title] for title in _ORDER if title in parts], unknown


def _described(part: Part, chosen: int, experts: int) -> dict[str, Any]:
    return {
        "name": part.name,
        "tensors": part.tensors,
        "parameters": part.parameters,
        "active_parameters": part.active(chosen, experts),
        "bytes": part.nbytes,
        "dtypes": dict(part.dtypes.most_common()),
        "experts": " and ".join(sorted(part.layouts)) or None,
    }


def run(options: argparse.Namespace) -> None:
    """Print the survey, as a page or as JSON."""
    facts = survey(options.folder)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def report(facts: dict[str, Any]) -> str:
    """The facts as a page of text."""
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["layers"].items())
    lines = [
        f"{facts['folder']}: {facts['model_type']} ({', '.join(facts['architectures'])})",
        f"layers: {layers}; width {facts['hidden_size']}; vocabulary {facts['vocab_size']}"
        + (f"; {facts['num_experts']} experts, {facts['num_experts_per_tok']} per token" if facts["num_experts"] else "")
        + ("; embedding and head tied" if facts["tie_word_embeddings"] else ""),
        f"files: {facts['files']}, {size(facts['bytes'])}"
        + (f"; quantised: {facts['quantization']}" if facts["quantization"] else ""),
        "",
    ]
    rows = [("part", "tensors", "parameters", "active", "size", "dtypes", "experts")]
    rows += [
        (
            part["name"],
            str(part["tensors"]),
            f"{part['parameters']:,}",
            f"{part['active_parameters']:,}",
            size(part["bytes"]),
            " ".join(part["dtypes"]),
            part["experts"] or "",
        )
        for part in facts["parts"]
    ]
    total = (f"{facts['parameters']:,}", f"{facts['active_parameters']:,}", size(facts["bytes"]), "", "")
    rows.append(("total", str(sum(part["tensors"] for part in facts["parts"])), *total))
    lines += _table(rows)
    lines += ["", f"one token uses {facts['active_text_parameters']:,} parameters of the text model and its head"]
    difference = facts["parameters"] - facts["described_parameters"]
    if difference:
        lines.append(
            f"config.json describes {facts['described_parameters']:,} parameters for these parts: "
            f"{abs(difference):,} {'more' if difference > 0 else 'fewer'} are stored"
        )
    else:
        lines.append("the number of parameters is the one that config.json describes")
    if facts["unknown_tensors"]:
        unknown = facts["unknown_tensors"]
        lines.append(f"{len(unknown)} tensors belong to no part of this architecture: {', '.join(unknown[:3])} ...")
    return "\n".join(lines)


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves at least one before the point; powers of 1000, as disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they need to be; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < column < 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
