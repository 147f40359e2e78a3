"""transformers' multimodal models in tiny, unusual shapes, ours with the same weights, and prompts with images and videos.

`odd_visual(seed)` draws a model (its text part is that of `peer.odd_shape`) and a batch: images and videos with different
numbers of frames, rows and columns, several per row or none, padding left, right or none. For `theirs`, `ours` and `draw` see
`peer`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import peer

IMAGE, VIDEO, START, END, TEXT_TOKENS = 48, 49, 50, 51, 48  # token ids; text tokens are 0 ... TEXT_TOKENS - 1
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One tiny multimodal configuration (a config.json) and the rows of its batch."""

    seed: int
    config: dict[str, Any] = field(hash=False)
    rows: tuple[tuple[Any, ...], ...] = ()  # a row: numbers of text tokens, ("image", grid) and ("video", grid)
    side: str = "none"

    @property
    def dense(self) -> bool:
        return self.config["model_type"] == "qwen3_5"

    @property
    def vision(self) -> dict[str, Any]:
        return self.config["vision_config"]

    def __repr__(self) -> str:
        return f"seed{self.seed}"

    def grids(self, kind: str) -> list[Grid]:
        return [item[1] for row in self.rows for item in row if isinstance(item, tuple) and item[0] == kind]

    def pixels(self, grids: list[Grid]) -> Tensor:
        v, rng = self.vision, peer.generator(7 * self.seed + len(grids))
        width = v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2
        return torch.randn(sum(t * h * w for t, h, w in grids), width, generator=rng)

    def row_ids(self, row: tuple[Any, ...], rng: torch.Generator) -> Tensor:
        """Placeholders as processors return them: one span per image, and per frame of a video, after its timestamp."""
        square, ids = self.vision["spatial_merge_size"] ** 2, []

        def text(count: int) -> list[int]:
            return torch.randint(0, TEXT_TOKENS, (count,), generator=rng).tolist()

        for item in row:
            if isinstance(item, int):
                ids += text(item)
            else:
                kind, (t, h, w) = item
                span = [START, *[IMAGE if kind == "image" else VIDEO] * (h * w // square), END]
                ids += span if kind == "image" else [token for _ in range(t) for token in (*text(2), *span)]
        return torch.tensor(ids)

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model, as a processor returns them for the batch."""
        rng = peer.generator(11 * self.seed + 1)
        rows = [self.row_ids(row, rng) for row in self.rows]
        ids, mask = peer.padded(rows, self.side, pad=3)
        types = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
        arguments = {"input_ids": ids, "mm_token_type_ids": types}
        if self.side != "none":
            arguments["attention_mask"] = mask
        for kind, pixels, name in (("image", "pixel_values", "image_grid_thw"),
                                   ("video", "pixel_values_videos", "video_grid_thw")):
            if grids := self.grids(kind):
                arguments |= {pixels: self.pixels(grids), name: torch.tensor(grids)}
        return arguments


def odd_vision(rng: random.Random, hidden: int, merge: int | None = None) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3])
    head_dim = rng.choice([8, 12, 20])
    return {
        "depth": rng.randint(1, 3),
        "hidden_size": heads * head_dim,
        "num_heads": heads,
        "intermediate_size": rng.choice([29, 35, 41]),
        "patch_size": rng.choice([2, 3, 4]),
        "temporal_patch_size": rng.choice([1, 2, 2, 3]),
        "in_channels": rng.choice([1, 3, 3]),
        "spatial_merge_size": merge or rng.choice([1, 2, 2, 2, 3]),
        "num_position_embeddings": rng.choice([9, 16, 49, 64]),
        "out_hidden_size": hidden,
    }


def odd_visual(seed: int, *, dense: bool = False, rows: int | None = None, side: str | None = None, **vision: Any) -> Case:
    """A random case. Rows and columns of a grid differ, videos have 2 or 3 frames, some rows are text only."""
    rng = random.Random(seed)
    text = peer.odd_shape(seed, dense=dense).text | {"tie_word_embeddings": False}
    tower = odd_vision(rng, text["hidden_size"]) | vision
    merge = tower["spatial_merge_size"]

    def grid(frames: int) -> Grid:
        h, w = rng.sample(range(1, 5), 2)
        return frames, h * merge, w * merge

    def row(kinds: list[str]) -> tuple[Any, ...]:
        parts: list[Any] = [rng.randint(1, 4)]
        for kind in kinds:
            parts += [(kind, grid(1 if kind == "image" else rng.randint(2, 3))), rng.randint(1, 3)]
        return tuple(parts)

    count = rows or rng.randint(1, 3)
    kinds = [rng.choice([["image"], ["image"] * 2, ["video"], ["image", "video"], ["video", "image", "image"], []])
             for _ in range(count)]
    if not any(kinds):
        kinds[-1] = ["image", "video"]
    drawn_rows = tuple(row(items) for items in kinds)
    config = {
        "model_type": "qwen3_5" if dense else "qwen3_5_moe", "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END, "tie_word_embeddings": rng.random() < 0.3,
        "text_config": text, "vision_config": tower,
    }
    return Case(seed, config, drawn_rows, (side or rng.choice(["left", "right"])) if count > 1 else "none")


def theirs(case: Case) -> Any:
    """transformers' model of a case in float32 and eval mode, with eager attention and experts and weights from `draw`."""
    import transformers

    transformers.logging.set_verbosity_error()
    config_class = transformers.Qwen3_5Config if case.dense else transformers.Qwen3_5MoeConfig
    model_class = (transformers.Qwen3_5ForConditionalGeneration if case.dense
                   else transformers.Qwen3_5MoeForConditionalGeneration)
    text = {key: dict(value) if isinstance(value, dict) else value for key, value in case.config["text_config"].items()}
    config = config_class(**case.config | {"text_config": text, "vision_config": dict(case.vision)})
    experts = {} if case.dense else {"experts_implementation": "eager"}
    model = model_class._from_config(config, attn_implementation="eager", **experts).eval()
    model.generation_config.pad_token_id = 3
    draw(model, case.seed)
    return model


def ours(case: Case, source: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """Our model of a case in eval mode, with the weights of `source`."""
    from qwen35moe import Config, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

    text = {key: dict(value) if isinstance(value, dict) else value for key, value in case.config["text_config"].items()}
    config = Config.from_dict(case.config | {"text_config": text})
    model = (Qwen3_5ForConditionalGeneration if case.dense else Qwen3_5MoeForConditionalGeneration)(config).eval()
    peer.adopt(model, source)
    return model.to(dtype)


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """`peer.draw`, with norms around one in the vision tower, and patches and positions of size one."""
    peer.draw(model, seed)
    rng = peer.generator(seed + 5)
    for name, parameter in model.named_parameters():
        if "visual." not in name:
            continue
        noise = torch.randn(parameter.shape, generator=rng)
        if "norm" in name:
            parameter.copy_(0.2 * noise + (1 if name.endswith("weight") else 0))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "pos_embed" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
