"""Ready-made jobs: each in docs/examples/ loads, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import tasks
from launcher.job.load import load
from launcher.planner.search import plan_job

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_plans(path: Path) -> None:
    job = load(path)
    plan = plan_job(job)
    assert plan.task == job.model.task
    assert plan.batch.global_batch_size == job.batch.global_batch_size
    assert path.read_text(encoding="utf-8").startswith("#"), "it begins with a comment that says what it is and how it is run"


def test_every_task_has_an_example() -> None:
    shown = {load(path).model.task for path in EXAMPLES}
    assert shown >= set(tasks.TASKS), f"no example of {sorted(set(tasks.TASKS) - shown)}"
