"""The vision tower at the 35B model's sizes, bf16 on a CPU, beside transformers': time in one process, and memory.

Two prompts: one image of 1024 x 1024 pixels (4096 patches of 16 x 16), and sixteen small images of mixed sizes. Both towers
have the same weights; their outputs for two small images are first compared with float32. Memory is the growth of the
resident set during one forward, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools.common import Report, arguments, fresh_process, limit_dtypes
from benchmarks.tools.memory import usage
from qwen35moe.config import Config, VisionConfig
from qwen35moe.modules.vision import Qwen3_5MoeVisionModel

GRIDS = {
    "1 image 1024x1024": [(1, 64, 64)],
    "16 small images": [
        (1, 16, 16), (1, 20, 24), (1, 14, 30), (1, 28, 18), (1, 24, 24), (1, 16, 32), (1, 22, 26), (1, 12, 40),
        (1, 30, 20), (1, 16, 16), (1, 18, 22), (1, 26, 26), (1, 32, 14), (1, 24, 20), (1, 16, 24), (1, 20, 20),
    ],
}  # fmt: skip
CHECKED = [(1, 12, 20), (1, 16, 8)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--depth", type=int, help="blocks, for a quick look (the published tower has 27)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--prompt", choices=list(GRIDS), help="only this prompt")
    parser.add_argument("--only", choices=["time", "memory"], help="only this measurement")
    parser.add_argument("--growth-of", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    config = _config(options.depth)
    if options.growth_of:
        print(json.dumps(growth(towers(config, [options.growth_of])[options.growth_of], GRIDS[options.prompt])))
        return 0
    names = [options.prompt] if options.prompt else list(GRIDS)
    report, memory = Report("vision", rounds=options.rounds, dtypes=limit_dtypes(options, torch.bfloat16)), {}
    report.extra["memory_growth_mib"] = memory
    if options.only != "memory":
        measure_time(report, config, names, options.warmup)
    for name in names if options.only != "time" else ():
        memory[name] = {library: growth_in_a_process(library, name) for library in ("transformers", "ours")}
        print(f"{name}: memory grows by {', '.join(f'{mib:.0f} MiB ({who})' for who, mib in memory[name].items())}", flush=True)
    return report.finish(options)


def measure_time(report: Report, config: VisionConfig, names: Sequence[str], warmup: int) -> None:
    """A case for each prompt; both towers in this process, in turns."""
    implementations = towers(config, ["transformers", "ours"])
    answers = checked(implementations, config)
    for name in names:
        with report.case(f"tower/depth{config.depth}/{name}/bf16") as case:
            for library, (answer, truth) in answers.items():
                case.check(library, answer, truth, bound=0.1)
            pixels, grid = prompt(GRIDS[name], config)
            case.limits, case.needed["flops"] = report.limits_of("bf16"), linear_flops(implementations["ours"], len(pixels))
            runs = {library: _run(tower, pixels, grid) for library, tower in implementations.items()}
            case.time(runs, baseline="transformers", warmup=warmup)


def linear_flops(tower: Any, patches: int) -> float:
    """Operations of the linear maps: every patch through the blocks, a quarter of them through the merger of 2 x 2."""
    maps = {name: module.weight.numel() for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)}
    return float(sum(2 * count * patches // (4 if name.startswith("merger") else 1) for name, count in maps.items()))


def _config(depth: int | None) -> VisionConfig:
    config = Config.preset("35b-a3b").vision_config
    assert config is not None
    return config.replace(depth=depth) if depth else config


def towers(config: VisionConfig, names: Sequence[str]) -> dict[str, Any]:
    """bf16 towers with the same weights: matrices of gain 0.5, so that activations stay bounded over 27 blocks."""
    ours = Qwen3_5MoeVisionModel(config).bfloat16().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02, generator=generator)
    return {name: ours if name == "ours" else _theirs(config, ours) for name in names}


def _theirs(config: VisionConfig, ours: Qwen3_5MoeVisionModel) -> Any:
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    with torch.device("meta"):
        theirs = modeling.Qwen3_5MoeVisionModel._from_config(Qwen3_5MoeVisionConfig(**fields), attn_implementation="sdpa")
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.rotary_pos_emb = modeling.Qwen3_5MoeVisionRotaryEmbedding(theirs.config)  # its buffer is not in the state dict
    return theirs.eval()


def prompt(grids: Sequence[tuple[int, int, int]], config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Random pixels in bf16 and the grid tensor."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, width, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.tensor(grids)


def _run(tower: Any, pixels: Tensor, grid: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return tower(pixels, grid)

    return run


def _tokens(output: Any) -> Tensor:
    tokens = output.pooler_output
    return tokens if isinstance(tokens, Tensor) else torch.cat(tokens)


def checked(implementations: dict[str, Any], config: VisionConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """By implementation: the tokens of two small images, and those of the float32 tower."""
    pixels, grid = prompt(CHECKED, config)
    wide = Qwen3_5MoeVisionModel(config).eval()
    wide.load_state_dict(implementations["ours"].state_dict())
    truth = _tokens(_run(wide, pixels.float(), grid)())
    return {name: (_tokens(_run(tower, pixels, grid)()), truth) for name, tower in implementations.items()}


def growth(tower: Any, grids: Sequence[tuple[int, int, int]]) -> float:
    """MiB by which the peak of the resident set grows during one forward (Linux; nan elsewhere)."""
    pixels, grid = prompt(grids, tower.config)
    _run(tower, *prompt(CHECKED, tower.config))()  # the first call loads libraries
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return float("nan")
    before = usage()["VmRSS"]
    _run(tower, pixels, grid)()
    return (usage()["VmHWM"] - before) / 2**20


def growth_in_a_process(library: str, name: str) -> float:
    """`growth` of one block of a tower, in a fresh process."""
    return fresh_process("-m", "benchmarks", "vision", "--depth", "1", "--prompt", name, "--growth-of", library)
