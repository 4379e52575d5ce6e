"""Folders as sources of rows, and what a job with images may say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import tasks
from launcher.cli.display import Display
from launcher.data.files import find_files
from launcher.data.folder import IMAGES, FileColumn, FileColumnIfThere, read_folder, with_places
from launcher.data.rows import RowProblem
from launcher.data.sample import look
from launcher.data.section import Source
from launcher.errors import ConfigurationError, DataError
from launcher.job.load import load
from launcher.launch.prepare_data import look as inspect_data
from launcher.planner.search import plan_job
from tests.unit.test_planning_decide import CPU

COLUMNS = (FileColumnIfThere("file_name", IMAGES), FileColumnIfThere("image", IMAGES), "label")


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


def test_a_folders_files_are_rows_and_its_sub_folders_their_labels(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, "dog/b.JPG", "cat/inner/a.png", "top.png", ".hidden.png", "cat/Thumbs.db", "dog/n.txt"
    )
    rows = [values for _, values in read_folder(folder, COLUMNS)]
    assert rows[:2] == [
        {"file_name": "cat/inner/a.png", "label": "cat"},
        {"file_name": "dog/b.JPG", "label": "dog"},
    ]
    assert isinstance(rows[2], RowProblem) and "dog/n.txt: its name ends like none of" in rows[2].detail
    assert rows[3] == {"file_name": "top.png"}
    seen = look(Source(path=str(folder)), COLUMNS)
    assert (seen.num_rows, len(seen.rows)) == (4, 4)


def test_a_metadata_file_says_what_a_folder_holds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train/a.png", "metadata.jsonl")
    assert find_files(str(folder), columns=COLUMNS) == [folder / "metadata.jsonl"]
    folder_of(folder, "metadata.csv")
    with pytest.raises(DataError, match=r"has metadata\.jsonl and metadata\.csv; name the one that is meant"):
        find_files(str(folder), columns=COLUMNS)
    with pytest.raises(DataError, match="is a directory; name its files"):
        find_files(str(folder))
    with pytest.raises(DataError, match="is a directory; name its files"):
        list(read_folder(folder, ("text",)))


def test_paths_are_relative_to_the_file_that_they_stand_in(tmp_path: Path) -> None:
    column = (FileColumn("image", IMAGES),)
    for value, wanted in (
        ("a/b.png", str(tmp_path / "a/b.png")), ("/x/b.png", "/x/b.png"), (b"bytes", b"bytes"),
        ({"bytes": b"bytes", "path": "b.png"}, b"bytes"), ({"path": "b.png"}, str(tmp_path / "b.png")), (None, None),
    ):  # fmt: skip
        assert with_places({"image": value, "n": 1}, column, tmp_path) == {"image": wanted, "n": 1}


def job_of(tmp_path: Path, **data: Any) -> Path:
    folder_of(tmp_path, "train/cat/a.png", "train/dog/b.png", "splits/train/a.png", "splits/test/b.png")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    content = {
        "name": "images",
        "model": {"name": "org/vit", "task": "image-classification", "config": {"model_type": "vit"}},
        "data": {"train": {"path": "train"}, **data},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_job_with_a_folder_is_planned(tmp_path: Path) -> None:
    plan = plan_job(load(job_of(tmp_path)), hardware=CPU)
    assert (plan.task, plan.layout, plan.attention, plan.data.max_length) == (
        "image-classification", "padded", "sdpa", 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"path": "splits"}}, "holds splits (test, train), not classes; name one of them"),
        ({"augmentation": {}}, "names no alteration; there are random_crop"),
        ({"max_length": 512}, "data.max_length"),
        ({"text": "text"}, "data.text = 'text': belongs to causal-lm"),
        ({"augmentation": {"flip": 0.5}}, "data.augmentation.flip"),
        ({"augmentation": {"mixup_alpha": 0}}, "data.augmentation.mixup_alpha = 0"),
        ({"augmentation": {"mix_probability": 0.5}}, "add mixup_alpha or cutmix_alpha"),
        (
            {"augmentation": {"mixup_alpha": 0.2}, "problem": "regression"},
            "data.augmentation.mixup_alpha = 0.2: mixes classes, and a regression has none",
        ),
        (
            {"augmentation": {"cutmix_alpha": 1.0}, "focal_gamma": 2.0},
            "data.augmentation.cutmix_alpha = 1.0: gives an image two classes",
        ),
    ],
)
def test_what_makes_no_sense_of_images_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(job_of(tmp_path, **data))
    assert message in str(caught.value)


def test_an_alteration_without_its_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job_of(tmp_path, augmentation={"rand_augment": [2, 9], "horizontal_flip": 0.5})
    load(path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else found(name))
    with pytest.raises(ConfigurationError, match=r"rand_augment.*pip install 'finetune-launcher\[image\]'"):
        load(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sheet.jpg", {}, "is written as PNG; name a file that ends in .png"),
        ("not/there.png", {}, "there is no folder"),
        ("sheet.png", {"row": 2}, "of all rows; leave --row out"),
        ("sheet.png", {"source": "old"}, "of all rows; leave --source out"),
        ("sheet.png", {"num_rows": 0}, "has no samples by --rows 0"),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_before_rows_are_read(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    asked = {"row": None, "source": None, "num_rows": 3} | options
    with pytest.raises(ConfigurationError) as caught:
        inspect_data(
            load(job_of(tmp_path)), "train", 3, asked["row"], False, Display(quiet=True), asked["source"],
            (tmp_path / name, asked["num_rows"]),
        )  # fmt: skip
    assert message in str(caught.value)


def test_a_sheet_of_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "job.yaml"
    data = {"train": {"path": "rows.jsonl"}, "text": "text"}
    path.write_text(yaml.safe_dump({"name": "texts", "model": {"name": "org/m"}, "data": data}))
    sheet = tmp_path / "sheet.png", 3
    with pytest.raises(
        ConfigurationError, match=r"rows of a causal-lm job are not drawn; those of .*image-to-text"
    ):
        inspect_data(load(path), "train", 3, None, False, Display(quiet=True), None, sheet)


def test_a_model_that_sees_no_images_is_refused(tmp_path: Path) -> None:
    path = job_of(tmp_path)
    with pytest.raises(ConfigurationError, match="a llama model cannot do image-classification"):
        plan_job(load(path, ["model.config.model_type=llama"]), hardware=CPU)


def captions_of(tmp_path: Path, **data: Any) -> Path:
    path = job_of(tmp_path, **data)
    job = yaml.safe_load(path.read_text())
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    config = {"model_type": "vision-encoder-decoder", **parts}
    job["model"] = {"name": "org/writes", "task": "image-to-text", "config": config}
    path.write_text(yaml.safe_dump(job))
    row = {"file_name": "cat/a.png", "text": "a cat", "references": ["a cat", "the cat"]}
    (tmp_path / "train" / "metadata.jsonl").write_text(f"{json.dumps(row)}\n")
    return path


@pytest.mark.parametrize(
    ("encoder", "attention"), [("vit", "sdpa"), ("donut-swin", "eager"), ("hiera", "eager")]
)
def test_a_job_that_writes_about_images_is_planned(encoder: str, attention: str, tmp_path: Path) -> None:
    path = captions_of(tmp_path, references="references", evaluation={"path": "train"})
    overrides = [f"model.config.encoder.model_type={encoder}", "evaluation.generate=true"]
    job = load(path, overrides)
    plan = plan_job(job, hardware=CPU)
    assert (plan.task, plan.layout, plan.attention) == ("image-to-text", "padded", attention)
    task = tasks.of_job(job)
    assert {"loss", "rougeL", "exact_match"} <= set(task.metrics) and task.sample_lengths([], 0) == [1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "pix2struct",
            r"its images are cut into patches .*; vision-encoder-decoder models can \(TrOCR, .*, and blip and git",
        ),
        ("mllama", r"launcher does not make what it reads beside an image \(a prompt, a chat\)"),
        ("qwen2_vl", "what it reads beside an image is a chat, as the task image-text-to-text has it"),
        ("vit", "a vit model cannot do image-to-text; it can do image-classification; 3 other types"),
    ],
)
def test_a_model_that_cannot_write_about_an_image_alone_is_refused(
    kind: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        plan_job(load(captions_of(tmp_path), [f"model.config.model_type={kind}"]), hardware=CPU)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"label": "x"}, "data.label = 'x': belongs to audio-classification"),
        ({"max_target_length": 4}, "data.max_target_length"),
        ({"augmentation": {}}, "names no alteration"),
        ({"augmentation": {"mixup_alpha": 0.2}}, "data.augmentation.mixup_alpha"),
        ({"packing": True}, "only language models pack"),
    ],
)
def test_what_makes_no_sense_of_captions_is_refused(
    data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(captions_of(tmp_path, **data))
    assert message in str(caught.value)


def sounds_of(tmp_path: Path, **data: Any) -> Path:
    folder_of(tmp_path, "train/yes/a.wav", "train/no/b.mp3", "train/no/c.flac", "train/no/d.ogg")
    model = {"name": "org/heard", "task": "audio-classification", "config": {"model_type": "wav2vec2"}}
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({"name": "sounds", "model": model, "data": {"train": {"path": "train"}, **data}})
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "layout", "micro"),
    [
        ((), "single", 1),
        (("model.config.feat_extract_norm=layer",), "padded", None),
        (("data.pad_to_seconds=true",), "padded", None),
        (("model.config.model_type=whisper",), "padded", None),
        (("model.config.model_type=wavlm",), "single", 1),
    ],
)
def test_the_layout_of_clips_hangs_on_the_models_normalization(
    overrides: tuple[str, ...], layout: str, micro: int | None, tmp_path: Path
) -> None:
    plan = plan_job(load(sounds_of(tmp_path), list(overrides)), hardware=CPU)
    assert (plan.task, plan.layout, plan.data.max_length) == ("audio-classification", layout, 1)
    assert micro is None or plan.batch.micro_batch_size == micro


def speech_of(tmp_path: Path, **data: Any) -> Path:
    path = sounds_of(tmp_path, **data)
    job = yaml.safe_load(path.read_text())
    job["model"]["task"] = "speech-recognition"
    path.write_text(yaml.safe_dump(job))
    rows = [
        {"file_name": f"{name}/{number}", "text": "yes"}
        for name, number in (("yes", "a.wav"), ("no", "b.mp3"))
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ((), "single"),
        (("model.config.feat_extract_norm=layer",), "padded"),
        (("data.pad_to_seconds=true",), "padded"),
        (("model.config.model_type=wav2vec2-bert",), "padded"),
        (("model.config.model_type=whisper",), "padded"),
    ],
)
def test_the_layout_of_speech_hangs_on_the_model(
    overrides: tuple[str, ...], layout: str, tmp_path: Path
) -> None:
    plan = plan_job(load(speech_of(tmp_path), list(overrides)), hardware=CPU)
    assert (plan.task, plan.layout, plan.data.max_length) == ("speech-recognition", layout, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("moonshine", "launcher knows what Whisper's is told, and no other's"),
        ("parakeet_ctc", "its class does not say how many frames a clip has"),
        (
            "audio-spectrogram-transformer",
            "model cannot do speech-recognition; it can do audio-classification",
        ),
    ],
)
def test_a_model_that_cannot_write_down_speech_is_refused(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        plan_job(load(speech_of(tmp_path), [f"model.config.model_type={kind}"]), hardware=CPU)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"too_long": "cut"}, "data.too_long"),
        ({"label": "x"}, "data.label = 'x': belongs to audio-classification"),
        ({"case": "title"}, "data.case"),
        ({"language": "en", "vocabulary": "text"}, "data.language = 'en': is for a model that writes"),
    ],
)
def test_what_makes_no_sense_of_speech_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(speech_of(tmp_path, **data))
    assert message in str(caught.value)


def test_speech_needs_the_package_that_counts_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = speech_of(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jiwer" else found(name))
    with pytest.raises(
        ConfigurationError, match=r"the package jiwer, .*pip install 'finetune-launcher\[audio\]'"
    ):
        load(path)


def test_several_clips_of_a_group_norm_in_a_pass_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="several samples of a wav2vec2 model in one pass have another"
    ):
        plan_job(load(sounds_of(tmp_path), ["batch.micro_batch_size=4"]), hardware=CPU)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seconds": 0}, "data.seconds"),
        ({"cut_at": "end"}, "data.cut_at"),
        ({"image_size": 32}, "data.image_size = 32: belongs to image-classification"),
        ({"label": None}, "data.label"),
    ],
)
def test_what_makes_no_sense_of_sounds_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(sounds_of(tmp_path, **data))
    assert message in str(caught.value)


def test_sounds_without_the_packages_that_decode_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sounds_of(tmp_path)
    load(path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "soxr" else found(name))
    with pytest.raises(
        ConfigurationError, match=r"the package soxr, .*pip install 'finetune-launcher\[audio\]'"
    ):
        load(path)
