"""What trackers are told: names, steps and hyper-parameters; and that a run that goes on is one run there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import pytest

from launcher.runs.layout import RunDirectory
from launcher.training.reporting.trackers import Trackers, settings
from tests.training.plans import plan_of
from tests.training.runs import causal_data, curve, evaluations, finish, new_run, plan_for

pytestmark = pytest.mark.distributed
STEP_NAMES = {
    *("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/num_input_tokens_seen"),
    *("train/tokens_per_second", "train/step_seconds", "train/data_seconds", "train/peak_memory_gib"),
}
TRACKING = {"project": "reviews", "group": "ablation", "tags": ("small", "first")}


def scalars(folder: Path) -> dict[str, dict[int, list[float]]]:
    """The values that TensorBoard shows, by name and step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            shown[name][event.step].append(event.value)
    return shown


def two_attempts(run: RunDirectory, tracker: str) -> None:
    """Four steps, of which the last two are lost, and done again by a second attempt with other losses."""
    plan = plan_of(run.path / "model", trackers=(tracker,), tracking=TRACKING)
    for first, losses in ((0, (8.0, 7.0, 6.0, 5.0)), (2, (3.0, 2.0))):
        trackers = Trackers(run, plan, first)
        assert [one.name for one in trackers._trackers] == [tracker]
        for step, loss in enumerate(losses, first + 1):
            trackers.log({"train/loss": loss, "samples": "why? -> so"}, step)
        trackers.finish()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def test_tensorboard_shows_each_step_of_a_run_once(run: RunDirectory) -> None:
    pytest.importorskip("tensorboard")
    two_attempts(run, "tensorboard")
    shown = scalars(run.path / "trackers" / "test")
    assert shown["train/loss"] == {1: [8.0], 2: [7.0], 3: [3.0], 4: [2.0]}
    written = b"".join(path.read_bytes() for path in (run.path / "trackers").rglob("*tfevents*"))
    assert b"why? -> so" in written
    assert b"training.learning_rate" in written and b"hparams" in written
    assert {path.name for path in (run.path / "trackers").iterdir()} == {"test"}, "no folder for each attempt"


@pytest.mark.slow
def test_a_training_run_in_tensorboard(tmp_path: Path, model: Path) -> None:
    data = causal_data(tmp_path / "data")
    epoch, every = {"value": 1, "unit": "epochs"}, {"value": 5, "unit": "steps"}
    plan = plan_for(model, data, 1, 4, trackers=("tensorboard",), length=epoch, evaluate_every=every)
    run = new_run(tmp_path / "run", plan)
    finish(run, 1, stop_at=2)
    finish(run, 1)
    shown, steps = scalars(run.path / "trackers" / "test"), curve(run)
    assert {name for name in shown if name.startswith("train/")} == STEP_NAMES
    assert all(
        {step: len(values) for step, values in shown[name].items()} == dict.fromkeys(steps, 1)
        for name in STEP_NAMES
    )
    drawn = {name: [values[0] for values in shown[name].values()] for name in STEP_NAMES}
    for name in ("loss", "grad_norm", "learning_rate"):
        assert drawn[f"train/{name}"] == pytest.approx([step[name] for step in steps.values()], rel=1e-6)
    tokens = itertools.accumulate(step["num_tokens"] for step in steps.values())
    assert drawn["train/num_input_tokens_seen"] == list(tokens)
    assert drawn["train/epoch"][-1] == 1.0 and drawn["train/epoch"] == sorted(drawn["train/epoch"])
    measured = {step: metrics["loss"] for step, metrics in evaluations(run).items()}
    assert {step: values[-1] for step, values in shown["eval/loss"].items()} == pytest.approx(
        measured, rel=1e-6
    )


def test_mlflow_keeps_one_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_attempts(run, "mlflow")
    found = mlflow.search_runs(experiment_names=["reviews"], output_format="list")
    assert [one.info.run_name for one in found] == ["test"]
    assert found[0].data.params["training.learning_rate"] == "0.01"
    tags = found[0].data.tags
    assert (tags["group"], tags["tags"], tags["launcher.run_id"]) == (
        "ablation",
        "small, first",
        run.run_id(),
    )
    history = mlflow.MlflowClient().get_metric_history(found[0].info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [
        (1, 8.0), (2, 7.0), (3, 3.0), (3, 6.0), (4, 2.0), (4, 5.0),
    ]  # fmt: skip
    assert found[0].info.status == "FINISHED"


def test_trackio_keeps_one_run(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    two_attempts(run, "trackio")
    api = trackio.Api()
    runs = list(api.runs("reviews"))
    assert [one.name for one in runs] == [f"test-{run.run_id()[:8]}"]


def test_wandb_keeps_one_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_attempts(run, "wandb")
    parts = sorted((run.path / "trackers" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(f"-{run.run_id()}") for part in parts)


@pytest.mark.very_slow
def test_two_ranks_and_three_trackers(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("wandb", "mlflow", "trackio")
    mlflow = {name: pytest.importorskip(name) for name in names}["mlflow"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    data, every = causal_data(tmp_path / "data"), {"value": 2, "unit": "steps"}
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 4, trackers=names, evaluate_every=every))
    finish(run, 2, stop_at=2)
    finish(run, 2)
    assert "left out" not in (run.path / "rank-0.log").read_text()
    assert len(list((run.path / "trackers" / "wandb").glob("offline-run-*"))) == 2
    mlflow.set_tracking_uri(f"sqlite:///{run.path}/trackers/mlflow.db")
    (kept,) = mlflow.search_runs(experiment_names=["launcher"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(kept.info.run_id, "train/loss")
    losses = {step: record["loss"] for step, record in curve(run).items()}
    assert {one.step: one.value for one in history} == pytest.approx(losses)
    assert kept.data.metrics["eval/loss"] == pytest.approx(evaluations(run)[4]["loss"])
    assert kept.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("tracker", "variable"),
    [("wandb", "WANDB_PROJECT"), ("mlflow", "MLFLOW_EXPERIMENT_NAME"), ("trackio", "TRACKIO_PROJECT")],
)
def test_the_project_is_that_of_the_job_of_a_variable_or_launchers(
    tracker: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.training.reporting.trackers import _project

    monkeypatch.delenv(variable, raising=False)
    assert _project(plan_of(tmp_path), tracker) == "launcher"
    monkeypatch.setenv(variable, "ours")
    assert _project(plan_of(tmp_path), tracker) == "ours"
    assert _project(plan_of(tmp_path, tracking=TRACKING), tracker) == "reviews"


def test_settings_are_plain_and_without_secrets(run: RunDirectory) -> None:
    plan = plan_of(run.path / "model", training__betas=(0.9, 0.95), tracking=TRACKING)
    secret = "hf_" + "a" * 34
    plan = plan.model_copy(update={"name": secret})
    known = settings(run, plan)
    assert known["training.betas"] == "[0.9, 0.95]" and known["batch.global_batch_size"] == 4
    assert known["run_id"] == run.run_id() and known["run_directory"] == str(run.path)
    assert all(isinstance(value, (bool, int, float, str)) for value in known.values())
    assert secret not in str(known)
    assert not any(key.startswith(("decisions", "refused", "tracking")) for key in known)
