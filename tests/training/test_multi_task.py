"""Several tasks at once: the losses of transformers' own classes over one body, on any number of ranks and engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.runs import events
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from tests.training.multi_tasks import (
    SIZES,
    WEIGHTS,
    Plain,
    batches,
    data_of,
    held_out,
    loaded,
    loss_of,
    plan_of,
)
from tests.training.plans import deepspeed
from tests.training.runs import batch_of, curve, evaluations, finish, model_directory, new_run
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS = 6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers without dropout."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tmp_path_factory.mktemp("encoder")
    return model_directory(folder, "bert", "AutoModel", num_hidden_layers=2, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_of(tmp_path_factory.mktemp("data"))


def run_of(path: Path, encoder: Path, data: dict[str, Any], world_size: int, **changes: Any) -> RunDirectory:
    run = new_run(path, plan_of(encoder, data, world_size, NUM_STEPS, **changes))
    finish(run, world_size)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: dict[str, Any]) -> RunDirectory:
    return run_of(tmp_path_factory.mktemp("whole") / "run", encoder, data, 1)


def by_task(run: RunDirectory) -> list[dict[str, float]]:
    return [one["loss_by_source"] for one in events.read(run.metrics_file) if one["kind"] == "train"]


def test_the_losses_are_those_of_transformers_own_classes_over_one_body(
    whole: RunDirectory, encoder: Path
) -> None:
    plain = Plain(encoder, whole.path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    losses, each = [], []
    for batch in batches(NUM_STEPS):
        loss, means = plain.step_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        each.append(means)
    torch.testing.assert_close([one["loss"] for one in curve(whole).values()], losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(by_task(whole), each, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"world_size": 2}, {"world_size": 1, "batch": batch_of(1, 1, 12)}, {"world_size": 2, "engine": 3}],
    ids=["2 ranks", "1x12", "ZeRO-3"],
)
def test_others_have_the_same_numbers(
    changes: dict[str, Any], whole: RunDirectory, encoder: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    changes = dict(changes)
    if stage := changes.pop("engine", 0):
        changes |= deepspeed(stage)
    run = run_of(tmp_path / "run", encoder, data, **changes)
    compare(run, whole, 1e-4)
    for ours, theirs in zip(by_task(run), by_task(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for step in (0, NUM_STEPS):
        assert evaluations(run)[step] == pytest.approx(evaluations(whole)[step], rel=1e-4, abs=1e-5)


def test_an_export_has_a_directory_for_each_head_that_transformers_loads(
    whole: RunDirectory, data: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "export"
    exported = export(whole, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "kind", "score", "words"]
    assert "score/model.safetensors" in exported.files
    last = evaluations(whole)[NUM_STEPS]
    for task in SIZES:
        model = loaded(out, task)
        losses = [loss_of(task, model, row) for row in held_out(data, task)]
        mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        assert mean == pytest.approx(last[f"{task}/loss"], rel=1e-5, abs=1e-6)
        assert not hasattr(model.config, "task_heads")
        own = json.loads((out / task / "launcher_evaluation.json").read_text())
        assert own["metrics"] == {
            name.removeprefix(f"{task}/"): value
            for name, value in last.items()
            if name.startswith(f"{task}/")
        }
    assert last["loss"] == pytest.approx(sum(WEIGHTS[task] * last[f"{task}/loss"] for task in SIZES))
    card = (out / "README.md").read_text()
    assert 'model = AutoModelForTokenClassification.from_pretrained("DIRECTORY/words")' in card
