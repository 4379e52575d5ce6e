"""Checks of the run directory's file system: free space, speed, clock."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from launcher.doctor.finding import Finding, failed, ok, warning
from launcher.doctor.machine import nearest

SIZE = 32 << 20
"""Bytes that are written to measure the speed."""
_BLOCK = 1 << 20
_LITTLE_ROOM = 10e9
_SLOW = 20e6
_FAR_SECONDS = 5.0


def write(path: Path, word: str = "", size: int = SIZE) -> float:
    """Write an incompressible file that ends with `word`, and sync it to disk; return bytes per second."""
    block = os.urandom(_BLOCK)
    before = time.perf_counter()
    with path.open("xb") as file:
        for _ in range(max(1, size // _BLOCK)):
            file.write(block)
        file.write(word.encode())
        file.flush()
        os.fsync(file.fileno())
    return max(1, size // _BLOCK) * _BLOCK / (time.perf_counter() - before)


def is_whole(path: Path, word: str) -> bool:
    """Return whether a file can be read in full, including its last word."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(word)))
        return file.read() == word.encode()


def check(directory: Path) -> list[Finding]:
    """Check space and speed where a run directory is, or would be; the file written for it is removed."""
    place = nearest(directory)
    path = place / f".launcher-doctor-{secrets.token_hex(4)}"
    try:
        before = time.time()
        speed = write(path)
        ahead = before - path.stat().st_mtime
    except OSError as error:
        advice = "name a directory that you may write with --directory"
        return [failed("directory", f"{place}: {error.strerror}", advice)]
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(place).free
    findings = [judge(place, free, speed)]
    # The file was written after `before`: the remaining difference is the time that writing took.
    if ahead > _FAR_SECONDS:
        advice = (
            "have both clocks synchronised: files look older than they are, and a run may seem to stand still"
        )
        findings.append(warning("clock", f"is {ahead:.0f} s ahead of the file system of {place}", advice))
    return findings


def judge(place: Path, free: float, speed: float) -> Finding:
    """Return the finding for the free space and the speed."""
    facts = f"{place}: {free / 1e9:.0f} GB free, written at {speed / 1e6:.0f} MB/s"
    if free < _LITTLE_ROOM:
        advice = "make room: one checkpoint takes 12 bytes for each parameter of the model"
        return warning("directory", facts, advice)
    if speed < _SLOW:
        return warning("directory", facts, "a save will be slow; name a faster file system with --run-dir")
    return ok("directory", facts)
