"""Rank 0's part of a save: commit, make room, remove old checkpoints, report failures."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from launcher import tasks
from launcher.planner.plan import Plan
from launcher.runs import retention
from launcher.runs.checkpoints import FileRecord, Manifest, Progress, Stored, list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.notices import tell
from launcher.runs.places import here
from launcher.tasks.mixed import measured
from launcher.training.checkpoint.group import describe
from launcher.training.checkpoint.underway import Failing


@dataclass(frozen=True)
class Saving:
    """One save: the run's progress, and the directory that becomes a checkpoint."""

    progress: Progress
    metrics: dict[str, float]
    attempt: Path
    begin: float
    is_waited_for: bool
    """Whether training waits until it is finished."""


class Leader:
    """Rank 0's management of one run's checkpoints. `event(path, name, **fields)` writes an event."""

    def __init__(
        self, run: RunDirectory, plan: Plan, run_id: str, world_size: int, event: Callable[..., None]
    ) -> None:
        self._run, self._plan, self._run_id, self._world_size, self._event = (
            run,
            plan,
            run_id,
            world_size,
            event,
        )
        self._settings = plan.checkpoint
        # If no checkpoint is kept by it, the metric may be any word.
        self._better = measured(tasks.unprepared(plan)).get(plan.checkpoint.metric, "lower")
        self._known_good: set[int] = set()
        """Steps whose bytes this process has hashed while writing or reading."""
        self.failing = Failing()

    def read(self, step: int) -> None:
        """Note that the checkpoint of `step` is complete, as it was just written or read."""
        self._known_good.add(step)
        self.failing.saved(step)

    def make_room(self, save: Saving) -> bool:
        """Remove older checkpoints for this one, if that frees enough and a complete one stays. Return whether
        any was removed."""
        shutil.rmtree(save.attempt, ignore_errors=True)
        try:
            removed = retention.make_room(
                self._run, self._settings.keep_best, self._settings.metric, self._better, self._known_good
            )
        except OSError:
            return False
        if removed:
            with contextlib.suppress(OSError):
                self._event(
                    self._run.events_file,
                    "made_room",
                    step=save.progress.step,
                    removed=[stored.step for stored in removed],
                )
        return bool(removed)

    def commit(self, save: Saving, files: dict[str, FileRecord]) -> tuple[str | None, bool]:
        """Commit the save. Return the reason of a failure, or None, and whether the disk was full."""
        here.saving("committing")
        try:
            manifest = self._manifest(save, files)
            retention.commit(self._run, save.attempt, manifest)
        except (OSError, TypeError, ValueError) as error:
            return describe(error), has_no_room(error)
        self.read(manifest.step)
        seconds = round(time.perf_counter() - save.begin, 3)
        try:
            self._event(
                self._run.events_file,
                "saved",
                step=manifest.step,
                seconds=seconds,
                bytes=manifest.total_bytes,
            )
            keep = self._settings
            retention.prune(
                self._run, keep.keep_last, keep.keep_best, keep.metric, self._better, {manifest.step}
            )
        except OSError as error:
            warnings.warn(
                f"step {manifest.step} is saved, but older checkpoints could not be removed: "
                f"{describe(error)}",
                stacklevel=2,
            )
        return None, False

    def _manifest(self, save: Saving, files: dict[str, FileRecord]) -> Manifest:
        mesh = self._plan.mesh
        return Manifest(
            run_id=self._run_id,
            step=save.progress.step,
            engine=self._plan.engine,
            world_size=self._world_size,
            mesh={"replicate": mesh.dp_replicate, "shard": mesh.dp_shard},
            plan_digest=self._plan.digest(),
            created=time.time(),
            progress=save.progress,
            metrics=save.metrics,
            files=files,
        )

    def failed(self, save: Saving, reason: str) -> None:
        """Remove the files of a failed save, and report the reason on the screen and in an event."""
        self.failing.failed(save.progress.step, reason, not save.is_waited_for)
        shutil.rmtree(save.attempt, ignore_errors=True)
        message = f"the checkpoint of step {save.progress.step} could not be saved: {reason}"
        message += "" if save.is_waited_for else "; training goes on"
        with contextlib.suppress(OSError):  # the log may be on the same full disk
            print(f"warning: {message}", file=sys.stderr, flush=True)
        try:
            more = {"waited_for": True} if save.is_waited_for else {}
            self._event(self._run.events_file, "save_failed", step=save.progress.step, reason=reason, **more)
        except OSError as error:
            with contextlib.suppress(OSError):
                print(f"warning: {self._run.events_file}: {describe(error)}", file=sys.stderr, flush=True)

    def given_up(self, step: int, reason: str) -> None:
        """Report on the screen and in an event that a save was given up. Its own thread removes its files
        later."""
        tell(say=f"warning: a checkpoint could not be saved: {reason}; training goes on")
        self._event(self._run.events_file, "save_failed", step=step, reason=reason)

    def remove(self, steps: Collection[int]) -> None:
        """Delete the checkpoints of these steps. One that cannot be deleted stays, with a warning."""
        for stored in list_checkpoints(self._run):
            if stored.step in steps:
                try:
                    retention.remove(stored.directory)
                except OSError as error:
                    warnings.warn(f"{stored.name} could not be removed: {describe(error)}", stacklevel=2)

    def passed_over(self, stored: Stored, problems: list[str]) -> None:
        """Report why a checkpoint is not used."""
        reason = "; ".join(problems)
        print(
            f"checkpoint {stored.name} is not whole and is passed over: {reason}", file=sys.stderr, flush=True
        )
        self._event(self._run.events_file, "rejected", checkpoint=stored.name, reason=reason)


def has_no_room(error: BaseException) -> bool:
    """Return whether a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
