"""What Slurm allocated: read from its variables, and shared with the other nodes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.launch.slurm.queue import expand
from launcher.plain_files import read_json
from launcher.runs import secret
from launcher.runs.layout import RunDirectory, write_atomically

FILE = "allocation.json"
_CLAIM = "claim.json"
_REFUSED = "refused.json"


@dataclass(frozen=True)
class Allocation:
    """This process's place in a Slurm job."""

    job_id: str
    """As people and squeue write it; of an array's task NUMBER_TASK."""
    raw_job_id: str
    """As Slurm counts it."""
    restart: int
    """How often the job was requeued before."""
    node_index: int
    nodes: str
    """As Slurm abbreviates them: n[1-3]."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Allocation:
        """Read it from Slurm's variables. Raises ConfigurationError where they are not there."""
        raw = environment.get("SLURM_JOB_ID", "")
        if not raw.isdigit():
            raise ConfigurationError(
                Problem(
                    "SLURM_JOB_ID",
                    raw or None,
                    "is no number: this is started by Slurm, see `launcher submit`",
                )
            )
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job_id=f"{array}_{task}" if array and task else raw,
            raw_job_id=raw,
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
            node_index=int(environment.get("SLURM_NODEID") or 0),
            nodes=environment.get("SLURM_JOB_NODELIST") or os.uname().nodename,
        )

    @functools.cached_property
    def hosts(self) -> tuple[str, ...]:
        """Return every node by its name, in Slurm's order."""
        return expand(self.nodes)

    @property
    def is_head(self) -> bool:
        """Return whether this is the first node, which decides for all."""
        return self.node_index == 0

    @property
    def first_port(self) -> int:
        """Return where to look for a free port: two jobs on one machine begin at different places."""
        return 20_000 + int(self.raw_job_id) * 7 % 20_000


@dataclass(frozen=True)
class Assignment:
    """One attempt of a job, as its head tells the other nodes."""

    job_id: str
    restart: int
    hosts: tuple[str, ...]
    """Those that take part, a part of the allocation where not all can be used."""
    address: str
    port: int
    checkpoint_step: int
    """What the newest checkpoint was when it began: what has been gained since is progress."""
    time: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def claim(run: RunDirectory, allocation: Allocation) -> None:
    """Say that the run is this allocation's from now on. An older one that lives on where Slurm has given up
    a node sees it and ends."""
    folder = run.path / "slurm"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / _CLAIM, json.dumps([allocation.job_id, allocation.restart]) + "\n")


def is_claimed_by_another(run: RunDirectory, allocation: Allocation) -> bool:
    """Return whether a later allocation has claimed the run."""
    try:
        return bool(read_json(run.path / "slurm" / _CLAIM) != [allocation.job_id, allocation.restart])
    except (OSError, ValueError):
        return False


def is_claimed(run: RunDirectory, allocation: Allocation) -> bool:
    """Return whether this allocation is the last that has claimed the run."""
    try:
        return bool(read_json(run.path / "slurm" / _CLAIM) == [allocation.job_id, allocation.restart])
    except (OSError, ValueError):
        return False


def has_gone_on(run: RunDirectory, allocation: Allocation) -> bool:
    """Return whether a later incarnation of this job has claimed the run."""
    try:
        job_id, restart = read_json(run.path / "slurm" / _CLAIM)
        return bool(job_id == allocation.job_id and restart > allocation.restart)
    except (OSError, ValueError, TypeError):
        return False


def refuse(run: RunDirectory, allocation: Allocation) -> None:
    """Tell the other nodes that there will be no attempt, so that they do not wait for one."""
    (run.path / "slurm").mkdir(exist_ok=True)
    write_atomically(
        run.path / "slurm" / _REFUSED, json.dumps([allocation.job_id, allocation.restart]) + "\n"
    )


def _is_refused(run: RunDirectory, allocation: Allocation) -> bool:
    try:
        return bool(read_json(run.path / "slurm" / _REFUSED) == [allocation.job_id, allocation.restart])
    except (OSError, ValueError):
        return False


def begin_attempt(run: RunDirectory, assignment: Assignment) -> int:
    """Make the next attempt's directory with the assignment and a secret in it from the first moment on; its
    number."""
    run.attempts.mkdir(exist_ok=True)
    new = run.attempts / f".new-{secrets.token_hex(4)}"
    new.mkdir()
    secret.make(new)
    write_atomically(new / FILE, json.dumps(assignment.to_dict(), indent=2) + "\n")
    while True:
        number = run.last_attempt() + 1
        try:
            new.rename(run.attempt(number))  # fails where there is one with anything in it
            return number
        except OSError:
            if not run.attempt(number).exists():
                raise


def read_assignment(run: RunDirectory, number: int) -> Assignment | None:
    """Return what an attempt's head wrote; None for an attempt that Slurm did not start."""
    try:
        content = read_json(run.attempt(number) / FILE)
        return Assignment(**{**content, "hosts": tuple(content["hosts"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def find_attempt(run: RunDirectory, allocation: Allocation) -> int | None:
    """Return the attempt that this allocation's head has begun; None before it has."""
    number = run.last_attempt()
    assignment = read_assignment(run, number) if number else None
    return (
        number
        if assignment and (assignment.job_id, assignment.restart) == (allocation.job_id, allocation.restart)
        else None
    )


def await_attempt(run: RunDirectory, allocation: Allocation, seconds: float) -> int | None:
    """Wait for the head to begin; None where it has not within `seconds`, will not, or the run is finished."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not run.finished and not _is_refused(run, allocation):
        if (number := find_attempt(run, allocation)) is not None:
            return number
        _look_afresh(run.attempts)
        time.sleep(0.1)
    return None


def _look_afresh(directory: Path) -> None:
    """An NFS client may show a directory as it was up to a minute ago, unless it has changed something there
    itself."""
    with contextlib.suppress(OSError):
        (directory / f".seen-{os.uname().nodename}").touch()
        (directory / f".seen-{os.uname().nodename}").unlink()
