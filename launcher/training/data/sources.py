"""Sources of rows: local files or a data set on the hub, with hashes of their contents."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from launcher.data.aligned import find_pairs, read_pair, refuse_unpaired
from launcher.data.files import find_files
from launcher.data.folder import PlacedColumn, folder_of, listing, with_places
from launcher.data.formats import format_of
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Source, Sources
from launcher.errors import DataError
from launcher.plain_files import plain, read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import write_atomically
from launcher.tasks.mixed import as_main, data_of
from launcher.tasks.task import Task
from launcher.training.data.dataset import DataReport
from launcher.training.data.hub import hub_rows, load_hub

BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file at the time of hashing."""

    path: str
    bytes: int
    blocks: tuple[str, ...]
    """Hash of every MiB."""
    num_lines: int

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "blocks": list(self.blocks)}


@dataclass(frozen=True)
class Rows:
    """A source that was found and hashed. Iterating it reads the rows, each time from the start."""

    source: Source
    columns: tuple[str, ...]
    """The columns that the task needs."""
    files: tuple[SourceFile, ...]
    """If the source has `targets`, each is followed by its partner."""
    digest: str
    """A hash of the files' contents, in order."""
    num_rows_expected: int
    """For a progress bar: exact for most formats, an estimate if a row may span lines."""
    otherwise: str | None = None
    """The format, as a file ending, of files whose names end in none."""

    def __iter__(self) -> Iterator[Row]:
        for number, (line, file, values) in enumerate(islice(self._read(), self.source.limit)):
            yield Row(number, file, line, with_places(values, self.columns, folder_of(Path(file))))

    @functools.cached_property
    def stamp(self) -> str:
        """Return a hash of the paths, sizes and times of files that rows name; empty if rows name none.

        It does not cover their contents: each sample keeps a hash of its file, which is compared when it is
        read.
        """
        names = [column for column in self.columns if isinstance(column, PlacedColumn)]
        if not names:
            return ""
        hasher = xxhash.xxh3_128()
        for row in self:
            values = {} if isinstance(row.values, RowProblem) else row.values
            for path in (path for name in names for path in name.paths(values.get(name))):
                try:
                    status = Path(path).stat()
                    hasher.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
                except (OSError, ValueError):
                    hasher.update(f"{path} none\n".encode(errors="replace"))
        return str(hasher.hexdigest())

    def _read(self) -> Iterator[tuple[int, str, Any]]:
        if self.source.path is None:
            for line, values in hub_rows(self.source, self.columns):
                yield line, str(self.source.name), values
            return
        if self.source.targets is not None:
            for file, beside in zip(self.files[::2], self.files[1::2], strict=True):
                for line, values in read_pair(Path(file.path), Path(beside.path), self.columns):
                    yield line, file.path, values
            return
        for file in self.files:
            for line, values in format_of(file.path, self.otherwise).read(Path(file.path), self.columns):
                yield line, file.path, values


def open_source(source: Source, columns: Sequence[str], otherwise: str | None = None) -> Rows:
    """Find and hash a source. Files whose names end in no known format are read in the format of `otherwise`.

    Raises DataError for a missing file, a file without a reader, or a line without a partner.
    """
    if source.path is None:
        return _open_hub(source, tuple(columns))
    if source.targets is not None:
        return _open_pairs(source, tuple(columns))
    is_plain = otherwise is not None and Path(source.path).is_file()
    paths = [Path(source.path)] if is_plain else find_files(source.path, source.split, columns)
    files = tuple(hash_file(path) for path in paths)
    expected = sum(_num_rows(path, file, otherwise) for path, file in zip(paths, files, strict=True))
    return Rows(source, tuple(columns), files, _digest(files), _limited(expected, source), otherwise)


def of_source(task: Task, plan: Plan, source: Source) -> Task:
    """Return the unprepared task for one of several sources; in a multi-task job, the source's own task."""
    own = copy.copy(task.parts.get(str(getattr(source, "task", None)), task))
    own.data = data_of(plan.task, plan.data, source)
    return own


def rows_of(given: Sources, plan: Plan, task: Task) -> Iterator[Row]:
    """Yield the rows of all sources in turn, with the columns of `task`, numbered consecutively. Raises as
    `open_source`."""
    if not given.sources:
        yield from open_source(given, task.columns)
        return
    first = 0
    for source in given.sources:
        own = of_source(task, plan, source)
        number = -1
        for row in as_main(plan.task, plan.data, source, open_source(source, own.columns)):
            number = row.id
            yield row._replace(id=first + row.id)
        first += number + 1


def _open_pairs(source: Source, columns: tuple[str, ...]) -> Rows:
    files: list[SourceFile] = []
    for first, second in find_pairs(source):
        left, right = hash_file(first), hash_file(second)
        refuse_unpaired(first, left.num_lines, second, right.num_lines)
        files += [left, right]
    expected = sum(file.num_lines for file in files[::2])
    return Rows(source, columns, tuple(files), _digest(files), _limited(expected, source))


def _num_rows(path: Path, file: SourceFile, otherwise: str | None) -> int:
    counted = format_of(path, otherwise).num_rows(path)
    return file.num_lines if counted is None else counted


def hash_file(path: Path) -> SourceFile:
    """Hash every MiB of a file and count its lines; for a folder, hash the names and sizes of its files.

    Raises DataError if it cannot be read.
    """
    if path.is_dir():
        return _hash_folder(path)
    blocks: list[str] = []
    size = num_lines = 0
    last = b"\n"
    try:
        with open(path, "rb", opener=plain) as file:
            while block := file.read(BLOCK):
                blocks.append(xxhash.xxh3_64_hexdigest(block))
                size += len(block)
                num_lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return SourceFile(str(path), size, tuple(blocks), num_lines + (last != b"\n"))


def _hash_folder(path: Path) -> SourceFile:
    files = listing(path)
    names = "".join(f"{file.path} {file.size}\n" for file in files)
    digest = xxhash.xxh3_64_hexdigest(names.encode(errors="surrogateescape"))
    return SourceFile(str(path), sum(file.size for file in files), (digest,), len(files))


def _digest(files: Sequence[SourceFile]) -> str:
    text = json.dumps([[file.bytes, file.blocks] for file in files])
    return xxhash.xxh3_128_hexdigest(text.encode())


def _limited(num_rows: int, source: Source) -> int:
    return num_rows if source.limit is None else min(num_rows, source.limit)


def _open_hub(source: Source, columns: tuple[str, ...]) -> Rows:
    loaded = load_hub(source)
    files = tuple(hash_file(Path(cached["filename"])) for cached in loaded.cache_files)
    digest = _digest(files) if files else str(loaded._fingerprint)
    return Rows(source, columns, files, digest, _limited(len(loaded), source))


def refuse_change(record: Path, report: DataReport) -> None:
    """Compare a run's data with `record`, or write the record if there is none.

    Raises DataError naming the changed file and the first byte range that differs, or reporting that equal
    files now give other samples, for example with another version of the tokenizer or of launcher.
    """
    now = {"source_hash": report.source_hash, "samples_hash": report.samples_hash, "files": report.files}
    if not record.exists():
        write_atomically(record, json.dumps(now) + "\n")
        return
    began = read_json(record)
    if began["source_hash"] != now["source_hash"]:
        raise DataError(f"{_change(began['files'], report.files)}; put it back as it was, or begin a new run")
    if began["samples_hash"] != now["samples_hash"]:
        reason = (
            "the files are the same, and other samples come of them: the tokenizer, its version, the "
            "settings or launcher changed"
        )
        raise DataError(
            f"{report.role} data: {reason} since the run began; go back to what it began with, or "
            "begin a new run"
        )


def _change(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str:
    for old, new in zip(before, now, strict=False):
        if (old["bytes"], old["blocks"]) != (new["bytes"], new["blocks"]):
            return difference(old, new, "since the run began")
    return f"the data changed since the run began: {_count(before)} then, {_count(now)} now"


def difference(old: dict[str, Any], new: dict[str, Any], when: str) -> str:
    """Return in words how a file (from `SourceFile.to_dict`) has changed, and where first."""
    pairs = zip(old["blocks"], new["blocks"], strict=False)
    block = next(
        (number for number, (a, b) in enumerate(pairs) if a != b), min(len(old["blocks"]), len(new["blocks"]))
    )
    sizes = f"{old['bytes']:,} bytes then, {new['bytes']:,} now, " if old["bytes"] != new["bytes"] else ""
    end = min((block + 1) * BLOCK, max(old["bytes"], new["bytes"]))
    return (
        f"{new['path']} changed {when}: {sizes}the first difference is between byte {block * BLOCK:,} and "
        f"byte {end:,}"
    )


def _count(files: Sequence[Any]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
