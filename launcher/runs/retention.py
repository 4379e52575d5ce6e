"""The commit, retention and removal of checkpoints.

Callers of functions that change something hold the run's lock.
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
    """Return the `count` best checkpoints, the best first, among those with a finite value of the metric."""
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
    """Return the checkpoints to remove: never the newest good one, nor any newer than it.

    `better`: the direction in which `metric` improves. `known_good`: steps that are trusted without reading,
    because their bytes were hashed while they were written.
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
    """Delete the checkpoints of `to_prune` and return them. The caller holds the run's lock. Raises OSError."""
    removed = to_prune(run, keep_last, keep_best, metric, better, known_good)
    for stored in removed:
        remove(stored.directory)
    return removed


def make_room(
    run: RunDirectory, keep_best: int, metric: str, better: Better = "lower", known_good: Collection[int] = ()
) -> list[Stored]:
    """Delete the oldest checkpoints until one more of the newest one's size fits, and return them. Raises
    OSError.

    None is deleted if that would not be enough. The newest good one, and those kept as the best, always stay.
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
    # A quota is not visible here: if there seems to be room all the same, at least the oldest one is deleted.
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
    """Delete a checkpoint, renamed first so that a half-deleted one never appears under its name. Raises
    OSError."""
    doomed = directory.with_name(f"{REMOVED_PREFIX}{directory.name.lstrip('.')}-{secrets.token_hex(4)}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run: RunDirectory) -> list[str]:
    """Remove the leftovers of dead attempts, and return their names. The caller holds the run's lock, so no
    writer is alive.

    A checkpoint that was renamed for a replacement of the same step gets its name back if the replacement is
    missing.
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
    """Turn the directory of a finished save into a checkpoint: manifest, sync, one rename. Raises OSError, and
    then nothing has changed.

    An older checkpoint of the same step (rejected, or saved before a restart) is renamed first and deleted last.
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
