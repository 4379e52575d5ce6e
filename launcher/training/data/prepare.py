"""Preparation of a data set: once per machine, in one process, cached by content."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from launcher.data.rows import TOO_LONG
from launcher.data.section import Source
from launcher.errors import DataError, StorageError
from launcher.planner.plan import Plan
from launcher.runs import cache, prepared
from launcher.runs.places import here
from launcher.tasks.task import Task
from launcher.training.data.cache_key import FORMAT, Role, cache_key, cache_root
from launcher.training.data.dataset import HASHES, META, CacheProblem, DataReport, Dataset, file_digest
from launcher.training.data.encode import Chunk, Writer, encode_rows
from launcher.training.data.packing import one_each, pack
from launcher.training.data.sources import Rows, difference, hash_file, open_source, rows_of

NUM_EXAMPLES = 10
ReportRows = Callable[[int, int], None]


def prepare(
    source: Source,
    role: Role,
    plan: Plan,
    task: Task,
    tokenizer: Any,
    report: ReportRows = lambda done, total: None,
) -> Dataset:
    """Read, tokenise and pack a source, or map the result of an earlier call with equal contents and
    settings.

    `report(done, total)` is called from time to time with rows, and with (0, 0) while another process does
    the work; an exception from it ends the preparation and leaves nothing behind. Sets `task.labels`. Raises
    DataError for unusable data, ConfigurationError for a tokenizer that the task cannot use, StorageError if
    the cache cannot be written. The result is held in the cache while the data set exists.
    """
    task.prepare(tokenizer)
    rows = open_source(source, task.columns)
    if role == "evaluation" and task.needs_labels and task.labels is None:
        task.fit(rows_of(plan.data.train, plan, task))
    root = cache_root()
    directory = root / cache_key(rows, role, plan, task, tokenizer)
    held = cache.hold(directory)
    dataset = _open(directory)
    if dataset is None:
        cache.bound()  # an environment variable that is no size fails before the work, not after it
        with _locked(root, directory.name, report):
            dataset = _open(directory)
            if dataset is None:
                _build(directory, rows, role, plan, (task, tokenizer, report))
                dataset = Dataset.open(directory, FORMAT)
                dataset.report.cached = False
                cache.keep_bounded()
    dataset.held = held
    if dataset.report.labels is not None:
        task.labels = dataset.report.labels
    # Equal contents may have moved: report where they are now.
    moved = {old["path"]: new.path for old, new in zip(dataset.report.files, rows.files, strict=False)}
    dataset.report.examples = [
        {**one, "file": moved.get(one["file"], one["file"])} for one in dataset.report.examples
    ]
    dataset.report.files = [file.to_dict() for file in rows.files]
    dataset.report.cache = str(directory)
    return dataset


def refuse_mostly_dropped(report: DataReport, plan: Plan) -> None:
    """Raise DataError if more than half of the rows are dropped and the job does not allow it."""
    if plan.data.unusable == "drop" or 2 * report.num_dropped <= report.rows_read:
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
    share = (
        f"{report.num_dropped:,} of {report.rows_read:,} rows "
        f"({report.num_dropped / report.rows_read:.1%}) would be dropped: {reasons}"
    )
    cure = (
        "write a larger data.max_length"
        if 2 * report.dropped.get(TOO_LONG, 0) > report.num_dropped
        else "mend the rows or the columns' names"
    )
    hint = f"{cure}, or write data.unusable: drop to use the other {report.rows_used:,}"
    raise DataError(f"{report.role} data: {share}; {prepared.first_dropped(report.to_dict())}; {hint}")


def _open(directory: Path) -> Dataset | None:
    try:
        dataset = Dataset.open(directory, FORMAT)
    except CacheProblem:
        return None
    dataset.report.cached = True
    return dataset


@contextlib.contextmanager
def _locked(root: Path, name: str, report: ReportRows) -> Iterator[None]:
    """Hold this machine's lock for preparing `name`; report from time to time while waiting for it."""
    import filelock

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(root / f"{name}.lock")
        waits = False
        while True:
            try:
                lock.acquire(timeout=0.5, poll_interval=0.05)
                break
            except filelock.Timeout:
                if not waits:
                    waits = True
                    here.at("waiting for the preparation", detail=str(lock.lock_file))
                report(0, 0)
        if waits:
            here.at("preparing")
    except OSError as error:
        raise _storage_error(root, error) from error
    try:
        yield
    finally:
        lock.release()


def _storage_error(root: Path, error: OSError) -> StorageError:
    return StorageError(
        f"prepared data cannot be written below {root}: {error.strerror or error}; set XDG_CACHE_HOME "
        "to a place with room"
    )


def _build(directory: Path, rows: Rows, role: Role, plan: Plan, using: tuple[Task, Any, ReportRows]) -> None:
    """Write the complete directory under another name, and rename it."""
    root = directory.parent
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{directory.name}-"))
        _write(temporary, rows, role, plan, using)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except OSError as error:
        raise _storage_error(root, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: Path, rows: Rows, role: Role, plan: Plan, using: tuple[Task, Any, ReportRows]) -> None:
    task, tokenizer, progress = using
    if role == "train" and task.needs_labels and not task.labels_given:
        task.fit(rows)
    sources = [{"path": file.path, "bytes": file.bytes} for file in rows.files]
    remarks = task.remarks if role == "train" else []
    report = DataReport(
        role, rows.digest, labels=task.labels, remarks=remarks, files=sources, unit=task.traits.unit
    )

    def moved(rows_read: int) -> None:
        here.moved(rows_read, detail=_where(rows.source))
        progress(rows_read, max(rows_read, rows.num_rows_expected))

    chunks = encode_rows(rows, task, tokenizer, plan.num_data_workers)
    if not write_samples(
        directory, chunks, report, plan, task, moved, lambda: _refuse_change_while_reading(rows)
    ):
        raise DataError(
            f"{_where(rows.source)}: none of {report.rows_read:,} rows can be used{_shown(report)}"
        )


def write_samples(
    directory: Path,
    chunks: Iterable[Chunk],
    report: DataReport,
    plan: Plan,
    task: Task,
    moved: Callable[[int], None] = lambda rows_read: None,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Write the samples of some rows, packed if the task packs, and complete the report. Return whether there
    are any.

    `moved` is called with the number of rows read so far, `check` once all are read. Raises DataError for a
    row that the job refuses.
    """
    began = time.monotonic()
    writer = Writer(directory)
    for chunk in chunks:
        report.rows_read += chunk.num_rows
        _count_problems(report, chunk.problems, plan)
        writer.append(chunk)
        moved(report.rows_read)
    check()
    if not writer.num_samples:
        return False
    packs = pack(writer.lengths(), plan.data.max_length) if task.packs else one_each(writer.num_samples)
    columns = writer.finish(packs)
    report.rows_used, report.num_items = writer.num_rows, len(packs.offsets) - 1
    report.num_tokens, report.num_supervised = int(writer.lengths().sum()), writer.num_supervised
    report.longest = int(writer.lengths().max())
    report.fill = report.num_tokens / (report.num_items * plan.data.max_length) if task.packs else None
    report.seconds = round(time.monotonic() - began, 3)
    files = {path.name: file_digest(path) for path in sorted(directory.iterdir())}
    # The hash leaves out what later formats added, so that equal samples in an older format have the same
    # hash; references, which a later attempt may add; and paths of files, whose contents are hashed.
    added = (f"{HASHES}.npy", "sample_lengths.npy", "sample_windows.npy")
    digests = {
        name: digest
        for name, digest in files.items()
        if name not in added and not name.startswith(("references", "media.", "media_offsets."))
    }
    report.samples_hash = xxhash.xxh3_128_hexdigest(json.dumps(digests).encode())
    meta = {
        "format": FORMAT,
        "padding_free": task.padding_free,
        "columns": columns,
        "files": files,
        "report": asdict(report),
    }
    (directory / META).write_text(json.dumps(meta), encoding="utf-8")
    return True


def _count_problems(report: DataReport, problems: list[dict[str, Any]], plan: Plan) -> None:
    """Count rows cut or left out. Raises DataError at the first that the policy refuses."""
    for problem in problems:
        key = "data.too_long" if problem["reason"] == TOO_LONG else "data.unusable"
        policy = plan.data.too_long if problem["reason"] == TOO_LONG else plan.data.unusable
        if policy == "refuse":
            raise DataError(
                f"{prepared.place(problem)}: {prepared.why(problem)}, and {key} is 'refuse'; mend the "
                f"row, or set {key}=drop"
            )
        cut, first = (
            policy == "cut",
            not any(example["reason"] == problem["reason"] for example in report.examples),
        )
        if cut:
            report.num_cut += 1
        else:
            report.dropped[problem["reason"]] = report.dropped.get(problem["reason"], 0) + 1
        if first or len(report.examples) < NUM_EXAMPLES:
            report.examples.append({**problem, "cut": cut})


def _refuse_change_while_reading(rows: Rows) -> None:
    for file in rows.files:
        if (now := hash_file(Path(file.path))).blocks != file.blocks:
            raise DataError(
                f"{difference(file.to_dict(), now.to_dict(), 'while it was read')}; start again when "
                "it is whole"
            )


def _where(source: Source) -> str:
    return str(source.path if source.path is not None else source.name)


def _shown(report: DataReport) -> str:
    """Return how many rows were left out for each reason, and the first of each, in one line for the
    failure's message."""
    firsts = {example["reason"]: example for example in reversed(report.examples)}
    parts = [
        f"{count:,} {reason}, the first at {prepared.place(firsts[reason])}"
        for reason, count in report.dropped.items()
    ]
    details = [
        f" ({example['detail']})" if (example := firsts[reason]).get("detail") else ""
        for reason in report.dropped
    ]
    return "".join(f"; {part}{detail}" for part, detail in zip(parts, details, strict=True))
