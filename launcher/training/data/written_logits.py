"""Logits of a teacher, written ahead, or a language model's hidden states: looked up by a sample's content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from launcher.errors import ConfigurationError, DataError, Problem
from launcher.plain_files import read_json
from launcher.runs.layout import write_atomically
from launcher.tasks.task import IGNORE, Sample, Task
from launcher.tasks.written_logits import KEY, TEACHER_LOGITS, TEACHER_STATES, Manifest
from launcher.training.data.dataset import Dataset
from launcher.training.precision import DTYPES

_READ = ("input_ids", "media_hash", "targets")
"""The arrays of a sample that identify its logits: the model's inputs, without the label and a file's path; and
of a language model which of its tokens are supervised."""
_ITEMS = 1024
_NOT_OF_SAMPLES = frozenset(
    ("train", "evaluation", "num_workers", "packing", "unusable", "mixing", "streaming", "shuffle_window")
)
"""Keys of `data` on which no sample's content depends, or that name the rows."""
STORED: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
"""The type of the files by precision: NumPy has no bf16, so its bits are stored."""


def key_of(sample: Mapping[str, np.ndarray]) -> int:
    """Return a 64-bit hash of a sample's inputs, on which a teacher's logits depend."""
    digest = 0
    for name in _READ:
        if name in sample:
            digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(sample[name]).data, seed=digest)
    return digest


def samples_of(dataset: Dataset) -> Iterator[Sample]:
    """Yield all samples of a data set, item after item."""
    for begin in range(0, dataset.num_items, _ITEMS):
        for item in dataset.items(np.arange(begin, min(begin + _ITEMS, dataset.num_items))):
            yield from item


def num_supervised(sample: Mapping[str, np.ndarray]) -> int:
    """Return how many tokens of a language model's sample are supervised."""
    return int(np.count_nonzero(sample["targets"] != IGNORE))


def read_as(task: Task) -> dict[str, Any]:
    """Return the keys of `data` by which rows become samples, as JSON values."""
    return task.data.model_dump(mode="json", exclude=set(_NOT_OF_SAMPLES))


def vocabulary_of(tokenizer: Any) -> tuple[int, str]:
    """Return one more than the highest token id of a tokenizer, and a hash of its vocabulary."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    content = json.dumps(sorted(vocabulary.items())).encode()
    return max(vocabulary.values(), default=-1) + 1, xxhash.xxh3_128_hexdigest(content)


@dataclass(frozen=True)
class WrittenLogits:
    """The logits in a directory, memory-mapped: only what a batch needs is read."""

    directory: Path
    manifest: Manifest
    keys: np.ndarray
    """The keys of all samples, sorted, uint64 [samples]."""
    values: np.ndarray
    """fp32 [samples, outputs]; of a language model the hidden states [supervised tokens, width]."""
    checks: np.ndarray
    """Hashes of each sample's values, uint64 [samples]."""
    ends: np.ndarray | None = None
    """The end of each sample's hidden states, int64 [samples]; None for one row a sample."""

    @classmethod
    def open(cls, directory: Path) -> WrittenLogits:
        """Map the files of a directory. Raises ConfigurationError if it is incomplete, DataError if a file
        has changed."""
        manifest = Manifest.read(directory)
        arrays = {
            name: mapped(directory, manifest, name) for name in shapes(manifest) if name not in OF_MATRIX
        }
        values = arrays.pop("logits" if manifest.hidden is None else "states")
        return cls(directory, manifest, values=values, **arrays)

    def suit(self, task: Task, tokenizer: Any) -> None:
        """Raise ConfigurationError if they are for another task, for other classes or, of a language model, for
        another tokenizer."""
        names, manifest = None if task.labels is None else tuple(task.labels), self.manifest
        reason = manifest.unlike(task.name, task.data) or manifest.other_classes(names)
        if not reason and manifest.hidden is not None:
            reason = manifest.other_tokenizer(*vocabulary_of(tokenizer))
        if reason:
            raise ConfigurationError(Problem(KEY, str(self.directory), reason))

    def check(self, dataset: Dataset, task: Task) -> None:
        """Raise DataError, with what was read otherwise, if some samples have no logits."""
        missing, first = 0, None
        for sample in samples_of(dataset):
            if self._place(sample) is None:
                missing, first = missing + 1, first or sample
        if first is not None:
            reason = self.manifest.read_otherwise(dataset.report.source_hash, read_as(task))
            reason = reason or (
                "other rows, or the same ones read by another tokenizer, chat template or data.max_length"
            )
            raise DataError(
                f"{KEY} = {str(self.directory)!r}: {missing:,} of {dataset.num_samples:,} samples have no "
                f"logits there, the first is of row {first.id} ({reason}); write them with this job: "
                "launcher predict TEACHER --job JOB --logits DIR"
            )

    def hold(self, record: Path) -> None:
        """Compare the logits with a run's `record`, or write the record if there is none. Raises DataError if
        they differ."""
        now: dict[str, Any] = {"digest": self.manifest.digest, "teacher": self.manifest.teacher}
        if not record.exists():
            write_atomically(record, json.dumps(now) + "\n")
        elif (began := read_json(record))["digest"] != now["digest"]:
            of = f"of {began['teacher'].get('name')} then, of {now['teacher'].get('name')} now"
            reason = f"holds other logits than the run began with ({of}); put them back, or begin a new run"
            raise DataError(f"{KEY} = {str(self.directory)!r}: {reason}")

    def of(self, items: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
        """Return what was written for a batch of these items: `teacher_logits`, fp32 [samples, outputs], or of a
        language model `teacher_states`, [supervised tokens, width], those of padding samples left out.

        Raises DataError for values that are missing or changed.
        """
        samples = [sample for item in items for sample in item if self.ends is None or sample.weight]
        joined = torch.from_numpy(np.concatenate([self.values[:0], *map(self._part, samples)]))
        if self.ends is None:
            return {TEACHER_LOGITS: joined}
        return {TEACHER_STATES: joined.view(DTYPES[self.manifest.precision])}

    def _place(self, sample: Sample) -> int | None:
        key = np.uint64(key_of(sample))
        place = int(np.searchsorted(self.keys, key))
        return place if place < len(self.keys) and self.keys[place] == key else None

    def _part(self, sample: Sample) -> np.ndarray:
        """Return a sample's values: one row of logits, or a hidden state for each supervised token."""
        place = self._place(sample)
        if place is None:
            raise _damaged(self.directory, f"there are no logits of row {sample.id}")
        begin, end = bounds(self.ends, place)
        part = self.values[begin:end]
        if check_of(int(self.keys[place]), part) != int(self.checks[place]):
            reason = f"the logits of row {sample.id} are not those that were written"
            name = "logits" if self.ends is None else "states"
            raise _damaged(self.directory / f"{name}.npy", reason)
        return part


OF_MATRIX = ("matrix", "bias")
"""The files of a language model's output matrix, which is loaded as a companion."""


def mapped(directory: Path, manifest: Manifest, name: str) -> np.ndarray:
    """Return one of the arrays in a directory, memory-mapped. Raises DataError if it is not the one that was
    written."""
    file, (dtype, shape) = directory / f"{name}.npy", shapes(manifest)[name]
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None
    if (array.dtype, array.shape) != (dtype, shape):
        what = f"holds {array.dtype} {list(array.shape)}, and {dtype} {list(shape)} were written"
        raise _damaged(file, what)
    return np.asarray(array).view(np.ndarray)


def shapes(manifest: Manifest) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return type and shape of each array."""
    number, hidden = manifest.num_samples, manifest.hidden
    of_samples: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        name: (np.dtype(np.uint64), (number,)) for name in ("keys", "checks")
    }
    if hidden is None:
        return {**of_samples, "logits": (np.dtype(np.float32), (number, manifest.num_outputs))}
    stored, num_outputs = STORED[manifest.precision], manifest.num_outputs
    return {
        **of_samples,
        "ends": (np.dtype(np.int64), (number,)),
        "states": (stored, (hidden.num_tokens, hidden.width)),
        "matrix": (stored, (num_outputs, hidden.width)),
        **({"bias": (stored, (num_outputs,))} if hidden.has_bias else {}),
    }


def bounds(ends: np.ndarray | None, place: int) -> tuple[int, int]:
    """Return where the values of the sample at this place begin and end."""
    if ends is None:
        return place, place + 1
    return int(ends[place - 1]) if place else 0, int(ends[place])


def check_of(key: int, part: np.ndarray) -> int:
    """Return a hash of a sample's values, 64 bits."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(part).data, seed=key)


def as_stored(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor in host memory as its file holds it: bf16 as its bits."""
    here = tensor.detach().cpu().contiguous()
    return (here.view(torch.uint16) if here.dtype == torch.bfloat16 else here).numpy()


def hash_of_matrix(matrix: np.ndarray, bias: np.ndarray | None = None) -> str:
    """Return the hash of an output matrix and its bias, as they are stored."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(matrix).data)
    if bias is not None:
        digest.update(np.ascontiguousarray(bias).data)
    return str(digest.hexdigest())


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{KEY}: {path}: {what}; write the logits anew")
