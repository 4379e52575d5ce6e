"""The section `data` of a job file: the keys that all tasks share."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from launcher.values import Section, Word


class Source(Section):
    """Say where rows come from."""

    path: str | None = None
    """A local file (.json .jsonl .csv .tsv .parquet .arrow .txt .conll) or a directory that `save_to_disk` of
    `datasets` wrote, relative to the job file; or a pattern of several files. Of images and sounds also a
    folder: with a metadata.jsonl, .csv or .parquet that names its files, or with a sub-folder for each class."""
    targets: str | None = None
    """A second text file, line for line beside `path`, relative to the job file: `path` has the task's first
    column, this one its second (source and target, prompt and completion, text and label). Both may end in
    anything; or patterns of as many files, which go together in the order of their names."""
    name: str | None = None
    """A data set's name on the hub, instead of a path."""
    subset: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set, or of a directory that `save_to_disk` wrote with several."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows."""


def parse_columns(value: Any) -> Any:
    """Return a section of columns unchanged. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, dict):
        raise ValueError("write columns by the keys of data, as {text: body}")
    return value


class MixedSource(Source):
    """One of several sources."""

    alias: Word | None = None
    """Name of the source in metrics and reports: letters, digits, `_`, `.` and `-`. Left out, the name of its
    file without its ending, or that of the data set."""
    weight: float | None = Field(default=None, gt=0, le=1e9)
    """Its share of the samples (packs, with packing) against the weights of the others: 3 and 1 are three
    quarters and one. All sources have one, or none; without, every row comes once in an epoch."""
    columns: Annotated[dict[str, Any] | None, BeforeValidator(parse_columns)] = None
    """Columns of its own, by the keys of `data`, as `{text: body}`. Left out, those of `data`."""
    task: str | None = None
    """The task in `data.tasks` whose rows these are, where there are several (`model.task: multi-task`)."""

    def __hash__(self) -> int:
        """Return the hash of its JSON, as a mapping of columns is not hashable."""
        return hash(self.model_dump_json())


class Sources(Source):
    """Say where rows come from: one source, or a list of several."""

    sources: tuple[MixedSource, ...] | None = None
    """Several sources, each a section of these keys and three more. A list in the place of this section stands
    for it: `train: [{path: a.jsonl}, {path: b.jsonl}]`."""

    @property
    def parts(self) -> tuple[Source, ...]:
        """Return the sources: the entries of the list, or this source alone."""
        return self.sources or (self,)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Return a unique name for each source of the list; empty without a list."""
        given: list[str] = []
        asked_for = {source.alias for source in self.sources or ()}
        tasks = [source.task for source in self.sources or ()]
        for number, source in enumerate(self.sources or ()):
            name = _short_name(source)
            if source.task is not None:  # a task's only source is named after the task
                name = source.task if tasks.count(source.task) == 1 else f"{source.task}-{name}"
            name = f"{name}-{number}" if name in asked_for or name in given else name
            given.append(source.alias or name)
        return tuple(given)

    def key(self, role: str, number: int) -> str:
        """Return the key of a source in a job file: `data.train`, or `data.train.0` in a list."""
        return f"data.{role}" if self.sources is None else f"data.{role}.{number}"


def parse_sources(value: Any) -> Any:
    """Return a list of sources as the equivalent section; anything else unchanged. Raises ValueError if
    the list is empty or an entry is not a section."""
    if isinstance(value, Source) and not isinstance(value, Sources):
        return value.model_dump(exclude_unset=True)
    if not isinstance(value, (list, tuple)):
        return value
    if not value or not all(isinstance(one, (dict, Source)) for one in value):
        wrong = "is empty" if not value else "has an entry that is no section of keys"
        raise ValueError(f"the list {wrong}; write sources as [{{path: a.jsonl}}, {{path: b.jsonl}}]")
    return {"sources": value}


class Mixing(Section):
    """Say in which shares several sources are mixed, and how long an epoch is."""

    temperature: float = Field(default=1.0, ge=1, le=1e6)
    """Shares by the sizes of the sources to the power of 1/temperature, as of mT5 (arXiv 2010.11934): 1 is by
    size, and the higher it is, the more alike they are. In the place of weights."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """When an epoch ends, by the names of `datasets`: once the first source is through, so that no row comes
    twice in it; or once all are, so that every row comes, and those of the others again."""


class Data(Section):
    """The rows, what their columns are, and how they become samples."""

    train: Annotated[Sources, BeforeValidator(parse_sources)]
    """Rows to learn from: a source, or a list of several."""
    evaluation: Annotated[Sources, BeforeValidator(parse_sources)] | None = None
    """Rows held out, to measure on: a source, or a list of several, which are measured one by one too."""
    mixing: Mixing | None = None
    """How several sources of `train` are mixed."""
    streaming: bool = False
    """Read the rows of `train` during training, a window at a time, instead of tokenising all of them
    first: for files larger than the disk or the memory (.jsonl .txt .parquet). Needs `training.max_steps`."""
    shuffle_window: int = Field(default=10_000, ge=1, le=1_000_000_000)
    """How many consecutive rows `streaming` reads, tokenises, packs and shuffles together. The order of the
    files is shuffled, too."""
    max_length: int = Field(default=1024, ge=8, le=100_000_000)
    """Tokens of the longest sample; with packing, of a pack."""
    packing: bool = False
    """Put several samples into one row of max_length; they never see each other."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """The treatment of a sample of more than max_length tokens."""
    unusable: Literal["drop-few", "drop", "refuse"] = "drop-few"
    """The treatment of rows that lack a key or a text, or are not UTF-8. `drop-few` leaves them out, but
    stops if more than half of all rows would be dropped (those of `too_long: drop` count); `drop` goes on
    even then; `refuse` stops at the first."""
    num_workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Processes that tokenise."""

    @property
    def one_length(self) -> bool:
        """Return whether all samples have the same length, so that none is padded."""
        return False


def _short_name(source: Source) -> str:
    """Return a file's name without its endings, or the last part of a data set's name."""
    if source.path is None:
        return str(source.name).rstrip("/").rpartition("/")[2]
    return PurePath(source.path).name.partition(".")[0].strip("*?") or "source"
