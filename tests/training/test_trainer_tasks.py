"""Each kind of classification learns on two ranks, and goes on after a stop to the bit, dropout included."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher.planner.plan import Plan
from launcher.tasks.sequence_classification import SequenceClassification
from launcher.training.inputs import TrainingInputs
from tests.training.runs import (
    assert_equal,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    state,
    write_rows,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with dropout."""
    return model_directory(
        tmp_path_factory.mktemp("encoder"), "bert", "AutoModel", num_hidden_layers=2, initializer_range=0.1
    )


def rows(problem: str, num_rows: int = 96) -> list[dict[str, Any]]:
    """Texts of 3 to 20 words; what they are labelled with follows from their words."""
    generator = random.Random(5)
    found = []
    for _ in range(num_rows):
        kind = generator.randrange(3)
        words = [
            f"w{generator.randrange(kind * 40, kind * 40 + 40)}" for _ in range(generator.randrange(3, 21))
        ]
        label: Any = {
            "single-label": f"kind {kind}",
            "multi-label": ["many", "low"] if kind else ["low"],
            "regression": kind - 1.0,
        }[problem]
        found.append({"text": " ".join(words), "label": label})
    return found


def plan_of(encoder: Path, directory: Path, problem: str, num_steps: int, **options: Any) -> Plan:
    source = write_rows(directory / "rows.jsonl", rows(problem))
    data = {
        "train": source,
        "evaluation": source,
        "text": "text",
        "label": "label",
        "problem": problem,
        "max_length": 32,
        "num_workers": 1,
        **options,
    }
    batch = {"global_batch_size": 16, "micro_batch_size": 8, "accumulation_steps": 1, "data_parallel_size": 2}
    changes = {
        "model__task": "sequence-classification",
        "task": "sequence-classification",
        "attention": "sdpa",
        "batch": batch,
    }
    return plan_for(encoder, data, 2, num_steps, training={"learning_rate": 2e-3}, **changes)


@pytest.mark.parametrize(
    ("problem", "metric", "wanted"),
    [("single-label", "accuracy", 0.9), ("multi-label", "f1_micro", 0.9), ("regression", "pearson", 0.8)],
)
def test_it_learns(problem: str, metric: str, wanted: float, encoder: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", plan_of(encoder, tmp_path, problem, 24))
    finish(run, 2)
    before, after = evaluations(run)[0], evaluations(run)[24]
    assert after["loss"] < 0.5 * before["loss"], (before, after)
    assert after[metric] > wanted, (before, after)
    told = json.loads(run.evaluation(24).read_text())
    assert told["metrics"] == after and told["step"] == 24
    assert list(told["details"]["groups"]) == ["tokens of the text"]
    if problem == "regression":
        assert list(told["details"]) == ["groups"]
        return
    matrix = "confusion_matrix" if problem == "single-label" else "confusion_matrices"
    assert told["details"][matrix] and told["details"]["per_class"][told["details"]["labels"][0]]["f1"] > 0.8


def test_balanced_weights_are_those_of_the_training_rows(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan = plan_of(encoder, tmp_path, "single-label", 2, class_weights="balanced")
    task = TrainingInputs.of(new_run(tmp_path / "run", plan), plan).task
    assert isinstance(task, SequenceClassification)
    kinds = [row["label"] for row in rows("single-label")]
    assert task._weights == pytest.approx([96 / 3 / kinds.count(f"kind {number}") for number in range(3)])


@pytest.mark.slow
@pytest.mark.very_slow
def test_dropout_does_not_know_of_a_stop(encoder: Path, tmp_path: Path) -> None:
    whole, stopped = (
        new_run(tmp_path / name, plan_of(encoder, tmp_path, "single-label", 6))
        for name in ("whole", "stopped")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
