"""The section `data` of a job file, as far as it is the same for every task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.values import Section


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


class Data(Section):
    """The rows, what in them is what, and how they become samples."""

    train: Source
    """Rows to learn from."""
    evaluation: Source | None = None
    """Rows held out, to measure on."""
    max_length: int = Field(default=1024, ge=8, le=100_000_000)
    """Tokens of the longest sample; with packing, of a pack."""
    packing: bool = False
    """Put several samples into one row of max_length; they never see each other."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What to do with a sample of more than max_length tokens."""
    unusable: Literal["drop-few", "drop", "refuse"] = "drop-few"
    """What to do with rows that have a missing key, no text, or bytes that are not UTF-8: `drop-few` leaves
    them out, and stops where more than half of all rows would be dropped; `drop` goes on even then; `refuse`
    stops at the first."""
    num_workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Processes that tokenise."""

    @property
    def one_length(self) -> bool:
        """Return whether all samples are of one length, so that none is padded beside another."""
        return False
