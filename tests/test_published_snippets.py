"""Published snippets with their import line changed, beside the same text run with transformers: equal ids, equal text.

Each snippet is the code of a public page (the model documentation, deployment articles, model cards) with the name of the
checkpoint replaced. Both run on the bundled checkpoint, in float32 and greedy where they are compared; ours also as printed.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qwen35moe
from qwen35moe.checkpoint.hub import BUNDLED

transformers = pytest.importorskip("transformers")
PICTURE = BUNDLED / "example.png"

MODEL_DOCUMENTATION = """
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

model = Qwen3_5MoeForCausalLM.from_pretrained("CHECKPOINT", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")

inputs = tokenizer("And God said", return_tensors="pt").to(model.device)
generated = model.generate(**inputs, max_new_tokens=64)
text = tokenizer.decode(generated[0], skip_special_tokens=True)
"""

DOCSTRING = """
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

model = Qwen3_5MoeForCausalLM.from_pretrained("CHECKPOINT")
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")

prompt = "And the LORD spake unto Moses"
inputs = tokenizer(prompt, return_tensors="pt")

# Generate
generated = model.generate(inputs.input_ids, max_length=30)
text = tokenizer.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
"""

DEPLOYMENT = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = "CHECKPOINT"
tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    model_name,
    device_map="auto",
    torch_dtype=torch.bfloat16,
    trust_remote_code=True,
)

messages = [{"role": "user", "content": "What is the beginning?"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model_inputs = tokenizer([prompt], return_tensors="pt").to(model.device)
generated = model.generate(**model_inputs, max_new_tokens=32)
generated_ids = [
    output_ids[len(input_ids):] for input_ids, output_ids in zip(model_inputs.input_ids, generated)
]
text = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
"""

BATCH = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT", padding_side="left", use_fast=True)
model = AutoModelForCausalLM.from_pretrained("CHECKPOINT", torch_dtype="auto", attn_implementation="sdpa",
                                             low_cpu_mem_usage=True)
model.eval()

prompts = ["And God said", "In the beginning was the word", "Now"]
model_inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
generated = model.generate(**model_inputs, max_new_tokens=12, do_sample=False, num_beams=1, use_cache=True,
                           pad_token_id=tokenizer.pad_token_id)
text = tokenizer.batch_decode(generated, skip_special_tokens=True)
"""

PROCESSOR = """
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("CHECKPOINT", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("CHECKPOINT")

messages = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "PICTURE"},
            {"type": "text", "text": "Describe this image."},
        ],
    }
]

# Preparation for inference
inputs = processor.apply_chat_template(
    messages,
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt"
)
inputs = inputs.to(model.device)

# Inference: Generation of the output
generated = model.generate(**inputs, max_new_tokens=16)
generated_ids_trimmed = [
    out_ids[len(in_ids):] for in_ids, out_ids in zip(inputs.input_ids, generated)
]
text = processor.batch_decode(
    generated_ids_trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
)
"""

LOOP = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
model = AutoModelForCausalLM.from_pretrained("CHECKPOINT")
inputs = tokenizer("And God said", return_tensors="pt")
input_ids, past_key_values, generated = inputs.input_ids, None, inputs.input_ids
with torch.no_grad():
    for _ in range(10):
        outputs = model(input_ids=input_ids, past_key_values=past_key_values, use_cache=True, return_dict=True)
        past_key_values = outputs.past_key_values
        input_ids = outputs.logits[:, -1:].argmax(-1)
        generated = torch.cat([generated, input_ids], dim=-1)
text = tokenizer.decode(generated[0])
"""

PIPELINE = """
from transformers import pipeline

pipe = pipeline("text-generation", model="CHECKPOINT", device_map="auto")
text = [
    pipe("And God said", max_new_tokens=20)[0]["generated_text"],
    pipe(["And God said", "Now"], max_new_tokens=9, return_full_text=False),
    pipe([{"role": "user", "content": "Who are you?"}], max_new_tokens=9)[0]["generated_text"],
    pipe([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am"}], max_new_tokens=5),
]
"""

MODEL_CARD = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

config = AutoConfig.from_pretrained("CHECKPOINT", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("CHECKPOINT", config=config, torch_dtype=torch.float32).eval()
model.generation_config = GenerationConfig.from_pretrained("CHECKPOINT")
model.generation_config.max_new_tokens = 11
input_tensor = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Write a line"}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
generated = model.generate(input_tensor.to(model.device))
text = tokenizer.decode(generated[0][input_tensor.shape[1]:], skip_special_tokens=True)
"""

SNIPPETS = {
    "model documentation": MODEL_DOCUMENTATION, "docstring": DOCSTRING, "deployment": DEPLOYMENT, "batch": BATCH,
    "processor": PROCESSOR, "loop": LOOP, "pipeline": PIPELINE, "model card": MODEL_CARD,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint in float32, in which two implementations choose the same tokens."""
    folder = tmp_path_factory.mktemp("snippets") / "tiny"
    qwen35moe.AutoModelForImageTextToText.from_pretrained(BUNDLED, dtype=torch.float32).save_pretrained(folder)
    qwen35moe.AutoProcessor.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def run(source: str, checkpoint: Any, module: str | None = "qwen35moe", **values: Any) -> dict[str, Any]:
    """The names that a snippet defines, its import line changed to `module`."""
    source = source.replace("CHECKPOINT", str(checkpoint)).replace("PICTURE", str(PICTURE))
    if module:
        source = source.replace("from transformers import", f"from {module} import")
    namespace: dict[str, Any] = dict(values)
    exec(compile(source, "<snippet>", "exec"), namespace)
    return namespace


def comparable(source: str) -> str:
    """Float32 instead of bfloat16, and without what transformers needs accelerate for."""
    source = source.replace("torch.bfloat16", "torch.float32")
    return re.sub(r',?\s*device_map="auto"', "", source)


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs_as_printed_with_its_import_line_changed(name: str) -> None:
    namespace = run(SNIPPETS[name], BUNDLED)
    assert namespace["text"]
    model = namespace.get("model") or namespace["pipe"].model
    assert type(model).__module__.startswith("qwen35moe.")
    assert model.dtype == (torch.float32 if name == "model card" else torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in ("processor", "pipeline")])
def test_a_snippet_gives_what_it_gives_with_transformers(name: str, checkpoint: Path) -> None:
    source = comparable(SNIPPETS[name])
    ours, theirs = run(source, checkpoint), run(source, checkpoint, None)
    assert ours["generated"].tolist() == theirs["generated"].tolist()
    assert ours["text"] == theirs["text"]


def test_the_processor_s_snippet_gives_what_it_gives_with_transformers(checkpoint: Path) -> None:
    """transformers' AutoProcessor needs torchvision for videos; here its parts for text and images are put together."""
    from tests.support.chat import processor_of_transformers

    source = comparable(PROCESSOR).replace("AutoModelForImageTextToText, AutoProcessor", "AutoModelForImageTextToText")
    auto = SimpleNamespace(from_pretrained=processor_of_transformers)
    theirs = run(source, checkpoint, None, AutoProcessor=auto)
    ours = run(comparable(PROCESSOR), checkpoint)
    assert ours["generated"].tolist() == theirs["generated"].tolist() and ours["text"] == theirs["text"]
    crossed = ours["model"].generate(**theirs["inputs"].to(ours["model"].device), max_new_tokens=16)
    assert crossed.tolist() == theirs["generated"].tolist(), "their processor fits our model"


def test_the_pipeline_gives_what_it_gives_with_transformers(checkpoint: Path) -> None:
    source = comparable(PIPELINE)
    ours, theirs = (
        run(source, checkpoint),
        run(source.replace("max_new_tokens", "do_sample=False, max_new_tokens"), checkpoint, None),
    )
    assert ours["text"] == theirs["text"]


@pytest.mark.parametrize("reader", ["ours", "theirs"])
def test_a_pipeline_of_transformers_takes_our_model(reader: str, checkpoint: Path) -> None:
    model = qwen35moe.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = (qwen35moe if reader == "ours" else transformers).AutoTokenizer.from_pretrained(checkpoint)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    own = qwen35moe.pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Who are you?"}]
    for prompt in ("And God said", ["Now", "And God said"], chat, [chat, chat]):
        options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False)
        assert pipe(prompt, **options) == own(prompt, **options)


def test_both_tokenizers_fit_our_models_in_every_form(checkpoint: Path) -> None:
    """`tokenizer(..., return_tensors="pt").to(model.device)` of Hugging Face's tokenizer, of ours, and of load()."""
    model, own = qwen35moe.load(checkpoint)
    auto = qwen35moe.AutoTokenizer.from_pretrained(checkpoint)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    wanted = None
    for tokenizer in (own, auto, theirs):
        inputs = tokenizer(["And God said"], return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=7)
        wanted = ids if wanted is None else wanted
        assert torch.equal(ids, wanted) and torch.equal(model.generate(inputs.input_ids, max_new_tokens=7), wanted)
        assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("And God said")
