"""Under Slurm a run that ran out of memory late, and lost nothing by it, goes on with smaller passes by
itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.launch.slurm import after_job
from launcher.launch.slurm.policy import Attempt, Decision
from launcher.runs.layout import RunDirectory


@pytest.fixture
def decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the batch script decides after an attempt that ran out of memory."""
    settings = SimpleNamespace(requeue=True, attempts_without_progress=3)
    failed = Attempt(
        1, "failed", 0, 5, failure_class="out-of-memory", cause="CUDA out of memory", host="n1", step=5
    )
    acted: list[Decision] = []
    monkeypatch.setattr(
        after_job.Allocation, "of", lambda variables: SimpleNamespace(job_id="7", raw_job_id="7")
    )
    monkeypatch.setattr(after_job, "_run_of", lambda path, allocation: RunDirectory(tmp_path))
    monkeypatch.setattr(after_job, "find_attempt", lambda run, allocation: 1)
    monkeypatch.setattr(after_job, "read_outcome", lambda run, number: {"end": "failed", "exit_code": 4})
    monkeypatch.setattr(after_job, "_meaning", lambda allocation, end: end)
    monkeypatch.setattr(after_job, "_nodes_lost", lambda run, number: [])
    monkeypatch.setattr(after_job, "write_outcome", lambda *arguments, **more: None)
    monkeypatch.setattr(after_job, "attempts", lambda run: [failed])
    monkeypatch.setattr(after_job.Plan, "read", lambda path: SimpleNamespace(slurm=settings))
    monkeypatch.setattr(
        after_job, "_act", lambda run, allocation, decision, end, code: acted.append(decision) or code
    )

    def decide(cut: Any, requeue: bool = True) -> Decision:
        settings.requeue = requeue
        monkeypatch.setattr(after_job, "cut", cut)
        after_job.main([str(tmp_path), "4"])
        return acted.pop()

    return decide


def test_it_goes_on_where_a_pass_could_be_cut(decided: Any) -> None:
    told: list[bool] = []
    assert decided(lambda run, here: told.append(here) or (None, "half of it")) == Decision(
        True, "half of it"
    )
    assert told == [False]
    assert not decided(lambda run, here: None).again
    assert not decided(lambda run, here: (None, "half of it"), requeue=False).again
