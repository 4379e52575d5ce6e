"""Runs on speech: the equivalences of the text tasks, with clips padded beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.media import content
from launcher.tasks.sounds import heard, resampled
from launcher.tasks.speech_scores import error_rates
from launcher.training.checkpoint.export import export
from launcher.training.signals import StopRequest
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, batch_of, curve, evaluations, finish, new_run, replan, state
from tests.training.speeches import folder_of, model_of, plan_of, whisper_of
from tests.training.test_trainer_images import assert_near, run_of, with_children

pytestmark = pytest.mark.distributed

KINDS = ("wav2vec2+layer", "wav2vec2", "wav2vec2-bert")
"""Clips padded beside each other; one a pass; spectra."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Without a tokenizer, and with a head for more characters than there are."""
    return {kind: model_of(tmp_path_factory.mktemp("model"), kind, vocab_size=16) for kind in KINDS}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 sounds: not a multiple of the batch, so that the last one has filler."""
    return folder_of(tmp_path_factory.mktemp("speech"), 27)


def planned(model: Path, speech: Path, ranks: int, num_steps: int = 4, **changes: Any) -> Plan:
    return plan_of(model, speech, ranks, num_steps, training={"learning_rate": 2e-3}, **changes)


def samples_at(run: RunDirectory, step: int) -> list[str]:
    """What the model writes of a few held-out rows."""
    lines = (run.path / "samples" / f"step-{step:08d}.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"]["text"] for line in lines]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's metadata."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def clips_of(folder: Path) -> list[Any]:
    """Its sounds as a pipeline takes them: it would need torchaudio to resample."""
    return [resampled(*heard(content(str(folder / row["file_name"]))), 16_000) for row in rows_of(folder)]


@pytest.mark.slow
def test_ranks_and_engines_compute_the_same(models: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    """What stands behind a clip, and filler, count nowhere."""
    model, length = models["wav2vec2+layer"], {"value": 1.0, "unit": "epochs"}
    single = run_of(tmp_path / "single", planned(model, speech, 1, length=length), 1)
    batch = batch_of(1, 3, 4)
    parts = run_of(tmp_path / "parts", planned(model, speech, 1, length=length, batch=batch), 1)
    two = run_of(tmp_path / "two", planned(model, speech, 2, length=length), 2)
    zero = run_of(tmp_path / "zero", planned(model, speech, 2, length=length, **deepspeed(3)), 2)
    assert len(curve(single)) == 3
    for other in (parts, two, zero):
        assert_near(other, single)
    last = max(evaluations(single))
    wanted = {name: value for name, value in evaluations(single)[last].items() if name in ("wer", "cer")}
    assert set(wanted) == {"wer", "cer"}
    for other in (parts, two, zero):
        assert {name: evaluations(other)[last][name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.very_slow
def test_a_stop_and_another_number_of_ranks_change_no_clip(
    models: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    """One clip a pass, as a feature encoder with a group norm needs it."""
    how: dict[str, Any] = {"layout": "single", "batch": batch_of(2, 1, 6)}
    whole = run_of(tmp_path / "whole", planned(models["wav2vec2"], speech, 2, **how), 2)
    stopped = run_of(tmp_path / "stopped", planned(models["wav2vec2"], speech, 2, **how), 2, stop_at=2)
    finish(stopped, 2, with_children)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    other = run_of(tmp_path / "other", planned(models["wav2vec2"], speech, 2, **how), 2, stop_at=2)
    replan(other, planned(models["wav2vec2"], speech, 3, layout="single", batch=batch_of(3, 1, 4)))
    finish(other, 3, with_children)
    assert_near(other, whole)


@pytest.mark.slow
def test_it_learns_and_its_export_writes_the_same_in_a_pipeline(
    models: dict[str, Path], speech: Path, tmp_path: Path
) -> None:
    training = {"learning_rate": 1e-2}
    run = run_of(tmp_path / "run", plan_of(models["wav2vec2-bert"], speech, 2, 60, training=training), 2)
    before, after = evaluations(run)[0], evaluations(run)[60]
    assert after["wer"] < 0.2 < 0.9 < before["wer"] and after["cer"] < 0.1
    export(run, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "Wav2Vec2BertForCTC.from_pretrained" in card and "AutoProcessor.from_pretrained" in card
    writes = pipeline("automatic-speech-recognition", str(tmp_path / "export"))
    written = [writes(clip)["text"].strip() for clip in clips_of(speech)]
    assert error_rates(written, [row["text"] for row in rows_of(speech)]) == pytest.approx(
        {name: after[name] for name in ("wer", "cer")}
    )
    assert set(samples_at(run, 60)) <= set(written)


def sharded_writing(rank: int, stop: StopRequest) -> None:
    """Gather parameters in every pass, as a model does that is too large for a rank."""
    from launcher.training import generating

    generating.SHARE_FOR_PARAMETERS = 0.0
    with_children(rank, stop)


@pytest.mark.very_slow  # test_trainer_writing.py has the same of texts
def test_whisper_writes_the_same_on_any_ranks_and_engines(speech: Path, tmp_path: Path) -> None:
    """Sharded too, where ranks write texts of other lengths; and its export in a pipeline."""
    model = whisper_of(tmp_path / "whisper")
    columns, how = {"seconds": 1}, {"evaluation": {"generate": {"max_new_tokens": 8}}}

    def ran(name: str, ranks: int, hook: Any = with_children, **changes: Any) -> RunDirectory:
        plan = planned(model, speech, ranks, 6, columns=dict(columns), **how, **changes)
        run = new_run(tmp_path / name, plan)
        finish(run, ranks, hook)
        return run

    single, two = ran("single", 1), ran("two", 2, sharded_writing)
    others = [two, ran("zero", 2, sharded_writing, **deepspeed(3))]
    for other in others:
        assert_near(other, single)
        assert samples_at(other, 6) == samples_at(single, 6)
        for name in ("wer", "cer"):
            assert evaluations(other)[6][name] == pytest.approx(evaluations(single)[6][name])
    export(two, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "WhisperForConditionalGeneration.from_pretrained" in card
    writes = pipeline("automatic-speech-recognition", str(tmp_path / "export"))
    greedily = {"max_new_tokens": 8, "num_beams": 1}  # by itself a pipeline looks with five beams
    written = [writes(clip, generate_kwargs=greedily)["text"].strip() for clip in clips_of(speech)]
    texts = [row["text"] for row in rows_of(speech)]
    assert error_rates(written, texts) == pytest.approx(
        {name: evaluations(two)[6][name] for name in ("wer", "cer")}
    )
    assert set(samples_at(two, 6)) <= set(written) and any(written)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{}, pytest.param(deepspeed(3), marks=pytest.mark.very_slow)], ids=["fsdp", "zero"]
)
def test_half_precision_hears_in_half_precision(engine: dict[str, Any], speech: Path, tmp_path: Path) -> None:
    """Sounds are fp32 where token ids are none, and an encoder is called beside the hooks that convert."""
    model, how = whisper_of(tmp_path / "whisper"), {"evaluation": {"generate": {"max_new_tokens": 4}}}
    plan = planned(model, speech, 1, 1, columns={"seconds": 1}, precision="bf16", **how, **engine)
    run = run_of(tmp_path / "run", plan, 1)
    assert evaluations(run)[1]["wer"] > 0 and any(samples_at(run, 1))
