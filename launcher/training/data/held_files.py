"""The check that a run's streamed files have not changed, without reading them in full."""

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


def refuse_change(record: Path, stamps: Sequence[Stamp], what: str, *, writes: bool) -> str:
    """Compare a run's files with `record`, by their sizes and their first and last MiB. If there is no record
    and this rank `writes`, write it.

    Return a hash of sizes and ends. Raises DataError naming the first file that was added, removed or
    changed, and where.
    """
    files = [{"path": one.path, "bytes": one.bytes, "ends": _ends(one.path)} for one in stamps]
    digest = xxhash.xxh3_128_hexdigest(json.dumps([[f["bytes"], f["ends"]] for f in files]).encode())
    if record.exists():
        began = read_json(record)
        if began["source_hash"] != digest:  # equal files may have moved
            reason = _difference(began["files"], files, what)
            raise DataError(f"{reason} (on {os.uname().nodename}); put the files back, or begin a new run")
    elif writes:
        now = {"source_hash": digest, "samples_hash": "", "files": files}
        write_atomically(record, json.dumps(now) + "\n")
    return digest


def _difference(then: list[dict[str, Any]], now: list[dict[str, Any]], what: str) -> str:
    """Return in words which file has changed, and where."""
    before, there = ({one["path"]: one for one in files} for files in (then, now))
    if before.keys() & there.keys():  # not all of them moved
        names = f"{what} names {len(now):,} files, and named {len(then):,} when the run began"
        if came := sorted(there.keys() - before.keys()):
            return f"{names}: {came[0]} came since then"
        if went := sorted(before.keys() - there.keys()):
            return f"{names}: {went[0]} is no longer there"
        pairs = [(before[path], there[path]) for path in there]
    elif len(then) == len(now):
        pairs = list(zip(then, now, strict=True))
    else:
        return f"{what} names {len(now):,} other files than the {len(then):,} of when the run began"
    old, new = next(pair for pair in pairs if any(pair[0][key] != pair[1][key] for key in ("bytes", "ends")))
    size = int(new["bytes"])
    if old["bytes"] != size:
        where = f"{old['bytes']:,} bytes then, {size:,} now, the first difference is at byte "
        where += f"{min(old['bytes'], size):,} or before"
    elif old["ends"][0] != new["ends"][0]:
        where = f"the first difference is between byte 0 and byte {min(BLOCK, size):,}"
    else:
        where = f"a difference is between byte {max(0, size - BLOCK):,} and byte {size:,}"
    return f"{new['path']} changed since the run began: {where}"


def _ends(path: str) -> list[str]:
    """Return the hashes of a file's first and last MiB."""
    try:
        with open(path, "rb", opener=plain) as file:
            first = xxhash.xxh3_64_hexdigest(file.read(BLOCK))
            file.seek(max(0, os.fstat(file.fileno()).st_size - BLOCK))
            return [first, xxhash.xxh3_64_hexdigest(file.read(BLOCK))]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
