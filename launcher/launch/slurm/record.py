"""RUN/slurm/job.json: the Slurm job that a run belongs to."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import RunInUseError, SchedulerError
from launcher.launch.slurm.queue import OVER, Entry, queue
from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.records import made_of


def folder(run: RunDirectory) -> Path:
    """Return where submitit keeps what it submits, and Slurm what the nodes print."""
    return run.path / "slurm"


_JOB_ID = re.compile(r"([0-9][0-9A-Za-z_.+-]*)?")


@dataclass(frozen=True)
class JobRecord:
    """Record what was submitted. `job_id` is empty between the question to Slurm and its answer."""

    job_id: str
    script: str
    """The submission script; Slurm knows a job by it too, if its number never came back."""
    time: float

    @classmethod
    def read(cls, run: RunDirectory) -> JobRecord | None:
        """Return the record of a run; None for one that was never submitted."""
        try:
            known = made_of(cls, read_json(folder(run) / "job.json"))
            return known if _JOB_ID.fullmatch(known.job_id) else None
        except (OSError, ValueError, TypeError):
            return None

    def write(self, run: RunDirectory) -> None:
        folder(run).mkdir(parents=True, exist_ok=True)
        write_atomically(folder(run) / "job.json", json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def refuse_another(cls, run: RunDirectory, job_id: str) -> None:
        """Make sure that `job_id` is the run's job. A record of a job that is over, or none, is replaced.

        Raises RunInUseError where another job of this run is still there, or Slurm cannot say.
        """
        known = cls.read(run)
        if known is not None and known.job_id == job_id:
            return
        if known is not None and known.job_id and (live := _live(known.job_id)):
            raise RunInUseError(
                f"{run.path} belongs to job {known.job_id} ({live}); two at once would mix their files"
            )
        cls(job_id, known.script if known else "", round(time.time(), 3)).write(run)


def _live(job_id: str) -> str:
    """Return what state a job is in that still runs or will; empty for one that is over."""
    try:
        entry = queue([job_id]).get(job_id)
    except SchedulerError as error:
        return f"whose state is not known: {error}"
    return entry.state.lower() if entry is not None and is_live(entry) else ""


def is_live(entry: Entry | None) -> bool:
    """Return whether a job of the queue runs, or will run."""
    return entry is not None and entry.state not in OVER
