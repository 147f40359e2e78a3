"""Checkpoints with complete headers and without weights (sparse files)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen35moe.checkpoint.headers import INDEX
from qwen35moe.config import Config
from qwen35moe.config.parameters import TensorShape


def write_headers(path: Path, config: Config, tensors: Iterable[TensorShape], shards: int = 1) -> None:
    """Write config.json, every header and, for several shards, the index."""
    path.mkdir(parents=True, exist_ok=True)
    tensors, weight_map = list(tensors), {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors[number::shards]:
            end = offset + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
            weight_map[tensor.name] = name
        text = json.dumps(header).encode()
        with (path / name).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + offset)
    if shards > 1:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
