"""Which checkpoints are committed, kept and removed.

Whoever calls a function that changes something here holds the run's lock.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from launcher.metrics import Better, cost
from launcher.runs.checkpoints import MANIFEST_NAME, Manifest, Stored, content_problems, list_checkpoints
from launcher.runs.layout import STEP_DIRECTORY, RunDirectory, sync_directory

ATTEMPT_PREFIX = ".attempt-"
REPLACED_PREFIX = ".replaced-"
REMOVED_PREFIX = ".removed-"


def best(whole: list[Stored], count: int, metric: str, better: Better) -> list[Stored]:
    """Return so many of the checkpoints, the best first, of those that measured the metric as a number."""
    scored = [
        (cost(stored.manifest.metrics[metric], better), -stored.step, stored)
        for stored in whole
        if stored.manifest is not None and math.isfinite(stored.manifest.metrics.get(metric, math.nan))
    ]
    return [stored for _, _, stored in sorted(scored, key=lambda entry: entry[:2])[:count]]


def to_prune(
    run: RunDirectory,
    keep_last: int,
    keep_best: int,
    metric: str,
    better: Better = "lower",
    known_good: Collection[int] = (),
) -> list[Stored]:
    """Return the checkpoints that retention gives up: never the newest good one, nor anything newer than it.

    `better`: which value of `metric` is the best. `known_good`: steps that need no reading to be trusted, as
    their bytes were hashed while they were written.
    """
    listed = list_checkpoints(run)
    good = _newest_good(listed, known_good)
    if good is None:
        return []
    whole = [stored for stored in listed if not stored.problems]
    kept = (whole[-keep_last:] if keep_last > 0 else []) + best(whole, keep_best, metric, better)
    return [stored for stored in listed if stored not in kept and stored.step < good]


def _newest_good(listed: Iterable[Stored], known_good: Collection[int]) -> int | None:
    for stored in sorted(listed, key=lambda entry: entry.step, reverse=True):
        if stored.problems or stored.manifest is None:
            continue
        if stored.step in known_good or not content_problems(stored.directory, stored.manifest.files):
            return stored.step
    return None


def prune(
    run: RunDirectory,
    keep_last: int,
    keep_best: int,
    metric: str,
    better: Better = "lower",
    known_good: Collection[int] = (),
) -> list[Stored]:
    """Delete what `to_prune` names and return it. The caller holds the run's lock. Raises OSError."""
    removed = to_prune(run, keep_last, keep_best, metric, better, known_good)
    for stored in removed:
        remove(stored.directory)
    return removed


def make_room(
    run: RunDirectory, keep_best: int, metric: str, better: Better = "lower", known_good: Collection[int] = ()
) -> list[Stored]:
    """Delete as many of the oldest checkpoints as one more needs that is as large as the newest, and return
    them. Raises OSError.

    None where all that may go would not be enough: the newest good one stays, and those that are kept as the
    best.
    """
    may_go = to_prune(run, 1, keep_best, metric, better, known_good)
    newest = next(
        (
            stored.manifest
            for stored in reversed(list_checkpoints(run))
            if stored.manifest and not stored.problems
        ),
        None,
    )
    if newest is None or not may_go:
        return []
    disk = os.statvfs(run.checkpoints)
    # A quota is not seen here: where there seems to be room all the same, the oldest one is what can be given
    # up.
    missing = max(1, newest.total_bytes - disk.f_bavail * disk.f_frsize)
    removed: list[Stored] = []
    for stored in may_go:
        if missing > 0:
            removed.append(stored)
            missing -= sum(path.stat().st_size for path in stored.directory.iterdir())
    if missing > 0:
        return []
    for stored in removed:
        remove(stored.directory)
    return removed


def remove(directory: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one is never seen under its name. Raises
    OSError."""
    doomed = directory.with_name(f"{REMOVED_PREFIX}{directory.name.lstrip('.')}-{secrets.token_hex(4)}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run: RunDirectory) -> list[str]:
    """Clear away what dead attempts left, and return the names. The caller holds the run's lock: no writer is
    alive.

    A checkpoint that was set aside for a newer one of its step, which then did not arrive, gets its name
    back.
    """
    cleared: list[str] = []
    for path in sorted(run.checkpoints.glob(".*")) if run.checkpoints.is_dir() else []:
        if path.name.startswith(REPLACED_PREFIX):
            original = run.checkpoints / path.name.removeprefix(REPLACED_PREFIX).rsplit("-", 1)[0]
            if STEP_DIRECTORY.match(original.name) and not original.exists():
                path.rename(original)
                continue
        if path.name.startswith((ATTEMPT_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX)):
            shutil.rmtree(path)
            cleared.append(path.name)
    return cleared


def commit(run: RunDirectory, attempt: Path, manifest: Manifest) -> Path:
    """Make a written attempt a checkpoint: manifest, sync, one rename. Raises OSError, and then nothing has
    changed.

    An older checkpoint of the same step (rejected, or saved before a restart) is set aside first and deleted
    last.
    """
    _write_synced(attempt / MANIFEST_NAME, manifest.to_json().encode())
    sync_directory(attempt)
    target = run.checkpoint(manifest.step)
    aside: Path | None = None
    if target.exists():
        aside = run.checkpoints / f"{REPLACED_PREFIX}{target.name}-{secrets.token_hex(4)}"
        target.rename(aside)
    try:
        attempt.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    sync_directory(run.checkpoints)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _write_synced(path: Path, content: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
