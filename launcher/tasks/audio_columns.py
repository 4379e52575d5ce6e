"""The section `data` of a job that reads sounds: their column, and how long a clip the model hears."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from launcher.data.folder import SOUNDS, FileColumn, FileColumnIfThere
from launcher.data.section import Data
from launcher.tasks.file_classification import FileColumns
from launcher.tasks.task import Finding, finding

_PACKAGES = ("soundfile", "soxr")


class SoundColumns(Data):
    """Rows of a sound, for any task."""

    audio: str | None = None
    """The column of the sound: a path relative to the file that it stands in, or the bytes of a file. Left
    out, `file_name` or `audio`, whichever there is."""
    seconds: Annotated[float, Field(ge=0.1, le=600)] | None = None
    """The longest clip that the model hears. Left out, what its feature extractor says (Whisper 30, AST
    10.24), else 10. Whisper hears whole seconds: a fraction is rounded up."""
    pad_to_seconds: bool = False
    """Add silence behind a shorter sound, so that all are as long as `seconds`. The model then hears the
    silence. Models whose numbers padding would change can have several clips in a pass only this way."""
    max_length: Literal[1] = 1
    """A clip is one position of a pass, whatever its length."""

    @property
    def one_length(self) -> bool:
        return self.pad_to_seconds

    @property
    def file_columns(self) -> tuple[FileColumn, ...]:
        """Return the columns where a sound may be."""
        if self.audio is not None:
            return (FileColumn(self.audio, SOUNDS),)
        return FileColumnIfThere("file_name", SOUNDS), FileColumnIfThere("audio", SOUNDS)


class AudioColumns(SoundColumns, FileColumns):
    """Rows of a sound with a label."""

    label: str | None = "label"
    """The column of the label: a class, a list of classes, or a number for regression. Of a folder without
    metadata, the sub-folders are the classes."""
    cut_at: Literal["beginning", "middle"] = "beginning"
    """Which part of a longer sound is taken where it is measured or predicted. In training it is any part,
    drawn anew at every pass."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """Whether a sound of more than `seconds` is cut, dropped, or refused."""


def without_packages(task: str, *others: str) -> Iterator[Finding]:
    """Yield a finding if packages that decode sounds, or `others`, are not installed."""
    lacking = [name for name in (*_PACKAGES, *others) if importlib.util.find_spec(name) is None]
    if lacking:
        packages = f"package{'s' * (len(lacking) > 1)} {' and '.join(lacking)}"
        reason = f"needs the {packages}, not installed here: pip install 'finetune-launcher[audio]'"
        yield finding("model.task", task, reason)
