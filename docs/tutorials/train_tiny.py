"""Train the bundled checkpoint, or one of your own, from a text file, on a CPU.

    python docs/tutorials/train_tiny.py --text kjv.txt --out my_tiny [--minutes 60 | --steps 2000]

Form feeds in the file separate its documents; without any the file is one document. The last 5 % are held out. What
comes out is a checkpoint folder as Hugging Face has it, with the learning curve in training.json. See train_tiny.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.config import Config
from qwen35moe.ops.losses import load_balancing_loss

END = "<|endoftext|>"  # before every document, and after the last
HELD_OUT = 0.05

# How text is cut before byte pairs are merged: a word with the space before it, one digit, punctuation, line breaks.
# Published Qwen tokenizers cut in the same way.
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


class Text(NamedTuple):
    """Documents to learn from and documents held out, in the order of the file."""

    train: list[str]
    held_out: list[str]


def read_text(path: Path, share: float = HELD_OUT) -> Text:
    """Splits a file at form feeds, and keeps whole documents from its end, at least `share` of it, for judging.

    A file without enough documents is cut at a line instead.
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
    """A byte-level byte-pair encoding of `size` tokens, the first of them END. Any bytes can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """The token ids of each document, END before and after."""
    end = tokenizer.token_to_id(END)
    return [[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False)]


def tiny_config(vocab_size: int, **sizes: Any) -> Config:
    """SIZES with changes, for a vocabulary padded to a multiple of 64."""
    padded = -(-vocab_size // 64) * 64
    return Config.from_dict({
        "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], **SIZES, "vocab_size": padded,
        "max_position_embeddings": 2048, "initializer_range": 0.02, "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.01, "eos_token_id": 0, "pad_token_id": 0, "dtype": "bfloat16", **sizes,
    })  # fmt: skip


def new_model(config: Config, seed: int) -> Qwen3_5MoeForCausalLM:
    """Ordinary gates; what writes into the residual stream starts smaller by sqrt(2 layers) (Radford et al. 2019)."""
    model = Qwen3_5MoeForCausalLM(config)
    model.init_weights(seed=seed, gates="ordinary")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("out_proj", "o_proj", "down_proj")):
                parameter.div_(math.sqrt(2 * config.text_config.num_hidden_layers))
    return model


def batches(tokens: Tensor, rows: int, length: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """(epochs so far, [rows, length] ids) without end: each epoch cuts the text elsewhere and shuffles the pieces."""
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
    """Jordan et al. 2024: momentum, its singular values set near 1. For matrices, the last two axes of a parameter.

    With a text of a few megabytes steps are what is scarce, and this learns more from each than AdamW does.
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
    """Roughly U V^T of matrix = U S V^T [..., m, n], by five steps of a quintic iteration."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def optimizers(model: Qwen3_5MoeForCausalLM, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the large matrices; AdamW for the embedding, routers, gates, convolutions and vectors."""
    small = ("embed_tokens", "conv1d", "in_proj_a", "in_proj_b", "shared_expert_gate", "mlp.gate.")
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
    """The factor on the learning rates: up over 100 steps, level, from 15 % of the run on straight down to 0."""
    return min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.85)


class Judgement(NamedTuple):
    """bits per byte, and load [layers, experts]: the share of the choices that fell on each expert."""

    bits_per_byte: float
    load: Tensor


@torch.no_grad()
def judge(model: Qwen3_5MoeForCausalLM, documents: Sequence[list[int]], size: int, rows: int = 8) -> Judgement:
    """Bits per byte of whole documents that take `size` bytes as text: each is read from its start, in one piece.

    The END after each document is paid for as well, and adds no byte. Padding counts nowhere.
    """
    bits, counts = 0.0, torch.zeros(())
    ordered = sorted(documents, key=len)
    for start in range(0, len(ordered), rows):
        part = ordered[start : start + rows]
        width = max(map(len, part))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in part])
        out = model(ids, attention_mask=mask, output_routing=True)
        assert out.logits is not None and out.routing is not None
        losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        bits += float((losses.double() * mask[:, 1:].flatten()).sum()) / math.log(2)
        counts = counts + out.routing.load() * mask.sum()
    return Judgement(bits / size, counts / counts.sum(1, keepdim=True))


def half_precision(enabled: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16: 2.5 times as fast where the CPU has instructions for it (avx512_bf16, amx)."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class Run:
    """One training run: the loop, the curve, and what it writes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.text = read_text(options.text)
        self.tokenizer = train_tokenizer(self.text.train, options.vocab)
        self.held_out = encode(self.tokenizer, self.text.held_out)
        self.held_out_bytes = sum(map(_bytes, self.text.held_out))
        stream = [token for ids in encode(self.tokenizer, self.text.train) for token in ids[:-1]]
        self.tokens = torch.tensor(stream)
        self.config = tiny_config(self.tokenizer.get_vocab_size())
        self.model = new_model(self.config, options.seed)
        self.optimizers = optimizers(self.model, options.lr, options.matrix_lr)
        self.rates = [[group["lr"] for group in each.param_groups] for each in self.optimizers]
        self.curve: list[dict[str, float]] = []

    def train(self) -> None:
        """Steps until the time or the number of steps is used up."""
        options, started, recent = self.options, time.monotonic(), float("nan")
        source = batches(self.tokens, options.rows, options.length + 1, options.seed)
        for step, (epoch, ids) in enumerate(source):
            seconds = time.monotonic() - started
            progress = step / options.steps if options.steps else seconds / 60 / options.minutes
            if progress >= 1:
                break
            loss, balance = self.step(ids, schedule(step, progress))
            recent = loss if step == 0 else 0.95 * recent + 0.05 * loss
            if step % options.report == 0:
                rate = step * options.rows * options.length / max(seconds, 1e-9)
                entry = {"step": step, "epoch": round(epoch, 3), "seconds": round(seconds), "loss": round(recent, 4)}
                if step % (10 * options.report) == 0:
                    entry |= {"bits_per_byte": round(self.judge(self.held_out[:16]).bits_per_byte, 4)}
                    self.save()
                self.curve.append(entry)
                print(entry, f"balance {balance:.3f}, {rate:.0f} tokens/s", flush=True)
        self.summary = {"steps": step, "epochs": round(epoch, 2), "seconds": round(time.monotonic() - started)}

    def step(self, ids: Tensor, factor: float) -> tuple[float, float]:
        """One step on ids [rows, length + 1]; returns the loss in nats per token and the balancing loss (even: S)."""
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with half_precision(self.options.bfloat16):
            out = self.model(ids, labels=ids, output_routing=True)
        routing = out.routing
        assert out.loss is not None and routing is not None
        # Per layer: pooled over the layers, as transformers has it, two uneven layers can cancel.
        balance = load_balancing_loss(routing.logits.unbind(0), routing.indices.unbind(0), per_layer=True).mean()
        (out.loss + self.config.text_config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return out.loss.item(), balance.item()

    def judge(self, documents: Sequence[list[int]]) -> Judgement:
        size = self.held_out_bytes if documents is self.held_out else _bytes(self.tokenizer.decode_batch(documents))
        return judge(self.model, documents, size)

    def save(self) -> None: ...
