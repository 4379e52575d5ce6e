"""Prepare and inspect a job's data in a process of the training half."""

from __future__ import annotations

from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job

MODULE = "launcher.training.data.inspect"


def look(
    job: Job,
    role: str,
    num_rows: int,
    row: int | None,
    tokens: bool,
    watcher: Watcher,
    source: str | None = None,
) -> dict[str, Any]:
    """Return what `run` would train on: counts, lengths, labels and samples of one data set, of each of its
    sources, or of the one that is named. Raises ConfigurationError where there is none."""
    if role == "evaluation" and job.data.evaluation is None:
        raise ConfigurationError(
            Problem("--role", role, "the job names no data.evaluation; look at train, or name held-out rows")
        )
    request = {
        "roles": [role],
        "show": True,
        "num_rows": num_rows,
        "row": row,
        "tokens": tokens,
        "source": source,
    }
    [datasets] = ask(_here(job), MODULE, request, "data.json", watcher)["datasets"]
    result: dict[str, Any] = datasets
    return result


def fill_cache(job: Job, watcher: Watcher) -> list[dict[str, Any]]:
    """Prepare all data of a job, for `run` to find; what became of each data set.

    Raises ConfigurationError where there is nothing to prepare, as rows are streamed.
    """
    if job.data.streaming and job.data.evaluation is None:
        reason = "streamed rows are tokenised as training goes, and there are no others to prepare"
        raise ConfigurationError(Problem("data.streaming", True, reason))
    roles = ["evaluation"] if job.data.streaming else ["train", "evaluation"]
    request = {"roles": roles, "show": False}
    datasets: list[dict[str, Any]] = ask(_here(job), MODULE, request, "data.json", watcher)["datasets"]
    return datasets


def _here(job: Job) -> Plan:
    """The job's plan, for one process on this machine: its GPUs and nodes, which may be elsewhere, change
    nothing about its data."""
    try:
        plan = plan_job(job)
    except ConfigurationError:
        plan = plan_job(job, local=False)
    one = plan.mesh.model_copy(
        update=dict.fromkeys(("nodes", "ranks_per_node", "world_size", "dp_replicate", "dp_shard"), 1)
    )
    return plan.model_copy(
        update={
            "mesh": one.model_copy(update={"device": "cpu", "threads_per_rank": Hardware.detect().num_cores})
        }
    )
