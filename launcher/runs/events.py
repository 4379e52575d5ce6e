"""The files events.jsonl and metrics.jsonl, with one JSON object per line: appending and reading."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.plain_files import check_plain, plain
from launcher.redaction import redact_all
from launcher.runs.records import parse


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one record, in one write call, so that lines of several processes never mix. Raises OSError, also
    for a full disk.

    After a line that a full disk or a crash cut short, it starts a new line.
    """
    line = (json.dumps(record, allow_nan=True, separators=(", ", ": ")) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    try:
        check_plain(path, os.fstat(descriptor).st_mode)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def event(path: Path, name: str, **fields: Any) -> None:
    """Append an event with the current time, in seconds since 1970. Secrets are redacted."""
    append(path, {"time": round(time.time(), 3), "event": name, **redact_all(fields)})


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every complete record; a last line that a crash cut short is skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", opener=plain) as file:
        for line in file:
            if (record := parse(line)) is not None:
                yield record


def steps(path: Path) -> dict[int, dict[str, Any]]:
    """Return the training record of each step; for a step that was run again after a crash, the last one."""
    return {
        record["step"]: record
        for record in read(path)
        if "loss" in record and record.get("kind", "train") == "train"
    }
