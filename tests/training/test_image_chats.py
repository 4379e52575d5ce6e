"""Chats with images: what becomes of a row, and that the numbers are transformers' own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from launcher.data.rows import RowProblem
from launcher.errors import ConfigurationError, DataError
from launcher.tasks.chat_processor import together
from launcher.tasks.generation import Evaluation, Generate
from launcher.tasks.image_text_to_text import ImageTextToText
from launcher.tasks.task import IGNORE, KEEPS_LOSSES, AnswerOptions, Sample
from launcher.training import generating
from launcher.training.by_source import losses_of_samples
from launcher.training.data.prepare import prepare
from launcher.training.model.pretrained import read_processor
from launcher.training.tracing.make_profile import make_profile
from tests.distributed.test_data_inspect import inspected, learned
from tests.families.image_chats import rows_of, samples_of, task_of
from tests.training.image_chats import chat, chats_of, model_directory, plan_of

KINDS = ("gemma3", "idefics3", "llava")
"""Types whose whole processor transformers makes without torchvision, to compare with."""
LOOK = {"type": "text", "text": "what colour is it ?"}
RED = {"role": "assistant", "content": "it is red"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: model_directory(tmp_path_factory.mktemp(kind), kind) for kind in (*KINDS, "qwen2_vl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures."""
    path = tmp_path_factory.mktemp("pictures")
    rows_of(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def asked(*parts: Any, answer: dict[str, Any] = RED, **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, answer], **row}


def image(folder: Path, number: int = 0) -> dict[str, str]:
    return {"type": "image", "image": str(folder / f"{number}.png")}


def why(task: ImageTextToText, row: dict[str, Any]) -> str:
    """Why a row cannot be used, which it cannot."""
    [one] = task.encode([row], None)
    assert isinstance(one, RowProblem)
    return str(one)


def told(task: ImageTextToText, sample: Sample) -> list[str]:
    """The tokens that are learned."""
    return task.tokenizer.convert_ids_to_tokens(sample["targets"][sample["targets"] != IGNORE])


# The loss.


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_pixels_and_loss_are_those_of_the_processor_and_the_class(
    kind: str, models: dict[str, Path], folder: Path
) -> None:
    """By the processor's own `apply_chat_template`; of the template that marks turns itself, its marks too."""
    task, own = task_of(models[kind]), AutoProcessor.from_pretrained(models[kind])
    model = AutoModelForImageTextToText.from_pretrained(models[kind], attn_implementation="eager").eval()
    rows, losses = rows_of(folder), []
    samples = samples_of(task, rows)
    for row, sample in zip(rows, samples, strict=True):
        chats = [
            {**message, "content": [LOOK | {"text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in row["messages"]
        ]
        marks = {"return_assistant_tokens_mask": True} if kind == "llava" else {}
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **marks}
        inputs = own.apply_chat_template(chats, **options)
        plain = task.plain_batch(sample)
        assert plain is not None
        if marks:
            assert (plain["labels"] != IGNORE).long().tolist() == inputs.pop("assistant_masks").tolist()
        inputs.pop("attention_mask")
        assert set(plain) == {*inputs, "labels"}
        for name, value in inputs.items():
            assert torch.equal(torch.as_tensor(value), plain[name]), name
        count = int((plain["labels"] != IGNORE).sum())
        losses.append(float(model(**inputs, labels=plain["labels"]).loss.detach()) * count)
    batch = task.collate([[one] for one in (*samples, samples[0].as_filler())])
    output = task.loss(model, batch | {KEEPS_LOSSES: True})
    assert float(output.loss_sum.detach()) == pytest.approx(sum(losses), rel=1e-6)
    each = losses_of_samples(output, batch, [*samples, samples[0].as_filler()])
    assert each.tolist() == pytest.approx([*losses, 0.0], rel=1e-5)


def test_what_the_assistant_says_is_learned_and_no_image(models: dict[str, Path], folder: Path) -> None:
    """In its own turn too; a turn of weight 0 is not."""
    task = task_of(models["qwen2_vl"])
    shown = {"role": "assistant", "content": [{"type": "text", "text": "look"}, image(folder)]}
    row = asked(LOOK, answer=shown)
    row["messages"] += [{"role": "user", "content": "which ?"}, RED | {"weight": 0}]
    [sample] = samples_of(task, [row])
    tokens = told(task, sample)
    assert tokens == ["look", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"]


def test_a_batch_without_an_image_has_a_row_of_filler_with_one(models: dict[str, Path], folder: Path) -> None:
    """So that all ranks go through the same layers; it counts nowhere."""
    task = task_of(models["gemma3"])
    model = AutoModelForImageTextToText.from_pretrained(models["gemma3"]).eval()
    rows = [asked(LOOK), asked({"type": "text", "text": "which ?"})]
    samples = samples_of(task, rows)
    batch = task.collate([[one] for one in samples])
    assert len(batch["input_ids"]) == 3 and len(batch["pixel_values"]) == 1
    output = task.loss(model, batch | {KEEPS_LOSSES: True})
    answers = task.answers(output, batch, samples, AnswerOptions())
    assert [one["tokens"] for one in answers] == [4, 4]
    each = losses_of_samples(output, batch, samples).tolist()
    assert [one["log_probability"] for one in answers] == pytest.approx([-loss for loss in each])
    output.loss_sum.backward()
    tower = [part for name, part in model.named_parameters() if "vision_tower.encoder" in name]
    assert tower and all(part.grad is not None and not part.grad.any() for part in tower)


def test_the_check_sees_an_image_whole(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["idefics3"])
    for row, numbers in zip(rows_of(folder), (1, 1, 0, 1), strict=True):
        [sample] = samples_of(task, [row])
        short = task.shortened(sample, 7, [])
        first = int(sample["image_ends"][0]) if numbers else 0
        assert short.length <= first + 7 and len(short["media_ends"]) == numbers
        assert np.array_equal(short["input_ids"][:first], sample["input_ids"][:first])
        assert told(task, short) == told(task, sample)[-len(told(task, short)) :] != []
        model = AutoModelForImageTextToText.from_pretrained(models["idefics3"]).eval()
        plain = task.plain_batch(short)
        assert plain is not None
        loss = model(**plain).loss * (plain["labels"] != IGNORE).sum()
        ours = task.loss(model, task.collate([[sample.as_filler()], [short]])).loss_sum
        assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_it_writes_what_its_own_generate_does(kind: str, models: dict[str, Path], folder: Path) -> None:
    """Each chat alone by its class, all in one batch here; a batch without an image has a prompt more."""
    task = task_of(models[kind])
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=5))
    model = AutoModelForImageTextToText.from_pretrained(models[kind]).eval()
    model.generation_config.eos_token_id = None
    task.configure_generation(model.generation_config)
    assert set(task.end_tokens) <= {*model.generation_config.eos_token_id}
    samples = samples_of(task, rows_of(folder))
    arguments = {"max_new_tokens": 5, "do_sample": False}
    own = []
    for sample in samples:
        plain = task.plain_batch(task._at(sample, np.arange(task_asked(sample)), len(sample["image_ends"])))
        assert plain is not None
        del plain["labels"]
        written = model.generate(**plain, **arguments)[0, plain["input_ids"].shape[1] :]
        own.append(task.decode(written.numpy()))
    model.forward = functools.partial(task.loss, model)
    for part in (samples, samples[2:3]):
        batch = task.prompts(part)
        written = generating.generate(model, batch, task.generation, lambda: False, synced=False)
        texts = [task.decode(ids) for ids in written[: len(part)].numpy()]
        assert texts == (own if len(part) > 1 else own[2:3])
    assert len(written) == 2


def task_asked(sample: Sample) -> int:
    """Where the assistant's last turn begins."""
    learned = np.flatnonzero(sample["targets"] != IGNORE)
    return int(learned[np.flatnonzero(np.diff(learned, prepend=-9) > 1)[-1]]) + 1


# What becomes of a row.


def test_every_form_of_a_row_is_the_same_sample(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["gemma3"])
    paths = [str(folder / f"{number}.png") for number in (0, 2)]
    text = [{"type": "text", "text": piece} for piece in ("look ", " and ", " ?")]
    images = [{"type": "image", "image": path} for path in paths]
    parts = [text[0], images[0], text[1], images[1], text[2]]
    [right] = samples_of(task, [asked(*parts)])
    flat = {"messages": [{"role": "user", "content": "look <image> and <image> ?"}, RED], "images": paths}
    places = [{"type": "image"} if part in images else part for part in parts]
    opened = [{"type": "image_url", "image_url": {"url": path}} for path in paths]
    others = [
        flat,
        {**flat, "messages": json.dumps(flat["messages"]), "images": json.dumps(paths)},
        asked(*places, images=paths),
        asked(text[0], {"type": "image", "path": paths[0]}, text[1], opened[1], text[2]),
        asked(text[0], images[0], {"type": "text", "text": " and <image> ?"}, images=paths[1:]),
    ]
    for row in others:
        [sample] = samples_of(task, [row])
        assert sample.keys() == right.keys()
        assert all(np.array_equal(sample[name], right[name]) for name in right)
    one = {"messages": [{"role": "user", "content": "look <image>"}, RED], "images": paths[0]}
    assert len(samples_of(task, [one])[0]["image_ends"]) == 1


def test_bytes_in_a_table_are_the_same_samples(models: dict[str, Path], cache: Path) -> None:
    """Of parts, and of a list beside them; paths are relative to the file that they stand in."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    file = chats_of(cache / "rows", 4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def filled(path: str) -> dict[str, Any]:
        return {"bytes": (file.parent / path).read_bytes(), "path": path}

    for row in rows:
        row["images"] = [filled(path) for path in row.get("images", [])]
        for message in row["messages"]:
            parts = (
                message["content"]
                if isinstance(message["content"], list)
                else [LOOK | {"text": message["content"]}]
            )
            message["content"] = [
                {**part, "image": filled(part["image"])} if "image" in part else part for part in parts
            ]
    parquet.write_table(pa.Table.from_pylist(rows), cache / "rows.parquet")
    batches = []
    for source in (file, cache / "rows.parquet"):
        plan = plan_of(models["gemma3"], source)
        task, processor = task_of(models["gemma3"]), read_processor(plan)
        dataset = prepare(plan.data.train, "train", plan, task, processor)
        assert dataset.report.rows_used == 4, dataset.report.examples
        batches.append(task.collate([dataset.item(number) for number in range(4)]))
    assert batches[0].keys() == batches[1].keys()
    for name in ("input_ids", "targets", "pixel_values", "token_type_ids"):
        assert torch.equal(batches[0][name], batches[1][name]), name


def test_rows_that_cannot_be_used_say_why(models: dict[str, Path], folder: Path) -> None:
    task, one = task_of(models["llava"]), image(folder)
    missing = {"type": "image", "image": str(folder / "none.png")}
    assert why(task, asked(missing, LOOK)) == f"missing key: {folder.name}/none.png: no such file"
    with pytest.raises(RowProblem, match="no such file; paths are relative to the file that names them"):
        task.texts(asked(missing, LOOK))
    (folder / "text.png").write_text("no image")
    assert "not an image that Pillow reads" in why(
        task, asked(one | {"image": str(folder / "text.png")}, LOOK)
    )
    places = "the messages have {} places for them (<image>, or parts of type image without a file)"
    flat = {"messages": [{"role": "user", "content": "<image> <image> ?"}, RED]}
    assert why(task, flat | {"images": [one["image"]]}).endswith(
        f"1 images in 'images', and {places.format(2)}"
    )
    assert why(task, flat | {"images": []}).endswith(f"0 images in 'images', and {places.format(2)}")
    assert why(task, asked(one, LOOK, images=[one["image"]])).endswith(places.format(0))
    assert why(task, asked({"type": "image"}, LOOK)).endswith(f"0 images in 'images', and {places.format(1)}")
    assert why(task, asked(one, LOOK, answer={"role": "user", "content": "is it ?"})) == (
        "nothing left to learn: no message has the role 'assistant'"
    )
    assert "a part of type 'video', and such chats have text and images" in why(
        task, asked({"type": "video"})
    )
    stray = asked(one, LOOK | {"text": "<image> ?"})
    assert why(task, stray).endswith("has 2 places for images (<image>), and the row 1")
    assert "'https://a/b.png' is an address (https:), and nothing is fetched" in why(
        task, asked(one | {"image": "https://a/b.png"})
    )
    assert "'image' is a int, not a path or bytes" in why(task, asked(one | {"image": 3}))
    assert "holds U+FDD0" in why(task, asked(LOOK | {"text": "<\ufdd0>"}))
    assert why(task, {"messages": "no list"}).startswith("value that cannot be used")


def test_no_image_is_ever_cut_in_two(models: dict[str, Path], folder: Path) -> None:
    rows = rows_of(folder)
    [whole] = samples_of(task_of(models["llava"]), rows[1:2])
    begin, end = whole["image_ends"]
    for most, problem in ((end, False), (end - 1, True), (begin, True)):
        task = task_of(models["llava"], max_length=int(most))
        if problem:
            number = 1 if most < begin else 2
            reason = f"too long: {whole.length} tokens, and image {number} ends behind {most}, max_length"
            assert why(task, rows[1]) == reason
        else:
            [one] = task.encode(rows[1:2], None)
            assert isinstance(one.cut, bool) and one.cut and one.length == end
            assert told(task, Sample(one.arrays, 0, one.length)) == ["it", "is", "red", "</s>"]
    dropped = task_of(models["llava"], max_length=int(end), too_long="drop")
    assert why(dropped, rows[1]).startswith(f"too long: {whole.length} tokens")


def test_rows_to_predict_end_where_the_assistant_speaks(models: dict[str, Path], folder: Path) -> None:
    """Its own last turn is left out, with the images in it."""
    task = task_of(models["gemma3"])
    task.for_prediction, task.evaluation = True, Evaluation(generate=Generate())
    task.prepare(task.processor)
    shown = {"role": "assistant", "content": [image(folder, 1)]}
    for row in (asked(image(folder), LOOK), asked(image(folder), LOOK, answer=shown)):
        [sample] = samples_of(task, [row])
        assert len(sample["image_ends"]) == 1 and not told(task, sample)
        assert task.tokenizer.decode(sample["input_ids"]).endswith("<start_of_turn> model \n")
    prompts = task.prompts([sample])
    assert prompts["input_ids"].tolist() == [sample["input_ids"].tolist()]
    assert task.texts(row) == ["what colour is it ?", ""] and task.answer(row, [{"text": "a"}]) == {
        "text": "a"
    }


def test_a_look_at_the_data_shows_what_is_learned(models: dict[str, Path], cache: Path) -> None:
    file = chats_of(cache / "rows", 2)
    [sample, *_] = inspected(plan_of(models["llava"], file), cache)["samples"]
    assert sample["path"] == str(file.parent / "000-0.png") and sample["num_learned"] == 4
    said = "".join(text for text, is_learned in learned(sample) if is_learned)
    assert said.strip() == f"{chat(file.parent, 0)['messages'][1]['content']} </s>"


def test_a_file_that_changes_stops_the_run(models: dict[str, Path], cache: Path) -> None:
    rows = rows_of(cache)
    task = task_of(models["llava"])
    samples = samples_of(task, rows[1:2])
    (cache / "3.png").write_bytes((cache / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"3\.png changed since the data was prepared"):
        task.collate([samples])
    assert task.collate([[task._at(samples[0], np.arange(20), 1)]])["pixel_values"].shape[0] == 1


def test_arrays_of_several_sizes_stand_end_to_end() -> None:
    one, other = np.ones((1, 2, 3)), np.ones((2, 1, 4))
    joined = together([one, other])
    assert joined.shape == (3, 2, 4) and joined.sum() == one.sum() + other.sum()
    assert together([np.ones(2), np.ones(1)]).tolist() == [1, 1, 1]


# What a model must have.


def test_a_model_that_has_not_what_it_needs_is_refused(models: dict[str, Path], cache: Path) -> None:
    model = model_directory(cache / "model", "llava")
    plan = plan_of(model, cache)
    (model / "chat_template.jinja").unlink()
    task = ImageTextToText(plan.data)
    with pytest.raises(ConfigurationError, match="needs a tokenizer with a chat template"):
        task.prepare(read_processor(plan))
    (model / "processor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="no processor of its rows: its files have none"):
        read_processor(plan)
    LlamaConfig().save_pretrained(model)
    (model / "processor_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="a llama model has no processor that transformers knows"):
        read_processor(plan)
    slow = read_processor(plan_of(models["llava"], cache))
    slow.tokenizer = type("Slow", (), {"is_fast": False, "name_or_path": "slow"})()
    with pytest.raises(ConfigurationError, match="does not say where its tokens stand; take a fast one"):
        task.prepare(slow)


# The planner.


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_profile_is_made_of_an_image_with_text(kind: str, models: dict[str, Path], folder: Path) -> None:
    profile = make_profile(plan_of(models[kind], folder, precision="fp32"))
    assert not profile.untraceable and len(profile.layers) >= 4
    assert set(profile.passes) >= {"none", "full", "evaluation"}


def test_an_example_is_a_photograph_with_text(models: dict[str, Path]) -> None:
    example = task_of(models["qwen2_vl"]).example(64)
    assert example.length == 64 and len(example["image_ends"]) == 1
    assert task_of(models["llava"]).example(8).length == 18, "an image has 16 tokens"
