"""The bundled checkpoint: it is what its README and training.json say, and transformers reads it as we do.

`data/held_out.txt` is every tenth chapter of the text that was held out of its training, a form feed between; the digits
that were held out come from scikit-learn.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import qwen35moe
from qwen35moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
from qwen35moe.cli import main
from qwen35moe.processing import Processor, Tokenizer

TINY = Path(qwen35moe.__file__).parent / "assets" / "tiny"
RECIPE = Path(__file__).parents[1] / "docs" / "tutorials" / "train_tiny.py"
EXCERPT = Path(__file__).parent / "data" / "held_out.txt"
STATED = 1.5  # bits per byte on the held-out text, as the README says; 1.9 was asked for
RIGHT = 0.95  # of the held-out digits, as the README says; 0.9 was asked for
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The training recipe as a module: it judges here as it judged in training."""
    spec = importlib.util.spec_from_file_location("train_tiny", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny() -> tuple[Qwen3_5MoeForConditionalGeneration, Tokenizer]:
    """The checkpoint in float32."""
    return qwen35moe.load("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' model of it in float32."""
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((TINY / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def excerpt(recipe: ModuleType) -> Any:
    """The stored tenth of the held-out text, as documents of tokens."""
    texts = EXCERPT.read_text(encoding="utf-8").split("\f")
    return recipe.encode(recipe.Tokenizer.from_file(str(TINY / "tokenizer.json")), [text.strip() for text in texts])


def test_the_folder_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(sizes.values()) <= 8_000_000, sizes
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {"chat_template.jinja", "preprocessor_config.json"}
    assert wanted | {"training.json", "README.md", "example.png"} == set(sizes)


def test_it_is_the_architecture_in_small(tiny: tuple[Qwen3_5MoeForConditionalGeneration, Tokenizer]) -> None:
    assert isinstance(tiny[0], Qwen3_5MoeForConditionalGeneration) and tiny[0].visual.config.depth >= 2
    text = tiny[0].config.text_config
    assert text.layer_types == ("linear_attention", "linear_attention", "linear_attention", "full_attention")
    assert text.num_experts >= 16 and text.num_experts_per_tok == 4 and text.shared_expert_intermediate_size > 0
    assert text.vocab_size % 64 == 0


def test_stored_dtypes_are_as_published() -> None:
    model = Qwen3_5MoeForCausalLM.from_pretrained(TINY)
    assert model.dtype == torch.bfloat16
    mixer = model.model.layers[0].linear_attn
    assert mixer.stored_dtypes == {"A_log": torch.float32, "dt_bias": torch.bfloat16}
    assert mixer.norm.stored_dtypes == {"weight": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_per_byte_and_expert_load_on_held_out_text(
    recipe: ModuleType, excerpt: Any, record: dict[str, Any], dtype: torch.dtype
) -> None:
    model = Qwen3_5MoeForCausalLM.from_pretrained(TINY, dtype=dtype)
    found = recipe.judge(model, excerpt)
    whole = record["held_out"]["bits_per_byte"][str(dtype).removeprefix("torch.")]
    assert whole <= STATED
    assert abs(found.bits_per_byte - whole) < 0.02  # measured: 0.007; a tenth is not the whole
    assert (found.load * found.load.shape[1]).min() >= 0.25


def test_the_memory_matters(recipe: ModuleType, excerpt: Any) -> None:
    """With the delta rule's state forgotten at every token the text is much harder to read."""
    model = Qwen3_5MoeForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    kept = recipe.judge(model, excerpt[:2]).bits_per_byte
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.A_log.fill_(10)
    assert recipe.judge(model, excerpt[:2]).bits_per_byte > kept + 0.05


def test_the_learning_curve_is_recorded(record: dict[str, Any]) -> None:
    curve, held_out = record["curve"], record["held_out"]
    assert len(curve) >= 10 and isinstance(record["settings"]["seed"], int)
    losses = [point["train_loss"] for point in curve if point.get("train_loss") is not None]
    assert losses[-1] < losses[0] - 2
    assert min(map(min, held_out["load_of_even_share"])) >= 0.25


def test_transformers_writes_the_same_64_tokens(
    tiny: tuple[Qwen3_5MoeForConditionalGeneration, Tokenizer], theirs: Any
) -> None:
    model, tokenizer = tiny
    their_tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)
    assert their_tokenizer(PROMPT)["input_ids"] == tokenizer.encode(PROMPT)
    ids = tokenizer(PROMPT)["input_ids"]
    ours = model.generate(ids, max_new_tokens=64)
    assert torch.equal(ours, theirs.generate(ids, max_new_tokens=64, do_sample=False))
    assert ours.shape[1] == ids.shape[1] + 64
    assert tokenizer.decode(ours[0]) == their_tokenizer.decode(ours[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_says_which_held_out_digit_it_sees(
    recipe: ModuleType, processor: Processor, record: dict[str, Any], dtype: str
) -> None:
    model, (learnt, digits) = Qwen3_5MoeForConditionalGeneration.from_pretrained(TINY, dtype=dtype), recipe.read_digits()
    assert len(digits) == 359 and not any((digits[0].ink == each.ink).all() for each in learnt)
    share = recipe.right(model, processor, [[each] for each in digits])
    assert share >= RIGHT and abs(share - record["held_out"]["digits_right"][dtype]) < 0.01  # other machines round otherwise


def test_it_reads_digits_that_others_drew(recipe: ModuleType, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stored, 8 x 8 and light on dark; enlarged by others, smooth and coarse. The README has the shares."""
    from PIL import Image

    model, digits = Qwen3_5MoeForConditionalGeneration.from_pretrained(TINY), recipe.read_digits()[1]
    found = {}
    for side, light, coarse in ((8, True, False), (28, True, False), (64, False, True), (200, True, True)):

        def drawn(row: Any, side: int = side, light: bool = light, coarse: bool = coarse) -> Any:
            ink = (torch.from_numpy(row[0].ink) * 255 / 16).byte()
            picture = Image.fromarray((ink if light else 255 - ink).numpy())
            return picture.resize((side, side), Image.Resampling.NEAREST if coarse else Image.Resampling.BICUBIC)

        monkeypatch.setattr(recipe, "drawn", drawn)
        found[side] = recipe.right(model, processor, [[each] for each in digits])
    assert min(found.values()) >= 0.9, found


def test_it_looks_at_the_picture(recipe: ModuleType, tiny: Any, processor: Processor) -> None:
    """With the pictures exchanged the answers are exchanged: they come from nowhere else."""
    model, digits = tiny[0], recipe.read_digits()[1]
    zero, one = (next(each for each in digits if each.name == name) for name in (0, 1))
    inputs = processor.apply_chat_template(
        [[recipe.message(recipe.drawn([each]), 1)] for each in (zero, one)], add_generation_prompt=True
    )
    turned = {**inputs, "pixel_values": inputs["pixel_values"].view(2, 16, -1).flip(0).flatten(0, 1)}
    length = inputs["input_ids"].shape[1]
    replies = (model.generate(**each, max_new_tokens=12)[:, length:] for each in (inputs, turned))
    said, other = ([processor.parse(row).content for row in rows] for rows in replies)
    assert said == [recipe.named([zero]), recipe.named([one])] and other == said[::-1]


def test_rows_of_digits_are_read_and_a_second_turn_sees_its_own_picture(
    recipe: ModuleType, tiny: Any, processor: Processor, record: dict[str, Any]
) -> None:
    assert record["held_out"]["rows_of_digits_right"]["float32"] >= 0.85
    digits = recipe.read_digits()[1]
    assert recipe.right(tiny[0], processor, [digits[start : start + 3] for start in range(0, 60, 3)]) >= 0.75


def test_a_conversation_on_the_command_line(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, each about a picture file of its own."""
    digits = recipe.read_digits()[1]
    for name, row in (("one", digits[:1]), ("three", digits[4:7])):
        recipe.drawn(row).save(tmp_path / f"{name}.png")
    turns = f"/image {tmp_path / 'one.png'}\nWhat do you see?\n/image {tmp_path / 'three.png'}\nRead this to me.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert main(["chat", "tiny", "--greedy"]) == 0
    assert capsys.readouterr().out.splitlines() == [recipe.named(digits[:1]), recipe.named(digits[4:7])]


def test_transformers_sees_the_same(recipe: ModuleType, tiny: Any, theirs: Any, processor: Processor) -> None:
    """The prompt, the pixels and the reply for pictures of one digit and of three."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    digits = recipe.read_digits()[1]
    pictures = [recipe.drawn(digits[:1]), recipe.drawn(digits[4:7])]
    chats = [[recipe.message(picture, 0)] for picture in pictures]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(TINY)(pictures, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], pixels["image_grid_thw"])
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for chat in chats:
        text = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ours = tiny[0].generate(**inputs, max_new_tokens=24)
    assert torch.equal(ours, theirs.generate(**inputs, max_new_tokens=24, do_sample=False))


def test_the_recipe_runs(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps on the excerpt: a checkpoint that loads, judged as recorded."""
    out = tmp_path / "out"
    flags = ["--vocab", "320", "--steps", "5", "--rows", "2", "--length", "65", "--chats", "3", "--report", "1"]
    learnt, kept = recipe.read_digits()
    monkeypatch.setattr(recipe, "read_digits", lambda: (learnt[:20], kept[:25]))
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--text", str(EXCERPT), "--out", str(out), *flags])
    recipe.main()
    model, tokenizer = qwen35moe.load(out)
    assert model.dtype == torch.bfloat16 and isinstance(model, Qwen3_5MoeForConditionalGeneration)
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id(recipe.TURN_END), 0) and tokenizer.token_to_id(recipe.END) == 0
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in record["curve"]] == [0, 1, 2, 3, 4, 5]
    held_out = recipe.read_text(EXCERPT).held_out
    found = recipe.judge(model, recipe.encode(recipe.Tokenizer.from_file(str(out / "tokenizer.json")), held_out))
    assert round(found.bits_per_byte, 4) == record["held_out"]["bits_per_byte"]["bfloat16"]


def test_the_labels_are_what_the_assistant_says(recipe: ModuleType, processor: Processor) -> None:
    digits = recipe.read_digits()[0]
    shown = [digits[:1], digits[1:4]]
    talk = [
        each
        for number, row in enumerate(shown)
        for each in (recipe.message(recipe.drawn(row), number), {"role": "assistant", "content": recipe.named(row)})
    ]
    ids = processor.apply_chat_template([talk, talk[:2]])["input_ids"]  # the second row is padded
    labels = recipe.replies(ids, processor)
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    first, second = "A handwritten 0.<|im_end|>", "The handwritten digits 1, 2 and 3.<|im_end|>"
    assert [processor.tokenizer.decode(row[row != -100]) for row in labels] == [first + second, first]


def test_the_example_shows_held_out_digits(recipe: ModuleType) -> None:
    from PIL import Image

    picture = recipe.drawn(recipe.read_digits()[1][recipe.EXAMPLE])
    assert Image.open(TINY / "example.png").tobytes() == picture.tobytes() and picture.size == (96, 32)


def test_a_text_splits_at_documents_or_else_at_a_line(recipe: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\f".join(f"document {i}\nends" for i in range(40)), encoding="utf-8")
    split = recipe.read_text(file)
    assert len(split.train) == 38 and split.held_out == ["document 38\nends", "document 39\nends"]
    file.write_text("".join(f"line {i:03d}\n" for i in range(100)), encoding="utf-8")
    split = recipe.read_text(file)
    assert len(split.train) == len(split.held_out) == 1 and split.held_out[0].startswith("line ")
    assert split.train[0] + "\n" + split.held_out[0] == file.read_text(encoding="utf-8").strip()
