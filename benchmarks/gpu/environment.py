"""The machine: GPU, driver, versions, optional packages, measured limits; and building causal-conv1d."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import FAILED, MEASURED, NOT_RUN, RIGHT, Rows
from benchmarks.gpu.work import Work
from benchmarks.tools import limits, machine

PTXAS = "/usr/local/cuda/bin/ptxas"  # of the CUDA toolkit, where Triton's own is doubted
OPTIONAL = ("triton", "transformers", "fla", "causal_conv1d", "flash_attn", "sonicmoe", "pytest", "xdist", "hypothesis")
GPU_ONLY = (
    "of a GPU only: compiled kernels, times and profiles of a stream, counted synchronisations, recorded steps, peak memory, "
    "targets, fla, causal-conv1d, flash-attn, tests marked gpu, compute-sanitizer"
)
TOOLS = ("nvcc", "compute-sanitizer", "nvidia-smi")


def run(rows: Rows, work: Work) -> None:
    rows.measure("environment/machine", lambda: {"verdict": MEASURED, "measured": facts(work)["gpu"], **facts(work)})
    rows.measure("environment/limits", lambda: measured_limits(work))
    if work.small:
        rows.write("environment/gpu_only", NOT_RUN, note=GPU_ONLY)


def facts(work: Work) -> dict[str, Any]:
    """GPU, driver, versions."""
    about = machine.environment()
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    missing += [name for name in TOOLS if shutil.which(name) is None]
    about |= {"ptxas": bundled_ptxas(), "ptxas_of_cuda": version_of(PTXAS)}
    gpu = f"CPU ({about['processor']}), small form"
    if not work.small:
        properties = torch.cuda.get_device_properties(0)
        gpu = torch.cuda.get_device_name()
        about |= {"driver": driver(), "capability": list(torch.cuda.get_device_capability()),
                  "memory_gb": round(properties.total_memory / 1e9, 1)}  # fmt: skip
    shown = ("torch", "triton", "transformers", "driver", "ptxas")
    versions = ", ".join(f"{key} {about[key]}" for key in shown if about.get(key))
    note = f"{versions}; missing: {', '.join(missing) or 'nothing'}"
    return {"gpu": gpu, "note": note, "machine": about, "missing": missing}


def driver() -> str | None:
    text = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def bundled_ptxas() -> str | None:
    """Version of the ptxas that Triton runs."""
    if importlib.util.find_spec("triton") is None:
        return None
    if path := os.environ.get("TRITON_PTXAS_PATH"):
        return version_of(path)
    folder = Path(importlib.util.find_spec("triton").origin or "").parent  # pyright: ignore[reportOptionalMemberAccess]
    return next((version_of(str(path)) for path in sorted(folder.glob("backends/nvidia/bin/ptxas"))), None)


def version_of(ptxas: str) -> str | None:
    text = said(ptxas, "--version")
    return text.split("release ")[-1].split(",")[0] if text and "release " in text else None


def said(*command: str) -> str | None:
    """What a command prints, None if it is absent, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def measured_limits(work: Work) -> dict[str, Any]:
    """Read bandwidth and the rate of a bfloat16 product."""
    if work.small:
        limits._COPY, limits._WIDTH, limits._WAIT = 1 << 22, {"cpu": 256}, 0.0
    row = limits.measured(work.device, torch.bfloat16)
    note = f"bf16 products {row['product_tflops']:.4g} TFLOP/s ({row['product_form']}); copy {row['copy_gbps']:.0f} GB/s"
    return {"verdict": MEASURED, "measured": row["read_gbps"], "unit": "GB/s read", "note": note, "limits": row}


def build(rows: Rows, work: Work) -> None:
    """Build causal-conv1d from its sdist into OUT/site, for this GPU only."""
    rows.measure("wheels/causal_conv1d", lambda: built(work))


def built(work: Work) -> dict[str, Any]:
    if importlib.util.find_spec("causal_conv1d"):
        return {"verdict": NOT_RUN, "note": "it is installed"}
    sdists = sorted(Path(work.wheels).glob("causal[_-]conv1d*.tar.gz")) if work.wheels else []
    if not sdists or work.small or shutil.which("nvcc") is None:
        reason = "there is no GPU" if work.small else "--wheels has no sdist of it" if not sdists else "nvcc is not installed"
        return {"verdict": NOT_RUN, "note": reason}
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target",
               str(work.out / "site"), str(sdists[-1])]  # fmt: skip
    code = subprocess.run(command, env=environment, check=False).returncode
    return {"verdict": FAILED if code else RIGHT, "note": f"pip ended with {code}" if code else f"built {sdists[-1].name}"}
