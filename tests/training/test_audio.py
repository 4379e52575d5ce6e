"""Sounds to classes: what is decoded, what a model hears, and that its numbers are transformers' own."""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import AutoModelForAudioClassification, LlamaConfig

from launcher.data.rows import RowProblem
from launcher.errors import ConfigurationError, DataError
from launcher.tasks import media, sounds
from launcher.tasks.audio_classification import AudioClassification
from launcher.tasks.clips import Clips, fewest_samples
from launcher.tasks.media import Content
from launcher.tasks.task import Draws, Sample
from launcher.training.data.prepare import prepare
from launcher.training.model import loading
from launcher.training.model.pretrained import read_config, read_processor
from tests.families import audio
from tests.training.sounds import RATE, extractor_of, folder_of, metadata_of, model_of, plan_of, tone, written

LABELS = ["high", "low", "middle"]
KINDS = (
    "wav2vec2",
    "wav2vec2+layer",
    "hubert",
    "wavlm+layer",
    "whisper",
    "audio-spectrogram-transformer",
    "wav2vec2-bert",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: model_of(tmp_path_factory.mktemp("model"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("sounds"), 4)


def task_of(model: Path, data: Path, layout: str = "padded", **options: Any) -> AudioClassification:
    plan = plan_of(model, data, columns=options, layout=layout)
    task = AudioClassification(plan.data, LABELS)
    task.layout = plan.layout
    task.prepare(read_processor(plan))
    task.adopt(read_config(plan))
    return task


def samples_of(task: AudioClassification, folder: Path) -> list[Sample]:
    rows = [
        {"audio": str(one), "label": one.parent.name} for one in sorted(folder.glob("*/*")) if one.is_file()
    ]
    samples = []
    for number, one in enumerate(task.encode(rows, None)):
        assert not isinstance(one, RowProblem)
        samples.append(Sample(one.arrays, number, 1))
    return samples


# What becomes of a file.

LONG = tone("low", 0).repeat(20, axis=0)
OGG = written(LONG, kind="OGG", subtype="OPUS")


def claiming(frames: int) -> bytes:
    """A FLAC of silence, which takes few bytes, whose header claims so many samples."""
    data = bytearray(written(np.zeros((4_096, 1), np.float32), kind="FLAC"))
    bits = int.from_bytes(data[18:26], "big") >> 36 << 36 | frames
    data[18:26] = bits.to_bytes(8, "big")
    return bytes(data)


DAMAGED = {
    "no sound": (b"a text", "not readable"),
    "empty": (b"", "empty"),
    "no samples": (written(np.zeros((0, 1), np.float32)), "empty"),
    "silent": (written(np.zeros((800, 2), np.float32)), "silent"),
    "one number": (written(np.full((800, 1), 0.5, np.float32)), "silent"),
    "not finite": (written(np.array([0.1, np.nan, 0.2], np.float32), subtype="FLOAT"), "not readable"),
    "cut WAV": (written(LONG)[:3_000], "truncated"),
    "cut FLAC": (written(LONG, kind="FLAC")[:30_000], "not readable"),
    "cut MP3": (written(LONG, kind="MP3")[:3_000], "truncated"),
    "cut Opus": (OGG[: len(OGG) // 2], "truncated"),
    "bomb": (claiming(1 << 35), "too many samples"),
    "odd rate": (written(np.ones((9, 1), np.float32), rate=100), "not readable"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_decoded_says_its_file_and_why(name: str, tmp_path: Path) -> None:
    data, reason = DAMAGED[name]
    file = tmp_path / "one.wav"
    file.write_bytes(data)
    with pytest.raises(RowProblem) as caught:
        sounds.heard(media.content(str(file)))
    assert caught.value.reason == reason
    assert caught.value.detail.startswith(f"{tmp_path.name}/one.wav: ")
    assert "\n" not in caught.value.detail and "BytesIO" not in caught.value.detail


def test_a_sound_of_any_format_becomes_one_channel_of_its_own_rate() -> None:
    plain = tone("middle", 1, 22_050, 2)
    for kind, subtype, within in (
        ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_24", 1e-6), ("WAV", "FLOAT", 0), ("FLAC", "PCM_16", 1e-4), ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.3), ("MP3", None, 0.3),
    ):  # fmt: skip
        samples, rate = sounds.heard(Content("", written(plain, 22_050, kind, subtype)))
        assert rate == 22_050 and samples.dtype == np.float32 and samples.shape == (len(plain),)
        assert np.abs(samples - plain.mean(axis=1)).max() <= within, kind


def test_a_wav_whose_writer_knew_no_size_is_whole() -> None:
    data = bytearray(written(tone("low", 1)))
    whole, _ = sounds.heard(Content("", bytes(data)))
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    samples, _ = sounds.heard(Content("", bytes(data)))
    assert np.array_equal(samples, whole)


def test_resampling_is_that_of_soxr() -> None:
    samples = tone("high", 2, 8_000)[:, 0]
    assert np.array_equal(sounds.resampled(samples, 8_000, RATE), soxr.resample(samples, 8_000, RATE))
    assert sounds.resampled(samples, RATE, RATE) is samples


# What the rows of a source are.


def test_folders_tables_and_bytes_hold_the_same_samples(models: dict[str, Path], cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    plain, named = folder_of(cache / "plain", 4), metadata_of(folder_of(cache / "named", 4))
    (named / "metadata.jsonl").rename(cache / "rows.jsonl")
    text = (cache / "rows.jsonl").read_text().replace('"file_name": "', '"file_name": "named/')
    (cache / "rows.jsonl").write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    structs = [{"bytes": (cache / row["file_name"]).read_bytes(), "path": None} for row in rows]
    parquet.write_table(
        pa.table({"audio": structs, "label": [row["label"] for row in rows]}), cache / "rows.parquet"
    )
    batches = []
    for source in (plain, cache / "rows.jsonl", cache / "rows.parquet"):
        plan = plan_of(models["wav2vec2+layer"], source)
        task = AudioClassification(plan.data)
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        assert dataset.report.rows_used == 12 and task.labels == LABELS
        batches.append(task.collate([dataset.item(number) for number in range(12)]))
    for batch in batches[1:]:
        for key, value in batches[0].items():
            assert torch.equal(batch[key], value), key


def test_bad_sounds_are_counted_and_the_rest_keeps_its_order(models: dict[str, Path], cache: Path) -> None:
    good = folder_of(cache / "good", 3)
    bad = Path(shutil.copytree(good, cache / "bad"))
    (bad / "high" / "0000a.wav").write_bytes(b"no sound")
    (bad / "low" / "0001a.wav").write_bytes(written(np.zeros((900, 1), np.float32)))
    (bad / "low" / "0001b.wav").write_bytes(written(tone("low", 1)[:300]))
    (bad / "low" / "notes.txt").write_text("notes")
    orders = []
    for folder in (good, bad):
        plan = plan_of(models["wav2vec2"], folder)
        task = AudioClassification(plan.data)
        task.prepare(read_processor(plan))
        task.adopt(read_config(plan))
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        orders.append([media.stored_content(dataset.item(number)[0]).data for number in range(9)])
    assert orders[0] == orders[1]
    assert dataset.report.dropped == {"not readable": 2, "silent": 1, "too short": 1}
    details = [one["detail"] for one in dataset.report.examples]
    assert details[0] == "high/0000a.wav: Format not recognised."
    assert details[1] == "low/0001a.wav: all 900 samples are 0"
    assert details[2] == "low/0001b.wav: 0.01875 s, and the model needs 0.025"
    plan = plan_of(models["wav2vec2"], bad, columns={"unusable": "refuse"})
    with pytest.raises(DataError, match=r"high/0000a\.wav: Format not recognised"):
        prepare(plan.data.train, "train", plan, AudioClassification(plan.data), read_processor(plan))


def test_a_sound_that_changes_stops_the_run(models: dict[str, Path], cache: Path) -> None:
    folder = folder_of(cache / "folder", 1)
    plan = plan_of(models["wav2vec2"], folder)
    task = AudioClassification(plan.data)
    dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
    (folder / "low" / "0000.wav").write_bytes(written(tone("low", 5)))
    with pytest.raises(DataError, match=r"low/0000\.wav changed since the data was prepared"):
        task.collate([dataset.item(number) for number in range(3)])


# What a model hears.


def test_a_longer_sound_is_cut_by_chance_or_where_the_job_says(models: dict[str, Path], folder: Path) -> None:
    clips = Clips.of(
        extractor_of(models["wav2vec2"]), plan_of(models["wav2vec2"], folder, columns={"seconds": 0.5}).data
    )
    samples = np.arange(10_000, dtype=np.float32)
    assert clips.clip(samples, "beginning")[0] == 0 and len(clips.clip(samples, "beginning")) == 8_000
    assert clips.clip(samples, "middle")[0] == 1_000
    starts = {int(clips.clip(samples, "middle", np.random.default_rng(seed))[0]) for seed in range(200)}
    assert 0 <= min(starts) < 200 and 1_800 < max(starts) <= 2_000
    assert len(clips.clip(samples[:300], "middle")) == 300


def test_silence_is_added_where_the_job_says(models: dict[str, Path], folder: Path) -> None:
    columns = {"seconds": 0.5, "pad_to_seconds": True}
    clips = Clips.of(
        extractor_of(models["wav2vec2"]), plan_of(models["wav2vec2"], folder, columns=columns).data
    )
    padded = clips.clip(np.ones(300, np.float32), "beginning")
    assert len(padded) == 8_000 and padded[:300].all() and not padded[300:].any()
    batch = task_of(models["wav2vec2"], folder, **columns)
    collated = batch.collate([[one] for one in samples_of(batch, folder)])
    assert collated["input_values"].shape == (12, 8_000) and "attention_mask" not in collated


def test_what_is_cut_hangs_on_seed_step_and_sample_alone(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["wav2vec2+layer"], folder, seconds=0.1)
    first, second = samples_of(task, folder)[:2]
    draws = Draws(3, 7, training=True)
    alone = task.collate([[second]], draws)["input_values"][0]
    assert torch.equal(task.collate([[first], [second]], draws)["input_values"][1], alone)
    assert not torch.equal(task.collate([[second]], Draws(3, 8, training=True))["input_values"][0], alone)
    plain = task.collate([[second]], Draws(3, 7))["input_values"][0]
    assert torch.equal(plain, task.collate([[second]])["input_values"][0]) and not torch.equal(plain, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_logits_are_those_of_transformers_own_class_for_each_clip(
    kind: str, models: dict[str, Path], folder: Path
) -> None:
    """By the feature extractor's own call, of clips of several lengths, beside each other where that is right."""
    layout = "single" if kind in ("wav2vec2", "hubert") else "padded"
    task = task_of(models[kind], folder, layout)
    model = AutoModelForAudioClassification.from_pretrained(models[kind], attn_implementation="eager").eval()
    samples, extractor = samples_of(task, folder), extractor_of(models[kind])
    own = []
    for sample in samples:
        wave = sounds.resampled(*sounds.heard(media.stored_content(sample)), RATE)
        inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
        own.append(model(**inputs, labels=torch.from_numpy(sample["label"])))
    groups = [[one] for one in samples] if layout == "single" else [samples]
    outputs = [task.loss(model, task.collate([[one] for one in group])) for group in groups]
    logits = torch.cat([one.predictions for one in outputs if one.predictions is not None])
    torch.testing.assert_close(logits, torch.cat([one.logits for one in own]), rtol=1e-4, atol=1e-5)
    total = sum(float(one.loss_sum.detach()) for one in outputs)
    assert total == pytest.approx(sum(float(one.loss.detach()) for one in own), rel=1e-5)


def test_the_shortest_clip_is_the_one_of_which_a_model_makes_something() -> None:
    for kind in ("wav2vec2", "sew", "data2vec-audio"):
        model = audio.model_of(kind, "eager")
        fewest = fewest_samples(model.config, RATE)
        assert fewest == (400 if kind != "sew" else fewest)
        assert torch.isfinite(model(torch.randn(1, fewest)).logits).all()
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            assert torch.isfinite(model(torch.randn(1, fewest - 1)).logits).all() or pytest.fail("hears less")


def test_a_whisper_model_keeps_the_positions_of_its_clips(folder: Path, tmp_path: Path) -> None:
    model = model_of(tmp_path / "whisper", "whisper", max_source_positions=150)
    task = task_of(model, folder, seconds=1.2)
    config = read_config(plan_of(model, folder))
    task.configure(config)
    assert config.max_source_positions == 100 and task.hearing.clips.seconds == 1.2
    assert task.collate([[one] for one in samples_of(task, folder)])["input_features"].shape == (12, 80, 200)
    with pytest.raises(
        ConfigurationError, match=r"data\.seconds = 3\.5: is more than the 3 s that the model hears"
    ):
        task_of(model, folder, seconds=3.5)


def test_positions_are_the_first_of_the_files_and_do_not_train(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = model_of(tmp_path / "whisper", "whisper", max_source_positions=100)
    plan = plan_of(model, folder, columns={"seconds": 1})
    config, task = read_config(plan), task_of(model, folder, seconds=1)
    task.configure(config)
    loaded = loading.load(plan, task.auto_class, config, lambda model: None).model
    positions = loaded.get_parameter("encoder.embed_positions.weight")
    own = load_file(model / "model.safetensors")["encoder.embed_positions.weight"]
    assert torch.equal(positions, own[:50]) and not positions.requires_grad
    assert loaded.get_parameter("encoder.conv1.weight").requires_grad


def test_a_clip_longer_than_a_spectrum_model_hears_is_refused(models: dict[str, Path], folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.seconds = 0\.7: is more than the 0\.64 s"):
        task_of(models["audio-spectrogram-transformer"], folder, seconds=0.7)


def test_chance_leaves_out_no_layer_and_hides_nothing(models: dict[str, Path], folder: Path) -> None:
    config = read_config(plan_of(models["wav2vec2"], folder))
    config.layerdrop, config.apply_spec_augment = 0.1, True
    task_of(models["wav2vec2"], folder).configure(config)
    assert (config.layerdrop, config.apply_spec_augment) == (0.0, False)


def test_a_sound_that_is_too_long_goes_by_the_policy(models: dict[str, Path]) -> None:
    row = {"audio": written(tone("low", 3)), "label": "low"}
    for policy, wanted in (("cut", "0.1 of "), ("drop", "too long: 0.")):
        [one] = task_of(models["wav2vec2"], Path("x"), seconds=0.1, too_long=policy).encode([row], None)
        assert wanted in str(one if isinstance(one, RowProblem) else one.cut)


def test_a_processor_that_reads_no_sounds_is_refused(models: dict[str, Path]) -> None:
    data = plan_of(models["wav2vec2"], Path("x")).data
    with pytest.raises(ConfigurationError, match="says no sampling_rate, so reads no sounds"):
        Clips.of(object(), data)
    extractor = extractor_of(models["wav2vec2"])
    extractor.feature_size = 7  # type: ignore[attr-defined]
    extractor.model_input_names = ["nothing"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="its Wav2Vec2FeatureExtractor makes nothing of a sound"):
        Clips.of(extractor, data)


def test_a_model_without_a_processor_gets_that_of_its_kind(
    models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    for kind in KINDS:
        model = model_of(tmp_path / kind, kind)
        own = read_processor(plan_of(model, folder)).to_dict()
        (model / "preprocessor_config.json").unlink()
        assert read_processor(plan_of(model, folder)).to_dict() == own
    LlamaConfig(num_hidden_layers=1).save_pretrained(model)
    with pytest.raises(ConfigurationError, match="a llama model has none of its own"):
        read_processor(plan_of(model, folder))


def test_a_trained_head_of_any_name_is_known(models: dict[str, Path]) -> None:
    """wav2vec2's class is for a sequence, Whisper's for audio."""
    from launcher.tasks import classes

    for kind in ("wav2vec2", "whisper"):
        config = read_config(plan_of(models[kind], Path("x")))
        config.id2label = dict(enumerate(LABELS))
        assert classes.of_model(config, AudioClassification.head_name) == LABELS


def test_the_bytes_of_a_row_need_no_file() -> None:
    data = written(tone("low", 1))
    samples, rate = sounds.heard(media.content(data))
    assert rate == RATE and len(samples) == soundfile.info(io.BytesIO(data)).frames
