"""A point of a sweep that falls behind the others ends at its rung; the others do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for

pytestmark = pytest.mark.slow


def events(run: RunDirectory, name: str) -> list[int]:
    return [record["step"] for record in read(run.events_file) if record["event"] == name]


def test_a_point_that_learns_nothing_is_given_up_at_its_rung(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    sweep = tmp_path / "sweep"
    (sweep / "points").mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"metric": "loss", "halving": {"first": 2, "factor": 2}}))
    runs = []
    for number, rate in enumerate((1e-2, 1e-8)):
        every = {"value": 2, "unit": "steps"}
        plan = plan_for(model, data, 2, num_steps=6, training={"learning_rate": rate}, evaluate_every=every)
        runs.append(new_run(sweep / "points" / f"{number:03d}", plan))
        finish(runs[-1], 2, cache=tmp_path / "cache")
    good, bad = runs
    assert events(good, "halved") == [] and events(good, "finished") == [6]
    assert events(bad, "halved") == [2] and events(bad, "finished") == [2]
    assert bad.finished, "it is not left for the sweep to go on with"
