"""Speech to text: what becomes of a row, and that the numbers are transformers' own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    WhisperForConditionalGeneration,
)

from launcher.data.rows import RowProblem
from launcher.errors import ConfigurationError, DataError
from launcher.tasks import media, sounds
from launcher.tasks.generation import Evaluation, Generate
from launcher.tasks.speech_processor import characters_in, characters_of, frames_needed, tokenizer_of
from launcher.tasks.speech_recognition import SpeechRecognition
from launcher.tasks.speech_scores import error_rates, normalized
from launcher.tasks.speech_texts import token_ids
from launcher.tasks.task import Output, Sample
from launcher.training import generating
from launcher.training.data.prepare import prepare
from launcher.training.model.pretrained import read_config, read_processor
from launcher.training.tracing.make_profile import make_profile
from tests.families import speech
from tests.training.speeches import (
    CHARACTERS,
    RATE,
    WRITTEN,
    folder_of,
    model_of,
    plan_of,
    said,
    text_of,
    whisper_of,
    written,
)

CTC = ("wav2vec2", "wav2vec2+layer", "hubert", "wavlm+layer", "wav2vec2-bert")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: model_of(tmp_path_factory.mktemp("model"), kind, tokenizer=True) for kind in CTC}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("speech"), 6)


def task_of(model: Path, data: Path, layout: str = "padded", **options: Any) -> SpeechRecognition:
    plan = plan_of(model, data, columns=options, layout=layout)
    task = SpeechRecognition(plan.data)
    task.layout = plan.layout
    task.prepare(read_processor(plan))
    task.adopt(read_config(plan))
    return task


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return [{**(row := json.loads(line)), "file_name": str(folder / row["file_name"])} for line in lines]


def samples_of(task: SpeechRecognition, folder: Path) -> list[Sample]:
    samples = []
    for number, one in enumerate(task.encode(rows_of(folder), None)):
        assert not isinstance(one, RowProblem), one
        samples.append(Sample(one.arrays, number, 1))
    return samples


def one_of(task: SpeechRecognition, text: str, wave: np.ndarray, **more: Any) -> Any:
    [one] = task.encode([{"audio": written(wave), "text": text, **more}], None)
    return one


# The loss.


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", CTC)
def test_loss_is_that_of_transformers_own_class_for_each_clip(
    kind: str, reduction: str, models: dict[str, Path], folder: Path
) -> None:
    """By the processor's own call, of clips and texts of several lengths; filler counts nothing."""
    layout = "single" if kind in ("wav2vec2", "hubert") else "padded"
    task = task_of(models[kind], folder, layout)
    model = AutoModelForCTC.from_pretrained(models[kind], attn_implementation="eager").eval()
    model.config.ctc_loss_reduction = reduction
    samples, extractor = (
        samples_of(task, folder),
        read_processor(plan_of(models[kind], folder)).feature_extractor,
    )
    own = []
    for sample, row in zip(samples, rows_of(folder), strict=True):
        wave = sounds.resampled(*sounds.heard(media.stored_content(sample)), RATE)
        inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
        labels = torch.tensor([tokenizer_of(tuple(CHARACTERS))(row["text"])["input_ids"]])
        own.append(model(**inputs, labels=labels).loss)
    groups = [[one] for one in samples] if layout == "single" else [[*samples, samples[0].as_filler()]]
    total = sum(task.loss(model, task.collate([[one] for one in group])).loss_sum for group in groups)
    assert float(total.detach()) == pytest.approx(float(sum(own).detach()), rel=1e-5)  # type: ignore[union-attr, arg-type]


def test_what_is_written_beside_a_longer_clip_is_what_is_written_alone(
    models: dict[str, Path], folder: Path
) -> None:
    """Frames behind a clip are never read: an untrained model writes something at nearly all of them."""
    task = task_of(models["wav2vec2+layer"], folder)
    model = AutoModelForCTC.from_pretrained(models["wav2vec2+layer"], attn_implementation="eager").eval()
    samples = samples_of(task, folder)
    with torch.no_grad():
        together = task.texts_of(task.loss(model, task.collate([[one] for one in samples])))
        alone = [task.texts_of(task.loss(model, task.collate([[one]])))[0] for one in samples]
    assert together == alone
    assert len({len(one["text"]) for one in alone}) > 1


# The vocabulary.


def test_characters_of_training_texts_are_written_where_a_model_has_no_tokenizer(
    folder: Path, cache: Path
) -> None:
    model = model_of(cache / "model", "wav2vec2+layer", vocab_size=16)
    plan = plan_of(model, folder)
    task, processor = SpeechRecognition(plan.data), read_processor(plan)
    task.prepare(processor)
    task.adopt(config := read_config(plan))
    for _ in range(2):  # the second time from the cache
        dataset = prepare(plan.data.train, "train", plan, task, processor)
        assert task.labels == CHARACTERS and dataset.report.rows_used == 6
    own = rows_of(folder)[0]["text"]
    assert task.tokenizer.decode(dataset.item(0)[0]["labels"]) == "".join(
        letter for letter, after in zip(own, f"{own[1:]}$", strict=True) if letter != after
    )
    task.configure(config)
    assert (config.vocab_size, config.pad_token_id, characters_in(config)) == (6, 0, CHARACTERS)
    processor.save_pretrained(cache / "saved")
    config.save_pretrained(cache / "saved")
    read = AutoProcessor.from_pretrained(cache / "saved")
    assert type(read).__name__ == "Wav2Vec2Processor"
    assert read.tokenizer("ab c")["input_ids"] == task.tokenizer("ab c")["input_ids"] == [3, 4, 2, 5]


def test_the_model_s_own_characters_are_written_where_it_has_them(
    models: dict[str, Path], folder: Path
) -> None:
    task = task_of(models["wav2vec2"], folder)
    assert not task.needs_labels and len(task.tokenizer) == 6
    other = task_of(models["wav2vec2"], folder, vocabulary="text")
    assert other.needs_labels and other.labels is None


def test_a_head_for_other_characters_is_not_read(models: dict[str, Path], folder: Path) -> None:
    config = read_config(plan_of(models["wav2vec2"], folder))
    task = task_of(models["wav2vec2"], folder)
    assert task.other_head(config, config) is None
    stored = read_config(plan_of(models["wav2vec2"], folder))
    other = task_of(models["wav2vec2"], folder, vocabulary="text")
    other.labels = characters_of(["abd"])
    other.configure(config)
    assert other.other_head(stored, config) == "vocab_size"


def test_texts_of_which_the_model_knows_little_say_what_to_write(
    models: dict[str, Path], folder: Path
) -> None:
    task, wave = task_of(models["wav2vec2"], folder), said("abcab", 0)
    one = one_of(task, "ABC", wave)
    assert str(one) == ("characters that the model does not know: 3 of 3 are (ABC); write data.case: lower")
    assert "write data.vocabulary: text" in str(one_of(task, "xyz", wave))
    assert not isinstance(one_of(task_of(models["wav2vec2"], folder, case="lower"), "ABC", wave), RowProblem)
    known = one_of(task, "ab cx", wave)
    assert known.arrays["labels"].tolist() == [3, 4, 2, 5, 1]


# The planner.


@pytest.mark.very_slow
def test_memory_is_traced_without_numbers(models: dict[str, Path], folder: Path, whisper: Path) -> None:
    """CTC's own loss goes by lengths, which a trace does not have."""
    for model, options in ((models["wav2vec2+layer"], {"seconds": 2}), (whisper, {"seconds": 1})):
        profile = make_profile(plan_of(model, folder, columns=options, precision="bf16"))
        assert not profile.untraceable and set(profile.passes) >= {"none", "full", "evaluation"}


# Rows that cannot be used.


def test_a_text_too_long_for_its_sound_is_dropped(models: dict[str, Path], folder: Path) -> None:
    """With it the loss would be infinite; a repeated character needs a blank between."""
    assert (frames_needed([3, 4, 5]), frames_needed([3, 3, 4, 4])) == (3, 6)
    for kind in CTC:
        task, wave = task_of(models[kind], folder), said("abc", 0)
        frames = task._num_frames(len(wave))
        model = AutoModelForCTC.from_pretrained(models[kind], attn_implementation="eager").eval()
        fits = one_of(task, "ab" * (frames // 2), wave)
        loss = task.loss(model, task.collate([[Sample(fits.arrays, 0, 1)]])).loss_sum
        assert torch.isfinite(loss)
        for text in ("ab" * (frames // 2) + "ab", "a" * (frames // 2 + 2)):
            one = one_of(task, text, wave)
            assert (
                isinstance(one, RowProblem)
                and one.reason == "text too long for its sound"
                and f"the sound has {frames}" in one.detail
            )


def test_bad_rows_are_counted_and_the_rest_keeps_its_order(models: dict[str, Path], cache: Path) -> None:
    folder = folder_of(cache / "folder", 4)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "broken.wav").write_bytes(b"no sound")
    bad = [
        {"file_name": "broken.wav", "text": "a"},
        {"file_name": "0000.wav", "text": " "},
        {"file_name": "0000.wav"},
        {"file_name": "nowhere.wav", "text": "a"},
        {"file_name": "0000.wav", "text": "abc" * 99},
    ]
    plan = plan_of(models["wav2vec2"], folder, columns={"unusable": "drop"})
    task = task_of(models["wav2vec2"], folder)
    orders = []
    for rows in (lines, [lines[0], *map(json.dumps, bad), *lines[1:]]):
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        orders.append([dataset.item(number)[0]["labels"].tolist() for number in range(4)])
    assert orders[0] == orders[1]
    assert dataset.report.dropped == {
        "not readable": 1, "empty": 1, "missing key": 2, "text too long for its sound": 1,
    }  # fmt: skip
    details = {one["line"]: one["detail"] for one in dataset.report.examples}
    assert details[2] == "folder/broken.wav: Format not recognised."
    assert details[6].startswith("folder/0000.wav: 297 characters need 297 frames, and the sound has ")
    strict = plan_of(models["wav2vec2"], folder, columns={"unusable": "refuse"})
    with pytest.raises(DataError, match=r"metadata\.jsonl.*line 2.*Format not recognised"):
        prepare(strict.data.train, "train", strict, task, read_processor(strict))


def test_a_sound_that_is_too_long_is_never_cut(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["wav2vec2"], folder, seconds=0.2)
    assert str(one_of(task, "abc", said("abc", 0))).startswith("too long: 0.3 s, above 0.2")


def test_rows_without_texts_are_refused(models: dict[str, Path], folder: Path) -> None:
    plan = plan_of(models["wav2vec2"], folder, columns={"vocabulary": "text", "text": "words"})
    task = SpeechRecognition(plan.data)
    task.prepare(read_processor(plan))
    with pytest.raises(DataError, match=r"data\.text = 'words': the training rows have no text"):
        task.fit([])


# A model with a decoder.


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_of(tmp_path_factory.mktemp("whisper"))


def whisper_and_task(whisper: Path, folder: Path, **options: Any) -> tuple[Any, SpeechRecognition]:
    """The model with its positions cut to a second, and the task for it."""
    task = task_of(whisper, folder, seconds=1, **options)
    config = read_config(plan_of(whisper, folder))
    task.configure(config)
    config._attn_implementation = "eager"
    model = AutoModelForSpeechSeq2Seq.from_pretrained(whisper)
    positions = model.model.encoder.embed_positions.weight.data[:50]
    model.model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    model.config.max_source_positions = model.model.encoder.max_source_positions = 50
    return model.eval(), task


def test_whisper_s_loss_is_its_own_for_each_clip(whisper: Path, folder: Path) -> None:
    """By the processor's own calls: features padded to a second, and the tokens that a tokenizer writes."""
    model, task = whisper_and_task(whisper, folder)
    assert model.config.max_source_positions == 50
    samples, own, num_tokens = samples_of(task, folder), [], 0
    for sample, row in zip(samples, rows_of(folder), strict=True):
        wave = sounds.resampled(*sounds.heard(media.stored_content(sample)), RATE)
        extractor = task.hearing.clips.processor
        inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
        labels = task.tokenizer(row["text"])["input_ids"]
        assert labels[0] == 5 and labels[-1] == 4 and labels[1] == WRITTEN.index("<|notimestamps|>")
        loss = model(inputs["input_features"], labels=torch.tensor([labels[1:]])).loss
        own.append(loss * (len(labels) - 1))
        num_tokens += len(labels) - 1
    batch = task.collate([[one] for one in (*samples, samples[0].as_filler())])
    assert sum(batch["aside"]["supervised"]) == num_tokens and batch["input_features"].shape[2] == 100
    total = float(task.loss(model, batch).loss_sum.detach())
    assert total == pytest.approx(sum(float(one.detach()) for one in own), rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_whisper_writes_what_its_own_generate_does(whisper: Path, folder: Path, num_beams: int) -> None:
    model, task = whisper_and_task(whisper, folder)
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=6, num_beams=num_beams))
    samples = samples_of(task, folder)
    prompts = task.prompts(samples)
    assert prompts["decoder_input_ids"].tolist() == [[5, 11]] * 6
    # Whisper's own is told the same by its generation config.
    own = WhisperForConditionalGeneration.generate(
        model, prompts["input_features"], max_new_tokens=6, num_beams=num_beams,
        decoder_input_ids=prompts["decoder_input_ids"],
    )  # fmt: skip
    model.forward = functools.partial(task.loss, model)
    written = generating.generate(model, prompts, task.generation, lambda: False, synced=False)
    texts = [task.decode(row) for row in written.numpy()]
    assert texts == [task.tokenizer.decode(row, skip_special_tokens=True).strip() for row in own]
    assert all(texts)
    ends = [task.tokenizer.eos_token_id, task.tokenizer.pad_token_id]
    evaluator = task.evaluator()
    evaluator.update(Output(torch.zeros(()), torch.zeros(()), generated=written), task.collate([samples]))
    evaluator.compute([evaluator.state()])
    cut = [len(row) == 6 and not np.isin(row[:-1].numpy(), ends).any() for row in written]
    assert evaluator.details()["num_at_limit"] == sum(cut) > 0


def test_whisper_is_told_its_language(whisper: Path, folder: Path) -> None:
    task = task_of(whisper, folder, language="german")
    assert task._prefix == [5, WRITTEN.index("<|de|>"), WRITTEN.index("<|transcribe|>"), 11]
    translates = task_of(whisper, folder, language="de", translate=True)
    assert translates._prefix[2] == WRITTEN.index("<|translate|>")
    learned = token_ids("ab", translates.tokenizer, translates._config, 99, "")
    assert learned[:3] == translates._prefix[1:]
    generation = GenerationConfig(forced_decoder_ids=[[1, 11]])
    task.configure_generation(generation)
    assert (generation.lang_to_id, generation.task_to_id) == ({"<|de|>": 8}, {"transcribe": 10})
    assert (generation.language, generation.task, generation.return_timestamps) == (
        "german",
        "transcribe",
        False,
    )
    assert generation.eos_token_id == [task.tokenizer.eos_token_id]
    with pytest.raises(
        ConfigurationError, match=r"data\.language = 'klingon': Unsupported language: klingon"
    ):
        task_of(whisper, folder, language="klingon")


def test_a_whisper_of_many_languages_must_be_told_one(folder: Path, tmp_path: Path) -> None:
    many = whisper_of(
        tmp_path, vocab_size=51_865, d_model=8, encoder_attention_heads=1, decoder_attention_heads=1
    )
    with pytest.raises(ConfigurationError, match=r"data\.language: is missing: a Whisper of many languages"):
        task_of(many, folder)
    task_of(many, folder, language="en")


def test_texts_longer_than_whisper_s_positions_are_dropped(whisper: Path, folder: Path) -> None:
    task = task_of(whisper, folder)
    assert str(one_of(task, "abc" * 20, said("abc", 0))) == "too long: 62 tokens, above 32"
    with pytest.raises(
        ConfigurationError, match=r"data\.vocabulary = 'text': is for CTC, and a whisper model"
    ):
        task_of(whisper, folder, vocabulary="text")


def test_a_decoder_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    whisper_of(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigurationError, match="no tokenizer: its decoder writes tokens"):
        task_of(tmp_path, folder).fit([])


# What a job asks that cannot be.


def test_keys_for_the_other_kind_of_model_are_refused(models: dict[str, Path], folder: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"data\.language = 'en': is for a model that writes word by word"
    ):
        task_of(models["wav2vec2"], folder, language="en")
    with pytest.raises(ConfigurationError, match=r"data\.translate = True: is for a model that writes word"):
        task_of(models["wav2vec2"], folder, translate=True)


def test_a_model_without_characters_cannot_be_measured(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(model_of(tmp_path, "wav2vec2"), folder)
    task = SpeechRecognition(plan.data)
    task.prepare(read_processor(plan))
    with pytest.raises(ConfigurationError, match="has no characters to write with, nor a tokenizer"):
        task.adopt(read_config(plan), as_it_stands=True)


# Error rates.


def test_error_rates_are_jiwer_s_and_count_over_all_texts() -> None:
    assert error_rates(["a x c", ""], ["a b c", "d"]) == {"wer": 0.5, "cer": pytest.approx(2 / 6)}
    assert error_rates([], []) == {"wer": 0.0, "cer": 0.0}
    for answers, texts in ((["one two"], [""]), (["a", "b c"], ["", ""]), ([""], [""])):
        theirs = {"wer": jiwer.wer(texts, answers), "cer": jiwer.cer(texts, answers)}
        assert error_rates(answers, texts) == theirs
    assert error_rates(["x"], [""]) == {"wer": 1.0, "cer": 1.0}


def test_texts_are_normalized_as_whisper_has_it() -> None:
    assert normalized("It's, Mr. Smith!", "none", None) == "It's, Mr. Smith!"
    assert normalized("Well, [noise] OK!", "basic", None) == "well ok"
    assert normalized("It's twenty-one dollars", "english", None) == "it is $21"


def test_a_column_of_text_is_asked(folder: Path) -> None:
    assert text_of(0) and speech.columns().text == "text"
