"""Inspect some rows of a job's files: whether its task can use them, and whether the columns are right."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from launcher import tasks
from launcher.data.files import find_files, is_there
from launcher.data.folder import FileColumn
from launcher.data.formats import format_of
from launcher.data.rows import MISSING, TOO_LONG, RowProblem, Values
from launcher.data.sample import Sample, look
from launcher.data.section import Source, Sources
from launcher.errors import DataError, Problem
from launcher.job.schema import Job
from launcher.planner.dataset.findings import Findings
from launcher.planner.dataset.token_lengths import texts_or_problem, too_long
from launcher.planner.model.model_config import locate
from launcher.tasks import media
from launcher.tasks.mixed import task_of
from launcher.tasks.task import Task

_FEW_ROWS = 64
"""Rows whose columns are looked at where nothing else is."""
_FILES = 256
"""Media files per source whose existence is checked: each takes a message or two on a network file system."""


def sample_of(source: Source, columns: tuple[str, ...]) -> Sample:
    """Return some rows of a source, or all of a small one, with these columns. Raises DataError as `look`.

    They are cached, as a search needs them repeatedly.
    """
    return _sample(source, columns, changed(source))


@lru_cache(maxsize=64)
def _sample(source: Source, columns: tuple[str, ...], changed: int) -> Sample:
    """Sample a source; `changed` invalidates the cache entries of older files."""
    return look(source, columns)


def changed(source: Source) -> int:
    """Return a number that changes when a source's files do, from their times and sizes."""
    if isinstance(source, Sources) and source.sources:
        return sum(map(changed, source.sources))
    try:
        stats = [Path(path).stat() for path in (source.path, source.targets) if path]
        return sum(one.st_mtime_ns + one.st_size for one in stats)
    except OSError:  # a pattern, or nothing
        return 0


def look_at_rows(job: Job) -> Findings:
    """Return problems and remarks on some rows of the job's files.

    None for data on the hub, or for missing files, which are refused when the job file is read.
    """
    task, model = tasks.of_job(job), locate(job.model.name, job.model.revision)
    looks, told = [], set[str]()
    for role, given in (("train", job.data.train), ("evaluation", job.data.evaluation)):
        for number, source in enumerate(given.parts if given is not None else ()):
            own = task
            if given is not None and given.sources:
                own = task_of(task.name, job.data, source)
                own.evaluation, own.virtual_tokens = task.evaluation, task.virtual_tokens
                own.virtual_prefix = task.virtual_prefix
            if given is not None and source.path is not None:
                looks.append(_of_source(given.key(role, number), source, own, model, told))
    return Findings.joined(looks)


def why_no_columns(path: str, task: Task) -> str | None:
    """Return why a file cannot be what the task reads, in one clause, if no row that is looked at has the task's
    columns. Raises DataError if the file itself lacks them, or cannot be read."""
    source = Source(path=path)
    if any(format_of(file).too_large(file) for file in find_files(path, source.split, task.columns)):
        return None  # reading it once takes long enough
    problems = [texts_or_problem(row, task) for row in look(source, task.columns, _FEW_ROWS).rows]
    missing = [one for one in problems if isinstance(one, RowProblem) and one.reason == MISSING]
    if not missing or len(missing) < len(problems):
        return None
    return f"none of {len(problems):,} rows that were looked at has the columns: {missing[0]}"


def _of_source(key: str, source: Source, task: Task, model: str, told: set[str]) -> Findings:
    """Return the findings for one source. `model`: the directory with the tokenizer, if it is here. `told`
    collects the task's remarks, which are not repeated."""
    assert source.path is not None
    if not is_there(source.path):
        return Findings()
    try:
        files = find_files(source.path, source.split, task.columns) if source.targets is None else []
        if reason := next(filter(None, (format_of(file).too_large(file) for file in files)), None):
            return Findings(remarks=(Problem(key, source.path, f"its rows were not looked at: {reason}"),))
        seen = sample_of(source, task.columns)
    except DataError as error:
        return Findings((Problem(key, source.path, str(error)),))
    if not seen.rows:
        return Findings((Problem(key, source.path, "has no rows"),))
    if task.traits.reads_files and len(seen.rows) > _FILES:
        seen = Sample(seen.num_rows, seen.rows[:: -(-len(seen.rows) // _FILES)])
    problems = [_why_unusable(row, task) for row in seen.rows]
    unusable = [why for why in problems if why is not None]
    usable = [
        row
        for row, why in zip(seen.rows, problems, strict=True)
        if not isinstance(row, RowProblem) and why is None
    ]
    long = too_long(usable, task, model)
    header = [doubt for file in files[:1] if (doubt := _header_as_row(file, task))]
    own = [doubt for doubt in task.doubts(usable) if doubt not in told]
    notes = [note for note in task.notes(usable) if note.reason not in told]
    told.update(own, (note.reason for note in notes))
    doubts = (*(Problem(key, source.path, doubt) for doubt in (*header, *own)), *notes)
    dropped = [*unusable, *long]
    if not dropped:
        return Findings(remarks=doubts)
    reason = _described(unusable, long, seen)
    is_most = 2 * len(dropped) > len(seen.rows) and _is_whole(seen) and task.data.unusable == "drop-few"
    if is_most and len(dropped) < len(seen.rows):
        reason += "; with data.unusable: drop a run uses the others"
    problem = Problem(key, source.path, reason)
    policies = {task.data.too_long if why.reason == TOO_LONG else task.data.unusable for why in dropped}
    if is_most or "refuse" in policies or len(dropped) == len(seen.rows):
        return Findings((problem,), doubts)
    return Findings(remarks=(problem, *doubts))


def _header_as_row(file: Path, task: Task) -> str | None:
    """Return a doubt about a table with columns named by number whose first line looks like a header."""
    if file.is_dir() or not all(map(str.isdecimal, task.required_columns)):
        return None
    known = format_of(file)
    if not known.may_lack_header:
        return None
    names = known.names(file)
    if all(map(str.isdecimal, names)):
        return None
    return (
        f"its first line ({', '.join(names)}) reads as a header, and is taken for a row, as columns are named "
        "by number; name them as it does"
    )


def _why_unusable(row: Values, task: Task) -> RowProblem | None:
    """Return why a task cannot use a row, or the file that it names; None if it can."""
    texts = texts_or_problem(row, task)
    if isinstance(row, RowProblem) or isinstance(texts, RowProblem):
        return texts if isinstance(texts, RowProblem) else None
    files = [column for column in task.columns if isinstance(column, FileColumn)]
    return media.why_absent(media.named(row, files)) if files else None


def _is_whole(seen: Sample) -> bool:
    return len(seen.rows) >= seen.num_rows


def _described(unusable: list[RowProblem], long: list[RowProblem], seen: Sample) -> str:
    number, dropped = len(seen.rows), [*unusable, *long]
    rows = f"{number:,} rows" if _is_whole(seen) else f"{number:,} rows that were looked at"
    least = "at least " if long else ""  # special tokens and templates are not counted
    many = f"none of {rows} can" if len(dropped) == number else f"{least}{len(dropped):,} of {rows} cannot"
    cure = "; a larger data.max_length keeps more of them" if len(long) > len(unusable) else ""
    return f"{many} be used, one of them for: {dropped[0]}{cure}"
