"""Classification of files that rows name or contain: an image or a sound each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from launcher.data.folder import FileColumn
from launcher.data.rows import RowProblem
from launcher.tasks import media
from launcher.tasks.classification import Classification
from launcher.tasks.label_columns import LabelColumns, contradictions
from launcher.tasks.row_labels import label_of
from launcher.tasks.task import Encoded, Finding, Sample


class FileColumns(LabelColumns):
    """Rows of a file with a label."""

    @property
    def file_columns(self) -> tuple[FileColumn, ...]:
        """Return the columns where a file may be."""
        raise NotImplementedError


class FileClassification(Classification):
    """A file to a class, several classes, or a number. A subclass decodes it."""

    data: FileColumns
    file_key: ClassVar[str]
    """The key of `data` that names the column; also the key for the file's path in an answer."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from contradictions(self.data, self.name)

    @property
    def columns(self) -> tuple[str, ...]:
        columns = self.data.file_columns
        return columns if self.for_prediction else (*columns, self._label_column)

    def texts(self, row: dict[str, Any]) -> list[str]:
        """Return no texts: a file has no tokens."""
        media.named(row, self.data.file_columns)
        if not self.for_prediction:
            label_of(row, self._label_column, self.data.problem)
        return []

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        return [1]

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return each file's path or bytes (`launcher.tasks.media`), and `label`: int64 [1], float32
        [num_labels] or float32 [1]. Each file is decoded once, to find unreadable ones before training."""
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: dict[str, Any]) -> Encoded | RowProblem:
        try:
            value = media.named(row, self.data.file_columns)
            label = self._label(row, self._ids)
            content = media.content(value)
            cut = self._decoded(content)
        except RowProblem as problem:
            return problem
        return Encoded({**media.stored(value, content), "label": label}, 1, 1, cut)

    @abstractmethod
    def _decoded(self, content: media.Content) -> str | bool:
        """Return how a file is cut, False if it is not. Raises RowProblem for an unusable one."""

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample unchanged: a file cannot be shortened."""
        return sample

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer for a row, with the file's path if it has one."""
        value = media.named(row, self.data.file_columns)
        path = {self.file_key: value} if isinstance(value, str) else {}
        return path | super().answer(row, parts)
