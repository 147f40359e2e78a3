"""The process that holds one checkout: reads a request per line from stdin, answers with a line of JSON on stdout.

It is started by path with the checkout's folders on PYTHONPATH and imports nothing of `benchmarks`: the other checkout has
a package of that name too. It uses only what both checkouts have: the class, `Config`, `init_weights`, `new_cache`, calls.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DECODED = 4  # tokens decoded one by one for the answer


class Worker:
    """One model at a time, one scenario of it at a time."""

    def __init__(self, package: Any, device: str) -> None:
        self.package, self.device = package, device
        self.model: Any = None
        self.cache: Any = None
        self.scenario: dict[str, Any] = {}
        self.generator = torch.Generator()

    def deterministic(self) -> dict[str, Any]:
        """Only deterministic algorithms from now on, and nothing that is chosen by measurement."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        return {}

    def build(self, preset: str, changes: dict[str, Any], dtype: str) -> dict[str, Any]:
        """A model with the library's initial weights; returns a digest of them and their bytes."""
        self.model = self.cache = None
        gc.collect()
        changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
        config = self.package.Config.preset(preset).replace(**changes)
        torch.set_default_dtype(DTYPES[dtype])  # no copy of the weights in float32
        self.model = self.package.Qwen3_5MoeForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        self.model.init_weights(seed=0)
        self.model.eval()
        digest, weights = hashlib.blake2b(), self.model.state_dict()
        for name in sorted(weights):
            digest.update(f"{name} {list(weights[name].shape)} {weights[name].dtype}".encode())
            digest.update(weights[name].reshape(-1).view(torch.uint8).numpy())
        self.model.to(self.device)
        return {"digest": digest.hexdigest(), "bytes": sum(tensor.nbytes for tensor in weights.values())}

    def prepare(self, kind: str, tokens: int, past: int, answer: str) -> dict[str, Any]:
        """Begin a scenario: draw its inputs from a fixed seed, write its answer."""
        self.scenario, self.cache = {"kind": kind, "tokens": tokens}, None
        self.generator.manual_seed(1)
        with torch.inference_mode():
            parts = []
            if past:
                self.cache = self.model.new_cache(1)
                parts.append(self.call(self.inputs(past)))
            parts += [self.call(self.inputs(tokens)) for _ in range(DECODED if past else 1)]
            torch.save(torch.cat([part.float().flatten().cpu() for part in parts]), answer)
        return {}

    def inputs(self, tokens: int) -> Tensor:
        """Token ids [1, T] of the text model, hidden states [1, T, D] otherwise."""
        text = self.model.config.text_config
        if self.scenario["kind"] == "text":
            return torch.randint(0, text.vocab_size, (1, tokens), generator=self.generator).to(self.device)
        return torch.randn(1, tokens, text.hidden_size, generator=self.generator).to(self.device, self.model.dtype)

    def call(self, inputs: Tensor) -> Tensor:
        """text: logits of the last token; layer: the decoder's hidden states; block: the first layer's experts."""
        kind = self.scenario["kind"]
        if kind == "text":
            return self.model(inputs, cache=self.cache, logits_to_keep=1).logits
        if kind == "layer":
            return self.model.model(inputs_embeds=inputs, cache=self.cache).last_hidden_state
        return self.model.model.layers[0].mlp(inputs)

    def time(self, runs: int, uncounted: int) -> dict[str, Any]:
        """Seconds of each run; fresh inputs every time, so that other experts are hit and a cache grows."""
        seconds = []
        with torch.inference_mode():
            for number in range(uncounted + runs):
                inputs = self.inputs(self.scenario["tokens"])
                gc.collect()
                gc.disable()
                self.synchronize()
                start = time.perf_counter()
                output = self.call(inputs)
                self.synchronize()
                taken = time.perf_counter() - start
                gc.enable()
                del output
                if number >= uncounted:
                    seconds.append(taken)
        return {"seconds": seconds}

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def calls(self) -> dict[str, Any]:
        """Python calls into the package and its kernels, per file, while one layer decodes a cached token.

        The layer is the bundled checkpoint's first one with Gated DeltaNet. Comprehensions count where they have frames
        of their own (before Python 3.12).
        """
        model, _ = self.package.load("tiny")
        layer = next(module for module in model.modules() if hasattr(module, "linear_attn"))
        root = str(Path(self.package.__file__).parents[1]) + os.sep
        packages = (f"{root}qwen35moe{os.sep}", f"{root}kernels{os.sep}")
        files: dict[str, int] = {}
        inside: list[FrameType] = []

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            code = frame.f_code
            if event == "return" and inside and frame is inside[-1]:
                inside.pop()
            elif event == "call" and code.co_filename.startswith(packages):
                if not inside and code.co_name == "forward" and frame.f_locals.get("self") is layer:
                    inside.append(frame)
                if inside:
                    name = code.co_filename.removeprefix(root).replace(os.sep, "/")
                    files[name] = files.get(name, 0) + 1

        with torch.inference_mode():
            cache = model.new_cache(1)
            for tokens in (8, 1, 1):  # the first calls choose the implementations
                model(torch.zeros(1, tokens, dtype=torch.long), cache=cache)
            token = torch.zeros(1, 1, dtype=torch.long)
            sys.setprofile(profile)
            try:
                model(token, cache=cache)
            finally:
                sys.setprofile(None)
        return {"files": files}


def main() -> None:
    """Serve requests {"do": method, ...} until stdin ends."""
    root, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != Path(__file__).resolve().parent]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other prints go to stderr
    import qwen35moe

    if root not in Path(qwen35moe.__file__).resolve().parents:
        raise SystemExit(f"the package is imported from {qwen35moe.__file__}, not from {root}")
    worker = Worker(qwen35moe, device)
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
