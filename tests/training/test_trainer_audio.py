"""Runs on sounds: the equivalences of the text tasks, with clips cut by chance and padded beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
from transformers import pipeline

from launcher.planner.plan import Plan
from launcher.training.checkpoint.export import export
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, batch_of, curve, evaluations, finish, replan, state
from tests.training.sounds import folder_of, model_of, plan_of
from tests.training.test_trainer_images import assert_near, run_of, with_children

pytestmark = pytest.mark.distributed

KINDS = ("wav2vec2+layer", "wav2vec2", "whisper")
"""Clips padded beside each other; one a pass; all of one length, with fewer positions than in the files."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    more = {"whisper": {"max_source_positions": 100}}
    models = {
        kind: model_of(tmp_path_factory.mktemp(kind.partition("+")[0]), kind, **more.get(kind, {}))
        for kind in KINDS
    }
    # As transformers writes a processor of several parts, and looks at first.
    own = json.loads((models["whisper"] / "preprocessor_config.json").read_text())
    (models["whisper"] / "processor_config.json").write_text(json.dumps({"feature_extractor": own}))
    return models


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 sounds of each of three classes: not a multiple of the batch, so that the last one has filler."""
    return folder_of(tmp_path_factory.mktemp("sounds"), 9)


def planned(model: Path, sounds: Path, ranks: int, num_steps: int = 4, **changes: Any) -> Plan:
    changes.setdefault("columns", {"seconds": 0.25})
    return plan_of(model, sounds, ranks, num_steps, training={"learning_rate": 2e-3}, **changes)


@pytest.mark.very_slow  # speech to text hears the same way, and CI has its test
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2+layer"])
def test_ranks_and_engines_compute_the_same(
    kind: str, models: dict[str, Path], sounds: Path, tmp_path: Path
) -> None:
    """27 sounds in steps of 12: what stands behind a clip, and filler, count nowhere."""
    model, length = models[kind], {"value": 1.0, "unit": "epochs"}
    single = run_of(tmp_path / "single", planned(model, sounds, 1, length=length), 1)
    batch = batch_of(1, 3, 4)
    parts = run_of(tmp_path / "parts", planned(model, sounds, 1, length=length, batch=batch), 1)
    two = run_of(tmp_path / "two", planned(model, sounds, 2, length=length), 2)
    zero = run_of(tmp_path / "zero", planned(model, sounds, 2, length=length, **deepspeed(3)), 2)
    assert len(curve(single)) == 3
    for other in (parts, two, zero):
        assert_near(other, single)


@pytest.mark.slow
@pytest.mark.very_slow
def test_a_stop_and_another_number_of_ranks_change_no_clip(
    models: dict[str, Path], sounds: Path, tmp_path: Path
) -> None:
    """One clip a pass, as a feature encoder with a group norm needs it."""
    how: dict[str, Any] = {"layout": "single", "batch": batch_of(2, 1, 6)}
    whole = run_of(tmp_path / "whole", planned(models["wav2vec2"], sounds, 2, **how), 2)
    stopped = run_of(tmp_path / "stopped", planned(models["wav2vec2"], sounds, 2, **how), 2, stop_at=2)
    finish(stopped, 2, with_children)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    other = run_of(tmp_path / "other", planned(models["wav2vec2"], sounds, 2, **how), 2, stop_at=2)
    replan(other, planned(models["wav2vec2"], sounds, 3, layout="single", batch=batch_of(3, 1, 4)))
    finish(other, 3, with_children)
    assert_near(other, whole)


@pytest.mark.very_slow
def test_it_learns_and_its_export_answers_in_a_pipeline(
    models: dict[str, Path], sounds: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", planned(models["whisper"], sounds, 2, 48), 2)
    before, after = evaluations(run)[0], evaluations(run)[48]
    assert after["accuracy"] > 0.9 > before["accuracy"] and after["f1"] > 0.9
    details = json.loads(run.evaluation(48).read_text())["details"]
    assert details["labels"] == ["high", "low", "middle"] and details["confusion_matrix"]
    export(run, tmp_path / "export")
    assert "AutoFeatureExtractor.from_pretrained" in (tmp_path / "export" / "README.md").read_text()
    answers = pipeline("audio-classification", str(tmp_path / "export"))
    files = sorted(one for one in sounds.glob("*/*"))
    said = [_heard(answers, file) for file in files]
    right = sum(one == file.parent.name for one, file in zip(said, files, strict=True)) / len(files)
    assert right == pytest.approx(after["accuracy"])


def _heard(answers: Any, file: Path) -> str:
    """The pipeline's own answer to the first quarter of a second; it would need torchaudio to resample."""
    from launcher.tasks.media import content
    from launcher.tasks.sounds import heard, resampled

    assert soundfile.info(file).frames
    clip = resampled(*heard(content(str(file))), 16_000)[:4_000]
    label: str = answers(clip)[0]["label"]
    return label
