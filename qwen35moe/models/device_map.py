"""Which device holds which layer: whole layers in order, so that hidden states cross from a device to the next one once.

The embedding lies with the first layer, the final norm with the last one, the head there too unless it is tied to the
embedding. Each layer's cache lies beside the layer. One process runs all of it, one device after the other: this is for
models that do not fit one device, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Devices = str | torch.device | Sequence[str | torch.device]


@dataclass(frozen=True)
class DeviceMap:
    """The device of every layer; `head` is the output head's."""

    layers: tuple[torch.device, ...]
    head: torch.device

    @property
    def first(self) -> torch.device:
        return self.layers[0]

    @property
    def last(self) -> torch.device:
        return self.layers[-1]

    def of(self, name: str) -> torch.device:
        """The device of a parameter, by its name in the state_dict ("model.layers.3.mlp...", "lm_head.weight", ...)."""
        words = name.split(".")
        if "visual" in words or "embed_tokens" in words:
            return self.first
        if "mtp" in words:
            return self.last
        if "layers" in words:
            return self.layers[int(words[words.index("layers") + 1])]
        return self.head if "lm_head" in words else self.last

    def __str__(self) -> str:
        parts = []
        for device in dict.fromkeys(self.layers):
            held = [index for index, where in enumerate(self.layers) if where == device]
            parts.append(f"{device}: layers {held[0]}-{held[-1]}")
        return ", ".join(parts)


def chosen_devices(devices: Devices) -> list[torch.device]:
    """"auto" is every visible GPU, or the CPU where there is none; a name alone is a list of one."""
    if isinstance(devices, str) and devices == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    names = [devices] if isinstance(devices, str | torch.device) else list(devices)
    if not names:
        raise ValueError("device=[]: name at least one device")
    found = [torch.device(name) for name in names]
    here = torch.cuda.current_device() if any(d.type == "cuda" and d.index is None for d in found) else 0
    return [torch.device("cuda", here) if d.type == "cuda" and d.index is None else d for d in found]


def plan_device_map(model: nn.Module, devices: Devices, itemsize: int | None = None) -> DeviceMap:
    """Lays a model's layers out over devices, in order and by bytes: in proportion to free memory where all are GPUs,
    evenly otherwise. ValueError when they do not fit.

    itemsize: bytes per parameter, for a model on the meta device that will be loaded in another dtype.
    """
    where = chosen_devices(devices)
    sizes = _bytes_by_layer(model, itemsize)
    free = [_free(device) if device.type == "cuda" else None for device in where]
    known = [room for room in free if room is not None]
    shares = known if len(known) == len(where) else [1] * len(where)
    layers = tuple(where[index] for index in _split(sizes, shares))
    held = {device: sum(size for size, at in zip(sizes, layers, strict=True) if at == device) for device in where}
    for device, room in zip(where, free, strict=True):
        if room is not None and held[device] > room:
            raise ValueError(
                f"{device} would hold {held[device] / 1e9:.1f} GB of weights and has {room / 1e9:.1f} GB free; all weights "
                f"are {sum(sizes) / 1e9:.1f} GB: give more devices, or load fewer layers"
            )
    tied = any("lm_head" in name for name, _ in model.named_parameters()) is False
    return DeviceMap(layers, layers[0] if tied else layers[-1])


def _free(device: torch.device) -> int:
    """Bytes of a GPU that can be had: what the system calls free, and what torch keeps for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _bytes_by_layer(model: nn.Module, itemsize: int | None) -> list[int]:
    """Bytes of each layer, those of the embedding added to the first and those of norm and head to the last."""
    sizes: dict[int, int] = {}
    before = after = 0
    for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        nbytes = parameter.numel() * (itemsize or parameter.itemsize)
        words = name.split(".")
        if "layers" in words and not {"mtp", "visual"} & set(words):
            layer = int(words[words.index("layers") + 1])
            sizes[layer] = sizes.get(layer, 0) + nbytes
        elif "embed_tokens" in words or "visual" in words:
            before += nbytes
        else:
            after += nbytes
    ordered = [sizes[layer] for layer in sorted(sizes)]
    ordered[0] += before
    ordered[-1] += after
    return ordered


def _split(sizes: Sequence[int], shares: Sequence[int]) -> list[int]:
    """The index of the device of each layer: that in whose share of all bytes the layer's middle falls."""
    total, whole, found, device, passed, bound = sum(sizes), sum(shares), [], 0, 0, shares[0]
    for size in sizes:
        while (passed + size / 2) * whole > bound * total and device < len(shares) - 1:
            device += 1
            bound += shares[device]
        found.append(device)
        passed += size
    return found


def moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor on that device; None stays None."""
    return None if value is None else value.to(device)
