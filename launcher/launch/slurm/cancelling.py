"""Cancel a run's Slurm job."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.launch.slurm.client import patiently
from launcher.launch.slurm.queue import queue
from launcher.launch.slurm.record import JobRecord, is_live
from launcher.launch.slurm.submission import find
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory

_SECONDS_TO_ASK = 60.0


def cancel(run: RunDirectory) -> str:
    """Cancel the job of a run, and give its number. Raises ConfigurationError where there is none that runs
    or waits."""
    known = JobRecord.read(run)
    if known is None:
        reason = (
            "was not submitted to Slurm; a run on this machine is stopped with Ctrl-C, or with SIGTERM to "
            "its launcher"
        )
        raise ConfigurationError(Problem("RUN", str(run.path), reason))
    job_id = known.job_id or find(Path(known.script), time.monotonic() + _SECONDS_TO_ASK) or ""
    if not job_id or not is_live(queue([job_id]).get(job_id)):
        raise ConfigurationError(
            Problem("RUN", str(run.path), f"its job {job_id} is over; there is nothing to cancel")
        )
    event(run.events_file, "cancelling", job=job_id)
    patiently(["scancel", job_id], _SECONDS_TO_ASK)
    return job_id
