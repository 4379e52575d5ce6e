"""A task of a package that launcher does not know: one class, and from the plan to the export nothing else is
touched."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.runs import model_directory

TASK = '''
from typing import ClassVar

from launcher.lazy import Lazy
from launcher.data.rows import text_of
from launcher.data.section import Data
from launcher.tasks.task import Encoded, Evaluator, Output, Sample, Task, Traits

np, torch = Lazy("numpy"), Lazy("torch")


class TextLength(Task):
    """Predict how long a text is, in tenths of its words."""

    class Columns(Data):
        words: str
        """The column of the text."""

    class Error(Evaluator):
        def __init__(self):
            self.sums = np.zeros(2)

        def update(self, output, batch):
            self.sums += [float(output.loss_sum), float(batch["weights"].sum())]

        def state(self):
            return [self.sums]

        def compute(self, states):
            squared, number = np.sum([sums for sums, in states], axis=0)
            return {"loss": squared / number, "error": (squared / number) ** 0.5}

    name = "text-length"
    traits = Traits("padded", causal=False, head="one-per-sample")
    column_ways = (("words",),)
    metrics = {"loss": "lower", "error": "lower"}

    @property
    def columns(self):
        return (self.data.words,)

    def texts(self, row):
        return [text_of(row, self.data.words)]

    @property
    def auto_class(self):
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def configure(self, config):
        config.num_labels = 1

    def encode(self, rows, processor):
        ids = processor([self.texts(row)[0] for row in rows])["input_ids"]
        arrays = [{"input_ids": np.array(one, dtype=np.int32), "goal": np.array([len(one) / 10], dtype=np.float32)} for one in ids]
        return [Encoded(one, 1, len(one["input_ids"])) for one in arrays]

    def example(self, length):
        return Sample({"input_ids": np.zeros(length, dtype=np.int32), "goal": np.zeros(1, dtype=np.float32)}, 0, length)

    def collate(self, items, draws=None):
        samples = [sample for item in items for sample in item]
        mask = np.arange(max(sample.length for sample in samples)) < np.array([[sample.length] for sample in samples])
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate([sample["input_ids"] for sample in samples])
        goals = torch.tensor(np.concatenate([sample["goal"] for sample in samples]))
        weights = torch.tensor([float(sample.weight) for sample in samples])
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long(), "goals": goals, "weights": weights}

    def loss(self, model, batch):
        from launcher.training.heads import own_forward

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        errors = own_forward(model, inputs).logits.float()[:, 0] - batch["goals"]
        return Output((errors**2 * batch["weights"]).sum(), torch.zeros(()))

    def evaluator(self):
        return self.Error()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed package with the task, a model and rows."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text_length.py").write_text(TASK)
    package = folder / "text_length-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: text-length\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[launcher.tasks]\ntext-length = text_length:TextLength\n")
    model_directory(
        folder / "model",
        "bert",
        "AutoModelForSequenceClassification",
        num_labels=1,
        max_position_embeddings=64,
    )
    generator = random.Random(0)
    rows = [{"words": " ".join(["w3"] * generator.randrange(1, 40))} for _ in range(96)]
    for name, part in (("train", rows[:80]), ("held-out", rows[80:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def launcher(folder: Path, *arguments: Any, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "launcher.cli.main", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def job(folder: Path, engine: str, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "own",
        "model": {"name": "model", "task": "text-length"},
        "data": {
            "train": {"path": "train.jsonl"},
            "evaluation": {"path": "held-out.jsonl"},
            "words": "words",
            "max_length": 64,
        },
        "batch": {"global_batch_size": 8},
        "training": {
            "max_steps": 60,
            "learning_rate": 3e-3,
            "early_stopping": {"metric": "error", "patience": 9},
        },
        "parallel": {"engine": engine, "shard": "full"},
        "cluster": {"ranks_per_node": 2, "gpus_per_node": 0},
        "precision": "fp32",
    }
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.very_slow)])
def test_a_task_is_one_class(engine: str, folder: Path) -> None:
    plan = json.loads(launcher(folder, "plan", job(folder, engine), "--json", "--no-trace"))
    assert plan["task"] == "text-length" and plan["layout"] == "padded"
    run = folder / f"run-{engine}"
    launcher(folder, "run", job(folder, engine), "--run-dir", run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    first, *_, last = [event["metrics"]["error"] for event in events if event["event"] == "evaluated"]
    assert last < first / 2
    assert any(event["event"] == "checked" for event in events), (
        "the check after loading knows no task by name"
    )
    if engine == "deepspeed":
        return  # what follows reads the same checkpoint for both
    assert "error" in launcher(folder, "evaluate", run)
    launcher(folder, "export", run, "--out", folder / f"export-{engine}")
    from transformers import AutoModelForSequenceClassification

    assert (
        AutoModelForSequenceClassification.from_pretrained(folder / f"export-{engine}").config.num_labels == 1
    )


@pytest.mark.slow
def test_it_is_planned_by_a_trace_too(folder: Path) -> None:
    assert "text-length" in launcher(folder, "plan", job(folder, "fsdp"), "--trace")


def test_its_keys_are_checked_like_any_others(folder: Path) -> None:
    wrong = job(folder, "fsdp", data={"train": {"path": "train.jsonl"}, "word": "words", "label": "x"})
    text = launcher(folder, "validate", wrong, code=2)
    assert "data.word" in text and "the nearest known one is data.words" in text
    assert (
        "data.label" in text
        and "belongs to audio-classification, image-classification and sequence-classification, and model.task is text-length, which reads words"
        in text
    )
    metric = job(folder, "fsdp", checkpoint={"keep_best": 1, "metric": "eror"})
    assert "a text-length evaluation measures loss, error; the nearest is error" in launcher(
        folder, "validate", metric, code=2
    )
    unknown = job(folder, "fsdp", model={"name": "model", "task": "text-lengths"})
    assert "the nearest is text-length" in launcher(folder, "validate", unknown, code=2)
