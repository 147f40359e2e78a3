"""What real launches compile to on each architecture, without one: registers, spills and shared memory have budgets.

The launch code runs on fake CUDA tensors at the sizes of Qwen3.5-35B-A3B (tests/support/launches.py), with the blocks, warps
and stages that it chooses for the device. `python -m tests.triton.test_launches sm_80` prints a target's table.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import pytest
import torch

from qwen35moe_kernels.delta_rule import shared_memory
from tests.support.compile_triton import ROOT
from tests.support.launches import TARGETS, Built, Request, reports

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton's wheel brings ptxas for Linux only", allow_module_level=True)

DELTA = ("prepare", "recur", "outputs", "attend_back", "recur_back", "queries_back", "keys_back")
PRODUCTS = tuple(f"experts_kernels.{name}_kernel" for name in ("up", "product", "act_gradient", "weight_gradient"))


class Budget(NamedTuple):
    """Bytes that a thread may spill, by kernel, zero for the others. Rounded up: they differ between versions of ptxas."""

    delta: dict[str, int]
    experts: dict[str, int] = {}


BUDGETS = {
    "sm_90": Budget({"prepare": 64, "queries_back": 200, "keys_back": 640}),
    "sm_80": Budget({"prepare": 64, "attend_back": 64, "recur_back": 64, "queries_back": 1700, "keys_back": 1700}, {"up": 160}),
    "sm_89": Budget({"prepare": 64, "recur_back": 128, "queries_back": 1700, "keys_back": 1700}, {"weight_gradient": 64}),
    "sm_120": Budget({"prepare": 64, "recur_back": 128, "queries_back": 1700, "keys_back": 1700}, {"up": 128}),
    "gfx942": Budget({"queries_back": 512, "keys_back": 512}),
}


def requests(target: str, *only: str) -> list[Request]:
    """The kernels whose use of a GPU differs most: the delta rule, and the experts' products with full tiles."""
    delta = tuple(f"delta_rule_{'backward' if name.endswith('back') else 'forward'}.{name}" for name in only)
    return [Request(target, "delta_rule", only=delta), Request(target, "experts", (4096,), only=PRODUCTS)]


def check(target: str, results: list[list[Built]]) -> None:
    delta, *experts = results
    budget = BUDGETS[target]
    assert max(built.shared for built in delta) <= shared_memory(128, torch.bfloat16, target == "sm_90", True)
    assert [built.kernel.split(".")[1] for built in delta] == list(DELTA)
    for group, prefix, limits in ((delta, "", budget.delta), (sum(experts, []), "_kernel", budget.experts)):
        for built in group:
            name = built.kernel.split(".")[1].removesuffix(prefix)
            assert built.local <= limits.get(name, 0), built
            assert built.shared <= TARGETS[target][1], built
            assert built.waits, built
    assert sum(built.registers > 0 for group in results for built in group) >= 9


def test_hopper() -> None:
    """Also that the products of a Hopper GPU with operands in registers are waited for at once: ptxas before 13.3 reuses the
    registers of such a product in flight (Triton pull request 11781)."""
    check("sm_90", reports(requests("sm_90", *DELTA[1:])))


@pytest.mark.slow
def test_other_architectures() -> None:
    """sm_89 has the instructions of sm_80 and less shared memory, which the tiles with 16 rows need most of."""
    heavy = ("outputs", "attend_back", "recur_back", "queries_back", "keys_back")
    few = Request("sm_89", "experts", (300,), only=PRODUCTS[:2])
    wanted = [*requests("sm_80", *heavy), *requests("sm_89", "recur_back"), few, *requests("sm_120", *heavy[2:])]
    *results, (prepare, *_) = reports([*wanted, Request("sm_90", "delta_rule", only=("delta_rule_forward.prepare",))])
    assert prepare.registers and prepare.local <= BUDGETS["sm_90"].delta["prepare"]
    for target, part in (("sm_80", results[:2]), ("sm_89", results[2:5]), ("sm_120", results[5:])):
        check(target, part)


@pytest.mark.slow
def test_amd() -> None:
    others = [Request("gfx942", "convolution"), Request("gfx942", "decoder"), Request("gfx942", "step", (1,))]
    others.append(Request("gfx942", "fused"))
    heavy = requests("gfx942", "recur_back", "queries_back", "keys_back")
    *results, convolution, decoder, step, fused = reports([*heavy, *others])
    check("gfx942", results)
    assert all(built.shared <= TARGETS["gfx942"][1] and not built.local for built in (*convolution, *decoder, *step, *fused))


def kernels() -> set[str]:
    """The names of all kernels that are launched, from the sources."""
    folder = ROOT / "kernels" / "qwen35moe_kernels"
    pattern = re.compile(r"^@triton\.jit.*\ndef ([a-z]\w*)\(", re.MULTILINE)
    files = (*folder.glob("*_kernels.py"), folder / "delta_rule_forward.py", folder / "delta_rule_backward.py")
    return {f"{file.stem}.{name}" for file in files for name in pattern.findall(file.read_text())}


LENGTHS = (2, 7, 16, 63, 64, 1000, 1024, 4096)
# Compilations of a kernel over all lengths: one for a single row, one for more; blocks of rows are rounded up to powers of two.
VARIANTS = {
    "convolution_kernels": 2, "decode_attention_kernels": 6, "norm_kernels": 10, "gated_norm_kernels": 7, "router_kernels": 4
}  # fmt: skip


def test_lengths_share_compilations() -> None:
    cases = [Request("sm_90", "delta_rule", (tokens, 2, packed), build=False) for packed in (False, True) for tokens in LENGTHS]
    cases += [Request("sm_90", "delta_rule", (tokens, 1), build=False) for tokens in (1, *LENGTHS)]
    cases += [Request("sm_90", "convolution", (tokens,), build=False) for tokens in (1, *LENGTHS)]
    cases += [Request("sm_90", "decoder", (tokens,), build=False) for tokens in (1, *LENGTHS)]
    cases += [Request("sm_90", "fused", (tokens,), build=False) for tokens in (1, 2, 3, 4, 16, 63, 1000)]
    cases += [Request("sm_90", "experts", (tokens,), build=False) for tokens in (300, 311, 496, 512)]
    cases += [Request("sm_90", "experts", (2, False), build=False), Request("sm_90", "step", (1,), build=False)]
    cases += [Request("sm_90", "attention", (tokens,), build=False) for tokens in LENGTHS]
    results = reports(cases, each_once=True)
    counts: dict[str, int] = {}
    for built in sum(results, []):
        counts[built.kernel] = counts.get(built.kernel, 0) + 1
    assert set(counts) == kernels()
    for kernel, count in counts.items():
        module, name = kernel.split(".")
        flags = {"delta_rule_forward": 2, "delta_rule_backward": 2, "convolution_kernels": 3}.get(module, 1)  # packed, lengths
        calls = 2 if name in ("product_kernel", "combine_kernel", "weight_gradient_kernel") else 1
        assert count <= flags * calls * VARIANTS.get(module, 1), (kernel, count)


def table(target: str) -> str:
    rows = sum(reports([*requests(target), Request(target, "experts", (1500,)), Request(target, "experts", (2, False))]), [])
    lines = [f"{'kernel':42}{'warps':>6}{'stages':>7}{'registers':>10}{'spilled':>8}{'shared KiB':>11}"]
    for row in rows:
        if row.registers:
            numbers = f"{row.warps:6}{row.stages:7}{row.registers:10}{row.local:8}{row.shared / 1024:11.1f}"
            lines.append(f"{row.kernel:42}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
