"""Preparation and inspection of a job's data in a process of the training half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.tasks.task import Task

MODULE = "launcher.training.data.inspect"


def look(
    job: Job,
    role: str,
    num_rows: int,
    row: int | None,
    tokens: bool,
    watcher: Watcher,
    source: str | None = None,
    sheet: tuple[Path, int] | None = None,
) -> dict[str, Any]:
    """Return the counts, lengths, labels and samples that `run` would train or evaluate on: of one data set, of
    each of its sources, or of the named one. Raises ConfigurationError if there is none.

    sheet: the PNG to write, and how many of the samples that the model sees first it shows.
    """
    if role == "evaluation" and job.data.evaluation is None:
        raise ConfigurationError(
            Problem("--role", role, "the job names no data.evaluation; look at train, or name held-out rows")
        )
    if sheet is not None:
        _check_sheet(job, *sheet, row, source)
    request = {
        "roles": [role],
        "show": True,
        "sheet": None if sheet is None else [str(sheet[0].absolute()), sheet[1]],
        "num_rows": num_rows,
        "row": row,
        "tokens": tokens,
        "source": source,
    }
    [datasets] = ask(_here(job), MODULE, request, "data.json", watcher)["datasets"]
    result: dict[str, Any] = datasets
    return result


def _check_sheet(job: Job, path: Path, number: int, row: int | None, source: str | None) -> None:
    """Raise ConfigurationError if the sheet cannot be drawn."""
    task = type(tasks.of_job(job))
    alone = "--row" if row is not None else "--source" if source is not None else None
    reason = None
    if task.drawn is Task.drawn:
        able = ", ".join(name for name in tasks.TASKS if tasks.find(name).drawn is not Task.drawn)
        reason = f"the rows of a {task.name} job are not drawn; those of {able} are"
    elif path.suffix.lower() != ".png":
        reason = "is written as PNG; name a file that ends in .png"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}; create it, or name another file"
    elif alone is not None:
        reason = f"shows what the model sees first, of all rows; leave {alone} out"
    elif number < 1:
        reason = "has no samples by --rows 0; leave --rows out, or ask for some"
    if reason is not None:
        raise ConfigurationError(Problem("--sheet", str(path), reason))


def fill_cache(job: Job, watcher: Watcher) -> list[dict[str, Any]]:
    """Prepare all data of a job for a later `run`, and return the result for each data set.

    Raises ConfigurationError if there is nothing to prepare because the rows are streamed.
    """
    if job.data.streaming and job.data.evaluation is None:
        reason = "streamed rows are tokenised as training goes, and there are no others to prepare"
        raise ConfigurationError(Problem("data.streaming", True, reason))
    roles = ["evaluation"] if job.data.streaming else ["train", "evaluation"]
    request = {"roles": roles, "show": False}
    datasets: list[dict[str, Any]] = ask(_here(job), MODULE, request, "data.json", watcher)["datasets"]
    return datasets


def _here(job: Job) -> Plan:
    """Return the job's plan for one CPU process on this machine: its GPUs and nodes, which may be elsewhere, do
    not affect its data. Files of which most rows would be dropped have one as well: only a run refuses them."""
    data = job.data
    if data.unusable == "drop-few":
        job = job.model_copy(update={"data": data.model_copy(update={"unusable": "drop"})})
    try:
        plan = plan_job(job)
    except ConfigurationError:
        plan = plan_job(job, local=False)
    one = plan.mesh.model_copy(
        update=dict.fromkeys(("nodes", "ranks_per_node", "world_size", "dp_replicate", "dp_shard"), 1)
    )
    return plan.model_copy(
        update={
            "mesh": one.model_copy(update={"device": "cpu", "threads_per_rank": Hardware.detect().num_cores}),
            "data": plan.data.model_copy(update={"unusable": data.unusable}),
        }
    )
