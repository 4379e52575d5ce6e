"""Logits of a teacher, written ahead: looked up by a sample's content, and written under a temporary name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from launcher.errors import ConfigurationError, DataError, Problem, StorageError
from launcher.plain_files import read_json
from launcher.runs.layout import sync_directory, write_atomically
from launcher.tasks.task import Sample, Task
from launcher.tasks.written_logits import KEY, MANIFEST, TEACHER_LOGITS, Manifest
from launcher.training.data.dataset import Dataset

_READ = ("input_ids", "media_hash")
"""The arrays of a sample that identify its logits: the model's inputs, without the label and a file's
path."""
_ITEMS = 1024


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


@dataclass(frozen=True)
class WrittenLogits:
    """The logits in a directory, memory-mapped: only what a batch needs is read."""

    directory: Path
    manifest: Manifest
    keys: np.ndarray
    """The keys of all samples, sorted, uint64 [samples]."""
    logits: np.ndarray
    """fp32 [samples, outputs]."""
    checks: np.ndarray
    """Hashes of each sample's logits, uint64 [samples]."""

    @classmethod
    def open(cls, directory: Path) -> WrittenLogits:
        """Map the files of a directory. Raises ConfigurationError if it is incomplete, DataError if a file
        has changed."""
        manifest, arrays = Manifest.read(directory), {}
        for name, (dtype, shape) in _shapes(manifest).items():
            file = directory / f"{name}.npy"
            try:
                mapped = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise _damaged(file, str(error)) from None
            if (mapped.dtype, mapped.shape) != (dtype, shape):
                what = f"holds {mapped.dtype} {list(mapped.shape)}, and {dtype} {list(shape)} were written"
                raise _damaged(file, what)
            arrays[name] = np.asarray(mapped).view(np.ndarray)
        return cls(directory, manifest, **arrays)

    def suit(self, task: Task) -> None:
        """Raise ConfigurationError if they are for another task or for other classes."""
        names = None if task.labels is None else tuple(task.labels)
        if reason := self.manifest.unlike(task.name, task.data) or self.manifest.other_classes(names):
            raise ConfigurationError(Problem(KEY, str(self.directory), reason))

    def check(self, dataset: Dataset) -> None:
        """Raise DataError if some samples have no logits."""
        missing, first = 0, None
        for sample in samples_of(dataset):
            if self._place(sample) is None:
                missing, first = missing + 1, first or sample
        if first is not None:
            reason = "other rows, or the same ones read by another tokenizer or data.max_length"
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
        """Return the teacher's logits for a batch of these items: `teacher_logits`, fp32 [samples, outputs].

        Raises DataError for logits that are missing or changed.
        """
        rows = [self._row(sample) for item in items for sample in item]
        return {TEACHER_LOGITS: torch.from_numpy(np.stack(rows))}

    def _place(self, sample: Sample) -> int | None:
        key = np.uint64(key_of(sample))
        place = int(np.searchsorted(self.keys, key))
        return place if place < len(self.keys) and self.keys[place] == key else None

    def _row(self, sample: Sample) -> np.ndarray:
        place = self._place(sample)
        if place is None:
            raise _damaged(self.directory, f"there are no logits of row {sample.id}")
        row = self.logits[place]
        if _check(int(self.keys[place]), row) != int(self.checks[place]):
            reason = f"the logits of row {sample.id} are not those that were written"
            raise _damaged(self.directory / "logits.npy", reason)
        return row


class Writer:
    """DIR.partial, which becomes DIR once it has all logits; if stopped, it can be resumed."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], keys: Sequence[int]) -> None:
        """Take the final name, the content of its manifest without the files, and the keys of all samples in
        order."""
        self.directory = directory
        self.path = directory.with_name(f"{directory.name}.partial")
        self._state_file = self.path / "state.json"
        self._keys = np.array(keys, dtype=np.uint64)
        digest = xxhash.xxh3_64_hexdigest(self._keys.tobytes())
        self._of = json.loads(json.dumps({**manifest, "keys": digest}))
        self._manifest = Manifest.model_validate({**manifest, "files": {}, "digest": ""})
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    def begin(self) -> int:
        """Return the number of samples already written by an interrupted call with the same content; other
        partial files are removed. Raises StorageError if the disk has no room."""
        try:
            state: Any = read_json(self._state_file)
        except (OSError, ValueError):
            state = None
        goes_on = isinstance(state, dict) and state.get("of") == self._of
        try:
            if not goes_on:
                if self._state_file.is_file():
                    shutil.rmtree(self.path)  # a directory without it belongs to somebody else
                self.path.mkdir()
            for name, (dtype, shape) in _shapes(self._manifest).items():
                file, mode = self.path / f"{name}.npy", "r+" if goes_on else "w+"
                self._arrays[name] = np.lib.format.open_memmap(file, mode, dtype, shape)
                with open(file, "r+b") as whole:  # if the disk fills up later, the process would be killed
                    os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)
            self._arrays["keys"][:] = self._keys
            if not goes_on:
                self.keep(0)
        except (OSError, ValueError) as error:
            raise self._refused(error) from None
        return int(state["done"]) if goes_on else 0

    def put(self, key: int, logits: np.ndarray) -> None:
        """Write the logits of one sample, fp32 [outputs]."""
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        self._arrays["logits"][place] = logits
        self._arrays["checks"][place] = _check(key, self._arrays["logits"][place])

    def keep(self, done: int) -> None:
        """Record durably that `done` samples are written. Raises StorageError."""
        try:
            for array in self._arrays.values():
                array.flush()
            write_atomically(self._state_file, json.dumps({"of": self._of, "done": done}) + "\n")
        except OSError as error:
            raise self._refused(error) from None

    def finish(self) -> Manifest:
        """Rename the directory to its final name. Raises StorageError."""
        try:
            digest = xxhash.xxh3_128(self._keys.tobytes())
            digest.update(np.ascontiguousarray(self._arrays["checks"]).data)
            files = {f"{name}.npy": (self.path / f"{name}.npy").stat().st_size for name in self._arrays}
            manifest = self._manifest.model_copy(update={"files": files, "digest": digest.hexdigest()})
            write_atomically(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            self._state_file.unlink()
            self._arrays.clear()
            self.path.rename(self.directory)
            sync_directory(self.directory.parent)
        except OSError as error:
            raise self._refused(error) from None
        return manifest

    def _refused(self, error: Exception) -> StorageError:
        why = getattr(error, "strerror", None) or error
        return StorageError(f"--logits {self.directory}: {why}; what is there stays in {self.path.name}")


def _shapes(manifest: Manifest) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return type and shape of each array."""
    number = manifest.num_samples
    return {
        "keys": (np.dtype(np.uint64), (number,)),
        "logits": (np.dtype(np.float32), (number, manifest.num_outputs)),
        "checks": (np.dtype(np.uint64), (number,)),
    }


def _check(key: int, row: np.ndarray) -> int:
    """Return a hash of a sample's logits, 64 bits."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(row).data, seed=key)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{KEY}: {path}: {what}; write the logits anew")
