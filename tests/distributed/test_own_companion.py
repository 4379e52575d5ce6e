"""A task of a package of the user's own that asks a frozen model: planned, trained on both engines, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_own_task import folder, job, launcher
from tests.training.runs import model_directory

__all__ = ["folder"]  # the fixture: an installed package with rows and a model

TASK = '''
from text_length import TextLength

from launcher.tasks.companion import Companion
from launcher.tasks.task import Output


class Distilled(TextLength):
    """Say of a text what a teacher says of it."""

    class Columns(TextLength.Columns):
        teacher: str
        """A directory with the model to learn from."""

    name = "distilled"

    @property
    def companions(self):
        return {"teacher": Companion(self.data.teacher, "data.teacher")}

    def loss(self, model, batch, others):
        import torch

        from launcher.training.heads import own_forward

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wanted, own = others["teacher"](**inputs).logits, own_forward(model, inputs).logits
        errors = own.float()[:, 0] - wanted.float()[:, 0]
        return Output((errors**2 * batch["weights"]).sum(), torch.zeros(()))
'''


@pytest.fixture(scope="module")
def own(folder: Path) -> Path:
    """Return the folder of the package, which has the task of a student and its teacher now."""
    (folder / "distilled.py").write_text(TASK)
    entries = folder / "text_length-1.0.dist-info" / "entry_points.txt"
    entries.write_text(entries.read_text() + "distilled = distilled:Distilled\n")
    sizes = {"num_labels": 1, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    sizes |= {"attention_probs_dropout_prob": 0.0}
    model_directory(folder / "student", "bert", "AutoModelForSequenceClassification", **sizes)
    teacher: dict[str, Any] = sizes | {"hidden_size": 64, "seed": 3, "hidden_dropout_prob": 0.5}
    model_directory(folder / "teacher", "bert", "AutoModelForSequenceClassification", **teacher)
    return folder


def distilled(folder: Path, engine: str, teacher: str = "teacher") -> Path:
    """Write the job file of a student."""
    rows = {"train": {"path": "train.jsonl"}, "evaluation": {"path": "held-out.jsonl"}}
    data = rows | {"words": "words", "max_length": 64, "teacher": str(folder / teacher)}
    return job(
        folder,
        engine,
        model={"name": "student", "task": "distilled"},
        data=data,
        training={"max_steps": 20, "learning_rate": 3e-3},
    )


def records(path: Path, **wanted: str) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON that have these values."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


@pytest.mark.slow
@pytest.mark.very_slow
def test_a_student_learns_what_its_teacher_says_on_either_engine(own: Path) -> None:
    losses = []
    for engine in ("fsdp", "deepspeed"):
        run = own / f"distilled-{engine}"
        launcher(own, "run", distilled(own, engine), "--run-dir", run)
        first, *_, last = [
            event["metrics"]["error"] for event in records(run / "events.jsonl", event="evaluated")
        ]
        assert last < first / 2
        losses.append([record["loss"] for record in records(run / "metrics.jsonl", kind="train")])
        shown = json.loads(launcher(own, "checkpoint", "inspect", run, "--json").partition("\n}")[0] + "\n}")
        names = [tensor["name"] for tensor in shown["tensors"]]
        assert names and not [name for name in names if "teacher" in name]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_plan_says_that_nothing_counts_the_teacher(own: Path) -> None:
    text = launcher(own, "plan", distilled(own, "fsdp"))
    assert "the task asks models beside this one (teacher), whose memory nothing counts" in " ".join(
        text.split()
    )


@pytest.mark.very_slow
def test_a_teacher_that_is_not_there_is_named_by_its_key(own: Path) -> None:
    run = own / "no-teacher"
    text = launcher(own, "run", distilled(own, "fsdp", "nobody"), "--run-dir", run, code=2)
    assert "data.teacher" in text and "nobody" in text
