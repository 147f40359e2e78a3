"""The machine of a measurement: processor, cores, versions, threads. No names of machines or people."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"  # a folder for each profile
PACKAGES = ("torch", "transformers", "triton", "safetensors", "flash-linear-attention", "causal-conv1d", "flash-attn",
            "zentorch")


def environment() -> dict[str, object]:
    """A flat mapping for the head of a report and of its JSON file."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["torch"] = str(torch.__version__)  # with its build (+cpu, +cu130), which the metadata of some wheels leaves out
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def header(facts: dict[str, object]) -> str:
    """The environment as one line of keys and values."""
    return " · ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _processor() -> str:
    """The model name that the kernel reports, and the instruction sets that decide bf16 speed."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    extras = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return " ".join([fields.get("model name", "unknown"), *extras])


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def profile_name(text: str) -> str:
    """An argument's name of a machine's kind: processor family and instruction set, never the name of a host."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9_]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no profile: lower-case words with hyphens, for example zen4-avx2")
    if text == platform.node().lower():
        raise argparse.ArgumentTypeError(f"{text!r} is the name of this host: name its processor, for example zen4-avx2")
    return text
