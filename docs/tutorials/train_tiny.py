"""Train the bundled checkpoint, or one of your own, on a CPU: it continues a text and reads handwritten digits in images.

    python docs/tutorials/train_tiny.py --text kjv.txt --out my_tiny [--minutes 60 | --steps 2000]

Form feeds in the file separate its documents; a file without form feeds is one document. The last 5 % are held out. The
images are drawn from scikit-learn's handwritten digits, the last fifth of which is held out. The output is a checkpoint
folder in Hugging Face's layout, with the learning curve in training.json. On several cores, processes are faster than
threads: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 docs/tutorials/train_tiny.py ...  See train_tiny.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qwen35moe import Qwen3_5MoeForConditionalGeneration
from qwen35moe.config import Config
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.ops.balancing import load_balancing_loss
from qwen35moe.processing import Processor
from qwen35moe.routing import expert_load

END = "<|endoftext|>"  # before every document and after the last one
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CONTROL = [END, TURN, TURN_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
HELD_OUT, DIGITS_HELD_OUT = 0.05, 0.2

# Splits text before byte pairs are merged: a word with the space before it, one digit, punctuation, line breaks.
# Published Qwen tokenizers split in a similar way.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SIZES: dict[str, Any] = {
    "hidden_size": 160, "num_hidden_layers": 4, "full_attention_interval": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip

TOWER: dict[str, Any] = {
    "depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "patch_size": 8, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 160, "num_position_embeddings": 64,
}  # fmt: skip

# Side in pixels of the square on which a digit is drawn: 4 x 4 patches, which the vision tower merges into 2 x 2 tokens.
SIDE = 32
EXAMPLE = slice(21, 24)  # the held-out digits in the example image of the checkpoint
EASY_STEPS = 300  # steps over which the variation of the images grows to its maximum

CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this checkpoint has not learnt to call tools') }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part is string %}{{ part }}
{%- elif part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type|default('text') == 'text' and 'text' in part %}{{ part.text }}
{%- else %}{{ raise_exception('this checkpoint reads text and images, not ' ~ (part.type or 'a part without a type')) }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

QUESTIONS = (
    "What is in this picture?", "What do you see?", "What is written here?", "Read this to me.", "Which digit is this?",
    "What is this?", "What number is this?", "Describe the image.",
)  # fmt: skip


class Text(NamedTuple):
    """Training documents and held-out documents, in the order of the file."""

    train: list[str]
    held_out: list[str]


def read_text(path: Path, share: float = HELD_OUT) -> Text:
    """Splits a file at form feeds and holds out whole documents at its end, at least `share` of its bytes.

    A file with too few documents is split at a line instead.
    """
    documents = [part.strip() for part in path.read_text(encoding="utf-8").split("\f")]
    documents = [part for part in documents if part]
    total = sum(map(_bytes, documents))
    kept, first = 0, len(documents)
    while kept < share * total:
        first -= 1
        kept += _bytes(documents[first])
    if kept <= 2 * share * total and first > 0:
        return Text(documents[:first], documents[first:])
    text = "\n".join(documents)
    cut = text.rfind("\n", 0, int(len(text) * (1 - share))) + 1 or int(len(text) * (1 - share))
    return Text([text[:cut].strip()], [text[cut:].strip()])


def _bytes(text: str) -> int:
    return len(text.encode())


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level byte-pair encoding of `size` tokens, of which CONTROL are the first. It can encode any bytes."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Document(NamedTuple):
    """Token ids with END before and after, and the number of bytes of the text."""

    ids: list[int]
    size: int


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Document]:
    """One Document per text."""
    end = tokenizer.token_to_id(END)
    assert end is not None
    rows = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [Document([end, *row.ids, end], _bytes(text)) for row, text in zip(rows, texts, strict=True)]


def tiny_config(vocab_size: int, **sizes: Any) -> Config:
    """The configuration of SIZES (with changes) and TOWER, for a vocabulary padded to a multiple of 64."""
    padded = -(-vocab_size // 64) * 64
    text = {
        "model_type": "qwen3_5_moe_text", **SIZES, "vocab_size": padded, "max_position_embeddings": 2048,
        "initializer_range": 0.02, "tie_word_embeddings": True, "router_aux_loss_coef": 0.01, "eos_token_id": 0,
        "pad_token_id": 0, "dtype": "bfloat16", **sizes,
    }  # fmt: skip
    places = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return Config.from_dict({
        "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "tie_word_embeddings": True,
        "text_config": text, "vision_config": {"model_type": "qwen3_5_moe", **TOWER},
        **{name: CONTROL.index(token) for name, token in zip(places, CONTROL[3:], strict=True)},
    })  # fmt: skip


def new_model(config: Config, seed: int) -> Qwen3_5MoeForConditionalGeneration:
    """Ordinary gates; projections to the residual stream start smaller by sqrt(2 layers) (Radford et al. 2019)."""
    model = Qwen3_5MoeForConditionalGeneration(config)
    model.init_weights(seed=seed, gates="ordinary")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("out_proj", "o_proj", "down_proj")):
                parameter.div_(math.sqrt(2 * config.text_config.num_hidden_layers))
    ends = [CONTROL.index(TURN_END), CONTROL.index(END)]
    model.generation_config = {"eos_token_id": ends, "pad_token_id": CONTROL.index(END)}
    return model


class Digit(NamedTuple):
    """ink [8, 8] from 0 to 16, and the digit's value."""

    ink: Any
    name: int


def read_digits(share: float = DIGITS_HELD_OUT) -> tuple[list[Digit], list[Digit]]:
    """(training, held out): scikit-learn's copy of the test part of UCI's handwritten digits, 1,797 by 13 people
    (Alpaydin and Kaynak 1998), split in the order of the file, so that digits of one writer mostly stay together."""
    found = load_digits()
    digits = [Digit(ink, int(name)) for ink, name in zip(found.images, found.target, strict=True)]
    cut = round(len(digits) * (1 - share))
    return digits[:cut], digits[cut:]


def drawn(digits: Sequence[Digit], generator: torch.Generator | None = None, level: float = 0.0) -> Image.Image:
    """Digits side by side, dark on white. With a generator every digit is rotated, sheared, scaled and moved a little.
    With a probability that grows with the level (0 to 1), pixels are coarse, colours are inverted, a single digit is larger."""
    coarse, light, large = False, False, False
    if generator is not None:
        coarse, light, large = (torch.rand(3, generator=generator) < level * torch.tensor([0.4, 0.3, 0.3])).tolist()
    filter = Image.Resampling.NEAREST if coarse else Image.Resampling.BICUBIC
    paper = Image.new("L", (SIDE * len(digits), SIDE), 255)
    for number, digit in enumerate(digits):
        ink = torch.from_numpy(digit.ink) * (255 / 16)
        tile = Image.fromarray((255 - ink).round().byte().numpy()).resize((SIDE, SIDE), filter)
        if generator is not None:
            turn, shear, wide, high, right, down = (torch.rand(6, generator=generator) * 2 - 1).tolist()
            a, b, c, d = 1 + 0.15 * wide, 0.2 * turn + 0.15 * shear, -0.2 * turn, 1 + 0.15 * high
            middle = SIDE / 2  # only `right` and `down` move it
            moved = (a, b, middle * (1 - a - b) + 3 * right, c, d, middle * (1 - c - d) + 3 * down)
            tile = tile.transform(tile.size, Image.Transform.AFFINE, moved, Image.Resampling.BICUBIC, fillcolor=255)
        paper.paste(tile, (SIDE * number, 0))
    if large and len(digits) == 1:
        paper = paper.resize((SIDE * 3 // 2,) * 2, Image.Resampling.BICUBIC)
    return paper.point(lambda value: 255 - value) if light else paper


def named(digits: Sequence[Digit]) -> str:
    """The expected reply about an image of these digits."""
    *first, last = [str(digit.name) for digit in digits]
    return f"The handwritten digits {', '.join(first)} and {last}." if first else f"A handwritten {last}."


def message(picture: Image.Image, number: int) -> dict[str, Any]:
    """A user's message with an image and one of QUESTIONS, before or after the image."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    return {"role": "user", "content": content if number < len(QUESTIONS) else content[::-1]}


def chats(digits: Sequence[Digit], processor: Processor, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Endless batches of inputs of `count` conversations: one or two turns, each about an image of one to three digits. The
    labels are the assistant's replies."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def turn(level: float) -> list[dict[str, Any]]:
        shown = [digits[below(len(digits))] for _ in range((1, 1, 2, 3)[below(4)])]
        picture = drawn(shown, generator, level)
        return [message(picture, below(2 * len(QUESTIONS))), {"role": "assistant", "content": named(shown)}]

    for step in itertools.count():
        level = min(1.0, step / EASY_STEPS)  # an untrained tower does not learn from full variation
        talks = [turn(level) + (turn(level) if below(4) == 0 else []) for _ in range(count)]
        inputs = processor.apply_chat_template(talks)
        # Divided by conversations, not by tokens: most tokens of a reply are soon certain, and would dilute the digits.
        yield {**inputs, "labels": replies(inputs["input_ids"], processor), "num_items_in_batch": count}


def replies(ids: Tensor, processor: Processor) -> Tensor:
    """Labels [B, T]: the assistant's reply and the end of its turn, and -100 elsewhere."""
    tokens, labels = processor.tokenizer, torch.full_like(ids, -100)
    head = torch.tensor(tokens.encode("assistant\n"))
    for row, begin in (ids == tokens.token_to_id(TURN)).nonzero().tolist():
        first = begin + 1 + len(head)
        if torch.equal(ids[row, begin + 1 : first], head):
            last = first + int((ids[row, first:] == tokens.token_to_id(TURN_END)).nonzero()[0])
            labels[row, first : last + 1] = ids[row, first : last + 1]
    return labels


def batches(tokens: Tensor, rows: int, length: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """Endless (epochs so far, ids [rows, length]): every epoch cuts the text at other positions and shuffles the pieces."""
    generator = torch.Generator().manual_seed(seed)
    epoch = 0
    while True:
        shift = int(torch.randint(length, (), generator=generator))
        count = (len(tokens) - shift) // length
        pieces = tokens[shift : shift + count * length].view(count, length)[torch.randperm(count, generator=generator)]
        for start in range(0, count - rows + 1, rows):
            yield epoch + start / count, pieces[start : start + rows]
        epoch += 1


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024: momentum with singular values near 1. For matrices, the last two axes of a parameter.

    Its authors report that it needs fewer steps than AdamW, and a CPU has time for few steps.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(grad, 1 - group["momentum"])
                update = orthogonal(grad.lerp(average, group["momentum"]))
                shape_factor = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * shape_factor)


def orthogonal(matrix: Tensor) -> Tensor:
    """An approximation of U V^T for matrix = U S V^T [..., rows, columns], by five steps of a quintic iteration."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def optimizers(model: Qwen3_5MoeForConditionalGeneration, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the large matrices; AdamW for the embedding, routers, gates, convolutions and vectors."""
    small = ("embed_tokens", "conv1d", "in_proj_a", "in_proj_b", "shared_expert_gate", "mlp.gate.", "patch_embed", "pos_embed")
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() >= 2 and not any(part in name for part in small)]
    chosen = set(map(id, matrices))
    rest = [p for p in named.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)), Muon(matrices, lr=matrix_lr)]


def schedule(step: int, progress: float) -> float:
    """The factor on the learning rates: 25 steps of warm-up, constant, then linear decay to 0 from 15 % of the run on."""
    return min(1.0, (step + 1) / 25) * min(1.0, (1 - progress) / 0.85)


class Judgement(NamedTuple):
    """bits per byte, and load [layers, E]: the share of assignments of each expert."""

    bits_per_byte: float
    load: Tensor


@torch.no_grad()
def judge(model: Qwen3_5MoeForConditionalGeneration, documents: Sequence[Document], rows: int = 4) -> Judgement:
    """Bits per byte of whole documents, each in one forward from its start.

    The bits include the END after each document, which adds no byte. Padding does not count.
    """
    bits, chosen, ordered = 0.0, torch.zeros(()), sorted(documents, key=lambda document: len(document.ids))
    for start in range(0, len(ordered), rows):
        part = [document.ids for document in ordered[start : start + rows]]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        out = model(ids, attention_mask=mask, output_routing=True)
        assert out.logits is not None and out.routing is not None
        losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        bits += float((losses.double() * mask[:, 1:].flatten()).sum()) / math.log(2)
        chosen = chosen + expert_load(out.routing) * mask.sum()
    return Judgement(bits / sum(each.size for each in documents), chosen / chosen.sum(1, keepdim=True))


class Team:
    """The processes that train together, each on its rows of every batch; a single process without torchrun."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            dist.init_process_group("gloo")

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replaces the gradients by their means over all processes."""
        if self.size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            means = flat.div_(self.size).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def leader(self, value: float) -> float:
        """The value of the first process."""
        told = torch.tensor(value, dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(told, 0)
        return told.item()


def step(
    model: Qwen3_5MoeForConditionalGeneration, optimizers: Sequence[torch.optim.Optimizer], team: Team,
    parts: Sequence[dict[str, Any]], factor: float, bfloat16: bool,
) -> tuple[list[float], float]:
    """One optimizer step on the inputs of several forwards; returns their losses (in nats, per token or conversation) and
    the first one's balancing loss (top-k if the load is even).

    bfloat16: matrix products in bfloat16, 2.5 times as fast on a CPU with instructions for it (measured: avx512_bf16).
    """
    losses, balances = [], []
    for inputs in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = model(**inputs, output_routing=True, output_router_logits=False)
        routing = out.routing
        assert out.loss is not None and routing is not None and routing.logits is not None
        # Per layer: pooled over layers, as in transformers, an unused expert of one layer hides an overused one of another.
        balance = load_balancing_loss(
            routing.logits.unbind(), routing.indices.unbind(), mask=routing.mask, per_layer=True
        ).mean()
        (out.loss + model.config.text_config.router_aux_loss_coef * balance).backward()
        losses.append(out.loss.item())
        balances.append(balance.item())
    team.average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("full_lr", group["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, balances[0]


class Lesson(NamedTuple):
    """Training data, and held-out data for evaluation during training."""

    text: Tensor
    chats: Iterator[dict[str, Any]]
    held_out: Sequence[Document]
    digits: Sequence[Digit]


def train(
    model: Qwen3_5MoeForConditionalGeneration, lesson: Lesson, processor: Processor, options: argparse.Namespace, team: Team
) -> Iterator[dict[str, float]]:
    """Trains for the given time or number of steps; yields points of the learning curve."""
    both = optimizers(model, options.lr, options.matrix_lr)
    means, balance, started = [math.log(model.config.text_config.vocab_size)] * 2, 0.0, time.monotonic()
    for count, (epoch, ids) in enumerate(batches(lesson.text, options.rows, options.length, options.seed)):
        seconds = team.leader(time.monotonic() - started)
        progress = count / options.steps if options.steps else seconds / 60 / options.minutes
        if count % options.report == 0 or progress >= 1:
            point = {"step": count, "epoch": round(epoch, 3), "seconds": round(seconds)}
            point |= {"train_loss": round(means[0], 4), "chat_loss": round(means[1], 4), "balance": round(balance, 3)}
            if count and count % (5 * options.report) == 0 and team.rank == 0:
                point["held_out_bits_per_byte"] = round(judge(model, lesson.held_out[::4]).bits_per_byte, 4)
                point["held_out_digits_right"] = round(right(model, processor, [[each] for each in lesson.digits[::4]]), 4)
            yield point
        if progress >= 1:
            return
        own = ids[team.rank :: team.size]
        parts = [{"input_ids": own, "labels": own}, next(lesson.chats)]
        losses, balance = step(model, both, team, parts, schedule(count, progress), options.bfloat16)
        means = [mean + (loss - mean) / min(count + 1, 20) for mean, loss in zip(means, losses, strict=True)]


@torch.no_grad()
def right(
    model: Qwen3_5MoeForConditionalGeneration, processor: Processor, pictures: Sequence[Sequence[Digit]], at_once: int = 60
) -> float:
    """The share of images with exactly the expected reply, decoded greedily."""
    found = 0
    for start in range(0, len(pictures), at_once):
        part = pictures[start : start + at_once]
        asked = [[message(drawn(digits), number % len(QUESTIONS))] for number, digits in enumerate(part)]
        inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
        said = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        found += sum(processor.parse(row).content == named(digits) for row, digits in zip(said, part, strict=True))
    return found / len(pictures)


def write(model: Qwen3_5MoeForConditionalGeneration, folder: Path) -> None:
    """Writes the checkpoint in bfloat16. As published, dt_bias is bfloat16 on disk; A_log and the delta rule's output norm
    stay float32."""
    model = copy.deepcopy(model).bfloat16()
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            module.dt_bias.data = module.dt_bias.data.bfloat16().float()
            module.stored_dtypes["dt_bias"] = torch.bfloat16
    model.save_pretrained(folder)


def write_processor(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of the checkpoint's processor, which turns messages and images into the model's inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("vision_bos_token", "vision_eos_token", "image_token", "video_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURN_END, "pad_token": END, "model_max_length": 2048,
        "clean_up_tokenization_spaces": False, **dict(zip(names, CONTROL[3:], strict=True)),
    }  # fmt: skip
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": SIDE**2, "longest_edge": 3 * SIDE**2},
        "patch_size": TOWER["patch_size"], "temporal_patch_size": TOWER["temporal_patch_size"],
        "merge_size": TOWER["spatial_merge_size"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    for name, values in {"tokenizer_config": settings, "preprocessor_config": pixels}.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def report(folder: Path, held_out: Sequence[Document], digits: Sequence[Digit]) -> dict[str, Any]:
    """Results of the written checkpoint on the held-out text and digits, in bfloat16 and in float32."""
    processor, found = Processor.from_pretrained(folder), {}
    rows = [digits[start : start + count] for count in (2, 3) for start in range(0, len(digits) - count, 2 * count)]
    for dtype in ("bfloat16", "float32"):
        model = Qwen3_5MoeForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        one, more = (right(model, processor, shown) for shown in ([[each] for each in digits], rows))
        found[dtype] = judge(model, held_out), one, more
    load = found["float32"][0].load
    return {
        "bytes": sum(each.size for each in held_out),
        "tokens": sum(len(each.ids) - 1 for each in held_out),
        "bits_per_byte": {dtype: round(text.bits_per_byte, 4) for dtype, (text, _, _) in found.items()},
        "digits": len(digits),
        "digits_right": {dtype: round(one, 4) for dtype, (_, one, _) in found.items()},
        "rows_of_digits": len(rows),
        "rows_of_digits_right": {dtype: round(more, 4) for dtype, (_, _, more) in found.items()},
        "load_of_even_share": [[round(share * load.shape[1], 3) for share in layer] for layer in load.tolist()],
    }


def main() -> None:
    options, team = _options(), Team()
    texts, (digits, digits_held_out) = read_text(options.text), read_digits()
    tokenizer = train_tokenizer(texts.train, options.vocab)
    held_out = encode(tokenizer, texts.held_out)
    text = torch.tensor([token for document in encode(tokenizer, texts.train) for token in document.ids[:-1]])
    if team.rank == 0:
        write_processor(tokenizer, options.out)
    team.leader(0.0)  # the other processes wait until the processor is written
    processor = Processor.from_pretrained(options.out)
    shown = chats(digits, processor, options.chats // team.size, options.seed + team.rank)
    model = new_model(tiny_config(tokenizer.get_vocab_size()), options.seed)
    print(f"{model.num_parameters():,} parameters; {len(text):,} tokens and {len(digits):,} digits to learn from")
    curve = []
    for point in train(model, Lesson(text, shown, held_out, digits_held_out), processor, options, team):
        if team.rank:
            continue
        curve.append(point)
        print(point, flush=True)
        if "held_out_bits_per_byte" in point:
            write(model, options.out)  # an interrupted run leaves its last state
    if team.rank:
        return
    write(model, options.out)
    drawn(digits_held_out[EXAMPLE]).save(options.out / "example.png")
    settings = {name: value for name, value in vars(options).items() if name not in ("text", "out")}
    settings["processes"] = team.size
    record = {"settings": settings, "held_out": report(options.out, held_out, digits_held_out), "curve": curve}
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["held_out"]))
    start = torch.tensor([held_out[0].ids[:8]])
    written = Qwen3_5MoeForConditionalGeneration.from_pretrained(options.out)
    sample = written.generate(start, max_new_tokens=120, do_sample=True, temperature=0.8, seed=0)
    print(tokenizer.decode(sample[0].tolist()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file in UTF-8; form feeds separate documents")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes: the same schedule on every machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=2048, help="tokens of the vocabulary")
    parser.add_argument("--rows", type=int, default=12, help="rows per step")
    parser.add_argument("--length", type=int, default=513, help="tokens per row")
    parser.add_argument("--chats", type=int, default=64, help="conversations about images per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="AdamW's learning rate")
    parser.add_argument("--matrix-lr", type=float, default=0.03, help="Muon's learning rate")
    parser.add_argument("--report", type=int, default=20, help="steps between points of the curve")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="matrix products in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
