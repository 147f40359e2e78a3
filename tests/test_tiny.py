"""The bundled checkpoint: the numbers of its README and training.json, and equal results in transformers.

`data/held_out.txt` is every tenth chapter of the held-out text, separated by form feeds; the held-out digits come from
scikit-learn.
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
BITS_PER_BYTE = 1.5  # on the held-out text, as in the README (the target was 1.9)
ACCURACY = 0.95  # on the held-out digits, as in the README (the target was 0.9)
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The training recipe as a module; its functions evaluate the checkpoint as in training."""
    spec = importlib.util.spec_from_file_location("train_tiny", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Tokenizer]:
    """The checkpoint in float32."""
    return qwen35moe.load("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' model of the checkpoint in float32."""
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
    """The stored tenth of the held-out text as documents of token ids."""
    texts = EXCERPT.read_text(encoding="utf-8").split("\f")
    return recipe.encode(recipe.Tokenizer.from_file(str(TINY / "tokenizer.json")), [text.strip() for text in texts])


def test_the_folder_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(sizes.values()) <= 8_000_000, sizes
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"chat_template.jinja", "preprocessor_config.json"}
    assert expected | {"training.json", "README.md", "example.png"} == set(sizes)


def test_it_has_the_architecture_of_the_family(tiny: tuple[Qwen3_5MoeForConditionalGeneration, Tokenizer]) -> None:
    assert isinstance(tiny[0], Qwen3_5MoeForConditionalGeneration) and tiny[0].visual.config.depth >= 2
    text = tiny[0].config.text_config
    assert text.layer_types == ("linear_attention", "linear_attention", "linear_attention", "full_attention")
    assert text.num_experts >= 16 and text.num_experts_per_tok == 4 and text.shared_expert_intermediate_size > 0
    assert text.vocab_size % 64 == 0


def test_stored_dtypes_equal_published_checkpoints() -> None:
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
    result = recipe.judge(model, excerpt)
    whole = record["held_out"]["bits_per_byte"][str(dtype).removeprefix("torch.")]
    assert whole <= BITS_PER_BYTE
    assert abs(result.bits_per_byte - whole) < 0.02  # measured: 0.007, since the excerpt is a tenth
    assert (result.load * result.load.shape[1]).min() >= 0.25


def test_the_recurrent_state_matters(recipe: ModuleType, excerpt: Any) -> None:
    """Clearing the delta rule's state at every token raises the loss."""
    model = Qwen3_5MoeForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    baseline = recipe.judge(model, excerpt[:2]).bits_per_byte
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.A_log.fill_(10)
    assert recipe.judge(model, excerpt[:2]).bits_per_byte > baseline + 0.05


def test_the_learning_curve_is_recorded(record: dict[str, Any]) -> None:
    curve, held_out = record["curve"], record["held_out"]
    assert len(curve) >= 10 and isinstance(record["settings"]["seed"], int)
    losses = [point["train_loss"] for point in curve if point.get("train_loss") is not None]
    assert losses[-1] < losses[0] - 2
    assert min(map(min, held_out["load_of_even_share"])) >= 0.25


def test_transformers_generates_the_same_64_tokens(
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
def test_accuracy_on_held_out_digits(
    recipe: ModuleType, processor: Processor, record: dict[str, Any], dtype: str
) -> None:
    model, (training, digits) = Qwen3_5MoeForConditionalGeneration.from_pretrained(TINY, dtype=dtype), recipe.read_digits()
    assert len(digits) == 359 and not any((digits[0].ink == digit.ink).all() for digit in training)
    accuracy = recipe.right(model, processor, [[digit] for digit in digits])
    # Other machines round differently: the recorded accuracy is met within 0.01.
    assert accuracy >= ACCURACY and abs(accuracy - record["held_out"]["digits_right"][dtype]) < 0.01


@pytest.mark.slow
def test_accuracy_on_resized_digits(recipe: ModuleType, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stored, 8 x 8 and light on dark; and enlarged with two filters. The README has the accuracies."""
    from PIL import Image

    model, digits = Qwen3_5MoeForConditionalGeneration.from_pretrained(TINY), recipe.read_digits()[1]
    accuracies = {}
    for side, light, coarse in ((8, True, False), (28, True, False), (64, False, True), (200, True, True)):

        def drawn(row: Any, side: int = side, light: bool = light, coarse: bool = coarse) -> Any:
            ink = (torch.from_numpy(row[0].ink) * 255 / 16).byte()
            image = Image.fromarray((ink if light else 255 - ink).numpy())
            return image.resize((side, side), Image.Resampling.NEAREST if coarse else Image.Resampling.BICUBIC)

        monkeypatch.setattr(recipe, "drawn", drawn)
        accuracies[side] = recipe.right(model, processor, [[digit] for digit in digits])
    assert min(accuracies.values()) >= 0.9, accuracies


def test_exchanged_images_exchange_the_replies(recipe: ModuleType, tiny: Any, processor: Processor) -> None:
    """The replies depend on nothing but the pixels."""
    model, digits = tiny[0], recipe.read_digits()[1]
    zero, one = (next(digit for digit in digits if digit.name == name) for name in (0, 1))
    inputs = processor.apply_chat_template(
        [[recipe.message(recipe.drawn([digit]), 1)] for digit in (zero, one)], add_generation_prompt=True
    )
    exchanged = {**inputs, "pixel_values": inputs["pixel_values"].view(2, 16, -1).flip(0).flatten(0, 1)}
    length = inputs["input_ids"].shape[1]
    replies = (model.generate(**batch, max_new_tokens=12)[:, length:] for batch in (inputs, exchanged))
    first, second = ([processor.parse(row).content for row in rows] for rows in replies)
    assert first == [recipe.named([zero]), recipe.named([one])] and second == first[::-1]


def test_accuracy_on_rows_of_digits_in_conversations(
    recipe: ModuleType, tiny: Any, processor: Processor, record: dict[str, Any]
) -> None:
    assert record["held_out"]["rows_of_digits_right"]["float32"] >= 0.85
    digits = recipe.read_digits()[1]
    assert recipe.right(tiny[0], processor, [digits[start : start + 3] for start in range(0, 60, 3)]) >= 0.75


def test_parts_without_a_type_are_text_and_others_are_named(recipe: ModuleType, processor: Processor) -> None:
    """A string, a text without a type, and what the template cannot read: the error says what that is."""
    assert recipe.CHAT_TEMPLATE == (TINY / "chat_template.jinja").read_text()

    def text(*parts: Any) -> str:
        return processor.apply_chat_template([{"role": "user", "content": list(parts)}], tokenize=False)

    written = text({"type": "text", "text": "Read this."})
    assert "Read this." in written and text("Read this.") == written == text({"text": "Read this."})
    with pytest.raises(ValueError, match="this checkpoint reads text and images, not video"):
        text({"type": "video", "video": "a.mp4"})
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(Exception, match="this checkpoint reads text and images, not a part without a type"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"words": "Read this."}]}], tokenize=False)


def test_a_conversation_on_the_command_line(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, each with an image file."""
    digits = recipe.read_digits()[1]
    for name, row in (("one", digits[:1]), ("three", digits[4:7])):
        recipe.drawn(row).save(tmp_path / f"{name}.png")
    turns = f"/image {tmp_path / 'one.png'}\nWhat do you see?\n/image {tmp_path / 'three.png'}\nRead this to me.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert main(["chat", "tiny", "--greedy"]) == 0
    assert capsys.readouterr().out.splitlines() == [recipe.named(digits[:1]), recipe.named(digits[4:7])]


def test_transformers_gives_equal_pixels_and_replies(recipe: ModuleType, tiny: Any, theirs: Any, processor: Processor) -> None:
    """For images of one digit and of three."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    digits = recipe.read_digits()[1]
    images = [recipe.drawn(digits[:1]), recipe.drawn(digits[4:7])]
    chats = [[recipe.message(image, 0)] for image in images]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(TINY)(images, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], pixels["image_grid_thw"])
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for chat in chats:
        text = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ours = tiny[0].generate(**inputs, max_new_tokens=24)
    assert torch.equal(ours, theirs.generate(**inputs, max_new_tokens=24, do_sample=False))


@pytest.mark.slow
def test_the_recipe_runs(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps on the excerpt give a checkpoint that loads and has the recorded loss."""
    out = tmp_path / "out"
    flags = ["--vocab", "320", "--steps", "5", "--rows", "2", "--length", "65", "--chats", "3", "--report", "1"]
    training, held_out_digits = recipe.read_digits()
    monkeypatch.setattr(recipe, "read_digits", lambda: (training[:20], held_out_digits[:25]))
    monkeypatch.setattr("sys.argv", ["train_tiny.py", "--text", str(EXCERPT), "--out", str(out), *flags])
    recipe.main()
    model, tokenizer = qwen35moe.load(out)
    assert model.dtype == torch.bfloat16 and isinstance(model, Qwen3_5MoeForConditionalGeneration)
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id(recipe.TURN_END), 0) and tokenizer.token_to_id(recipe.END) == 0
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in record["curve"]] == [0, 1, 2, 3, 4, 5]
    held_out = recipe.read_text(EXCERPT).held_out
    result = recipe.judge(model, recipe.encode(recipe.Tokenizer.from_file(str(out / "tokenizer.json")), held_out))
    assert round(result.bits_per_byte, 4) == record["held_out"]["bits_per_byte"]["bfloat16"]


def test_labels_are_the_assistant_messages(recipe: ModuleType, processor: Processor) -> None:
    digits = recipe.read_digits()[0]
    rows = [digits[:1], digits[1:4]]
    conversation = [
        message
        for number, row in enumerate(rows)
        for message in (recipe.message(recipe.drawn(row), number), {"role": "assistant", "content": recipe.named(row)})
    ]
    ids = processor.apply_chat_template([conversation, conversation[:2]])["input_ids"]  # the second row is padded
    labels = recipe.replies(ids, processor)
    labelled = labels != -100
    assert torch.equal(labels[labelled], ids[labelled])
    first, second = "A handwritten 0.<|im_end|>", "The handwritten digits 1, 2 and 3.<|im_end|>"
    assert [processor.tokenizer.decode(row[row != -100]) for row in labels] == [first + second, first]


def test_the_example_image_contains_held_out_digits(recipe: ModuleType) -> None:
    from PIL import Image

    image = recipe.drawn(recipe.read_digits()[1][recipe.EXAMPLE])
    assert Image.open(TINY / "example.png").tobytes() == image.tobytes() and image.size == (96, 32)


def test_the_held_out_split_is_at_a_document_or_a_line(recipe: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\f".join(f"document {i}\nends" for i in range(40)), encoding="utf-8")
    split = recipe.read_text(file)
    assert len(split.train) == 38 and split.held_out == ["document 38\nends", "document 39\nends"]
    file.write_text("".join(f"line {i:03d}\n" for i in range(100)), encoding="utf-8")
    split = recipe.read_text(file)
    assert len(split.train) == len(split.held_out) == 1 and split.held_out[0].startswith("line ")
    assert split.train[0] + "\n" + split.held_out[0] == file.read_text(encoding="utf-8").strip()
