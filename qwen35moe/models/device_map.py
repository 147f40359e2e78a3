"""Which device holds which layer: whole layers in order, so that hidden states move from a device to the next one once.

The embedding is on the device of the first layer, the final norm on that of the last one, and so is the head unless it is
tied to the embedding. Each layer's cache is on the layer's device. The devices run one after the other in one process: for
models that do not fit one device, not for speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qwen35moe.compat import short

Devices = str | torch.device | Sequence[str | torch.device] | Mapping[str, str | int | torch.device]


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

    def by_module(self, model: nn.Module) -> dict[str, str | int]:
        """{name of a module: device}, as transformers' hf_device_map: of embedding, tower, layers, norm and head. A GPU is its
        number, any other device its name."""
        devices: dict[str, str | int] = {}
        for name, _ in model.named_parameters():
            words = name.split(".")
            if "visual" in words:
                words = words[: words.index("visual") + 1]
            else:
                words = words[: words.index("layers") + 2] if "layers" in words else words[:-1]
            device = self.of(name)
            devices[".".join(words)] = device.index if device.type == "cuda" and device.index is not None else str(device)
        return devices

    def __str__(self) -> str:
        parts = []
        for device in dict.fromkeys(self.layers):
            indices = [index for index, layer_device in enumerate(self.layers) if layer_device == device]
            parts.append(f"{device}: layers {indices[0]}-{indices[-1]}")
        return ", ".join(parts)


def chosen_devices(devices: Devices) -> list[torch.device]:
    """The devices of "auto" (every visible GPU, or the CPU if there is none), of one name, or of a list of names."""
    if isinstance(devices, str) and devices == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    names = list(devices) if isinstance(devices, list | tuple) else [devices]
    if isinstance(devices, Mapping):
        raise ValueError("a dict of devices names modules of a model: give it to from_pretrained or place")
    if not names:
        raise ValueError("device=[]: name at least one device")
    chosen = [_device(name) for name in names]
    current = torch.cuda.current_device() if any(d.type == "cuda" and d.index is None for d in chosen) else 0
    return [torch.device("cuda", current) if d.type == "cuda" and d.index is None else d for d in chosen]


def _device(name: object) -> torch.device:
    if name == "disk":
        raise ValueError('device "disk" is not supported: on "cpu", weights="map" reads weights as they are needed')
    try:
        return torch.device(name)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        raise ValueError(f'{short(name)} is no device: give "cpu", "cuda", "cuda:1", "auto" or a list of such names') from None


def plan_device_map(model: nn.Module, devices: Devices, itemsize: int | None = None) -> DeviceMap:
    """Distributes a model's layers over devices, in order and by bytes: in proportion to free memory where all are GPUs,
    evenly otherwise. ValueError when they do not fit.

    itemsize: bytes per parameter, for a model on the meta device that will be loaded in another dtype.
    """
    if isinstance(devices, Mapping):
        return _as_named(model, devices)
    chosen = chosen_devices(devices)
    sizes = _bytes_by_layer(model, itemsize)
    free = [_free(device) if device.type == "cuda" else None for device in chosen]
    known = [nbytes for nbytes in free if nbytes is not None]
    shares = known if len(known) == len(chosen) else [1] * len(chosen)
    layers = tuple(chosen[index] for index in _split(sizes, shares))
    needed = dict.fromkeys(chosen, 0)
    for device, size in zip(layers, sizes, strict=True):
        needed[device] += size
    for device, nbytes in zip(chosen, free, strict=True):
        if nbytes is not None and needed[device] > nbytes:
            raise ValueError(
                f"{device} would hold {needed[device] / 1e9:.1f} GB of weights and has {nbytes / 1e9:.1f} GB free; all weights "
                f"are {sum(sizes) / 1e9:.1f} GB: give more devices, or load fewer layers"
            )
    has_head = any("lm_head" in name for name, _ in model.named_parameters())  # a tied one is the embedding
    return DeviceMap(layers, layers[-1] if has_head else layers[0])


def _as_named(model: nn.Module, devices: Mapping[str, str | int | torch.device]) -> DeviceMap:
    """The map that {name of a module: device} describes, as transformers' device_map; "" names the whole model.

    ValueError where it leaves out a parameter, or does not keep whole layers together with what runs beside them.
    """
    names = {name: f"cuda:{device}" if isinstance(device, int) else device for name, device in devices.items()}
    named = {name: chosen_devices([device])[0] for name, device in names.items()}
    wanted: dict[str, torch.device] = {}
    for name, _ in model.named_parameters():
        prefixes = [prefix for prefix in named if not prefix or name == prefix or name.startswith(prefix + ".")]
        if not prefixes:
            raise ValueError(f'device_map names no device for {name}: add it, or "" for the rest')
        wanted[name] = named[max(prefixes, key=len)]
    unused = [prefix for prefix in named if prefix and not any((name + ".").startswith(prefix + ".") for name in wanted)]
    if unused and "lm_head" not in unused:  # a tied head is the embedding
        raise ValueError(f"device_map names {unused[0]!r}, and the model has no such module: names are those of its state_dict")
    by_layer: dict[int, torch.device] = {}
    for name, device in wanted.items():
        words = name.split(".")
        if "layers" in words and not {"mtp", "visual"} & set(words):
            by_layer.setdefault(int(words[words.index("layers") + 1]), device)
    layers = tuple(by_layer[index] for index in sorted(by_layer)) or tuple(wanted.values())[:1]
    heads = [device for name, device in wanted.items() if "lm_head" in name.split(".")]
    planned = DeviceMap(layers, heads[0] if heads else layers[0])
    for name, device in wanted.items():
        if planned.of(name) != device:
            raise ValueError(
                f"device_map puts {name} on {device}, which must be on {planned.of(name)}: a layer stays whole, embedding and "
                "vision tower are beside the first layer, and the final norm is beside the last"
            )
    return planned


def _free(device: torch.device) -> int:
    """Bytes available on a GPU: free for the system, or reserved by torch and not allocated."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def _bytes_by_layer(model: nn.Module, itemsize: int | None) -> list[int]:
    """Bytes of each layer; the embedding counts with the first one, norm and head with the last one."""
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
    """The index of each layer's device: the one in whose share of all bytes the middle of the layer falls."""
    total, whole, indices, device, before, bound = sum(sizes), sum(shares), [], 0, 0, shares[0]
    for size in sizes:
        while (before + size / 2) * whole > bound * total and device < len(shares) - 1:
            device += 1
            bound += shares[device]
        indices.append(device)
        before += size
    return indices
