"""Hold a run to the files that it streams, without reading all that is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from launcher.data.streams import Stamp
from launcher.errors import DataError
from launcher.plain_files import plain, read_json
from launcher.runs.layout import write_atomically
from launcher.training.data.sources import BLOCK


def refuse_change(record: Path, stamps: Sequence[Stamp], what: str) -> None:
    """Hold a run to the files it began with, by their sizes and their first and last MiB: write what they
    are to `record`, or compare. Raises DataError naming the first file that changed, and where."""
    files = [{"path": one.path, "bytes": one.bytes, "ends": _ends(one.path)} for one in stamps]
    digest = xxhash.xxh3_128_hexdigest(json.dumps([[f["bytes"], f["ends"]] for f in files]).encode())
    if not record.exists():
        now = {"source_hash": digest, "samples_hash": "", "files": files}
        write_atomically(record, json.dumps(now) + "\n")
        return
    then = read_json(record)["files"]
    for old, new in zip(then, files, strict=False):
        if (old["bytes"], old.get("ends")) != (new["bytes"], new["ends"]):
            raise DataError(_difference(old, new))
    if len(then) != len(files):
        reason = f"{what} names {len(files):,} files, and named {len(then):,} when the run began"
        raise DataError(f"{reason}; put them back, or begin a new run")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return in words where a file is not what it was."""
    size = int(new["bytes"])
    if old["bytes"] != size:
        where = f"{old['bytes']:,} bytes then, {size:,} now, the first difference is at byte "
        where += f"{min(old['bytes'], size):,} or before"
    elif (old.get("ends") or [""])[0] != new["ends"][0]:
        where = f"the first difference is between byte 0 and byte {min(BLOCK, size):,}"
    else:
        where = f"a difference is between byte {max(0, size - BLOCK):,} and byte {size:,}"
    return f"{new['path']} changed since the run began: {where}; put it back as it was, or begin a new run"


def _ends(path: str) -> list[str]:
    """Return the hashes of a file's first and last MiB."""
    try:
        with open(path, "rb", opener=plain) as file:
            first = xxhash.xxh3_64_hexdigest(file.read(BLOCK))
            file.seek(max(0, os.fstat(file.fileno()).st_size - BLOCK))
            return [first, xxhash.xxh3_64_hexdigest(file.read(BLOCK))]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
