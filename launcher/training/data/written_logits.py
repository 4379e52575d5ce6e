"""Logits of a teacher, written ahead: found by what a sample holds, and written beside their final name."""

from __future__ import annotations

import json
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
from launcher.tasks.task import IGNORE, Sample, Task
from launcher.tasks.written_logits import KEY, MANIFEST, TEACHER_LOGITS, TEACHER_TOKENS, Manifest
from launcher.training.data.dataset import Dataset

_READ = ("input_ids", "targets", "media_hash")
"""The arrays of a sample by which its logits are found: what its model reads, and which tokens are learned. The
label of a class is not among them, nor where a file lies."""
_ITEMS = 1024


def key_of(sample: Mapping[str, np.ndarray]) -> int:
    """Return a hash of what a teacher's logits of a sample hang on, 64 bits."""
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


def num_learned(sample: Sample) -> int:
    """Return the supervised tokens of a sample; 0 of one without targets."""
    return int((sample["targets"] != IGNORE).sum()) if "targets" in sample else 0


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens with their numbers."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


@dataclass(frozen=True)
class WrittenLogits:
    """The logits in a directory, mapped into memory: what is read is what a batch needs."""

    directory: Path
    manifest: Manifest
    arrays: Mapping[str, np.ndarray]
    """By their file's name: `keys` uint64 [samples] in order, `checks` uint64 [samples], `logits` fp32 [samples,
    classes]; of a language model `offsets` int64 [samples + 1], `logits` fp32 [positions, k + 1] and `tokens`
    int32 [positions, k]."""

    @classmethod
    def open(cls, directory: Path) -> WrittenLogits:
        """Map the files of a directory. Raises ConfigurationError where it is not whole, DataError where a file
        is none of numbers."""
        manifest, arrays = Manifest.read(directory), {}
        for name in manifest.files:
            try:
                mapped = np.load(directory / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise _damaged(directory / name, str(error)) from None
            arrays[name.removesuffix(".npy")] = np.asarray(mapped).view(np.ndarray)
        expected = _shapes(manifest)
        for name, (dtype, shape) in expected.items():
            if name not in arrays or (arrays[name].dtype, arrays[name].shape) != (dtype, shape):
                raise _damaged(directory / f"{name}.npy", f"{dtype} {list(shape)} were written")
        return cls(directory, manifest, arrays)

    def suit(self, task: Task, tokenizer: Any) -> None:
        """Raise ConfigurationError where they are of other classes, or of another tokenizer, than a task's."""
        reason = self.manifest.other_classes(None if task.labels is None else tuple(task.labels))
        if self.manifest.tokenizer and self.manifest.tokenizer != vocabulary_digest(tokenizer):
            reason = "logits of another tokenizer: the same token must have the same number"
        if reason:
            raise ConfigurationError(Problem(KEY, str(self.directory), reason))

    def hold(self, record: Path) -> None:
        """Hold a run to the logits that it began with: write which they are to `record`, or compare. Raises
        DataError."""
        now = {"digest": self.manifest.digest, "teacher": self.manifest.teacher}
        if not record.exists():
            write_atomically(record, json.dumps(now) + "\n")
        elif (began := read_json(record))["digest"] != now["digest"]:
            was, other = began["teacher"], now["teacher"]
            reason = f"are not the logits that the run began with (of {was} then, of {other} now)"
            raise DataError(f"{self.directory} {reason}; put them back, or begin a new run")

    def check(self, dataset: Dataset) -> None:
        """Raise DataError where there are no logits of some samples."""
        missing, first = 0, None
        for sample in samples_of(dataset):
            if self._place(sample) is None:
                missing, first = missing + 1, first or sample
        if first is not None:
            reason = "other rows, or the same ones read by another tokenizer, template or data.max_length"
            raise DataError(
                f"distillation.logits = {str(self.directory)!r}: {missing:,} of {dataset.num_samples:,} samples "
                f"have no logits there, the first is of row {first.id} ({reason}); write them with this job: "
                "launcher predict TEACHER --job JOB --logits DIR"
            )

    def of(self, items: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
        """Return what a batch of these items has of its teacher.

        Of classes `teacher_logits`, fp32 [samples, outputs]. Of a language model, at the supervised positions of
        the samples in their order: `teacher_logits`, fp32 [n, k + 1], logarithms of the probabilities of tokens
        and of all others together, and `teacher_tokens`, int64 [n, k]. Raises DataError for logits that are not
        there, or not what was written.
        """
        samples = [sample for item in items for sample in item]
        if "offsets" not in self.arrays:
            rows = [self._rows(sample)[0] for sample in samples]
            return {TEACHER_LOGITS: torch.from_numpy(np.concatenate(rows))}
        both = [self._rows(sample) for sample in samples if sample.weight]
        num_tokens = self.manifest.num_outputs
        logits = np.concatenate([np.empty((0, num_tokens + 1), np.float32), *(one for one, _ in both)])
        tokens = np.concatenate([np.empty((0, num_tokens), np.int32), *(one for _, one in both)])
        return {
            TEACHER_LOGITS: torch.from_numpy(logits),
            TEACHER_TOKENS: torch.from_numpy(tokens.astype(np.int64)),
        }

    def _place(self, sample: Sample) -> int | None:
        keys, key = self.arrays["keys"], np.uint64(key_of(sample))
        place = int(np.searchsorted(keys, key))
        return place if place < len(keys) and keys[place] == key else None

    def _rows(self, sample: Sample) -> tuple[np.ndarray, ...]:
        """Return a sample's logits, and its tokens, checked."""
        place = self._place(sample)
        if place is None:
            raise _damaged(self.directory, f"there are no logits of row {sample.id}")
        begin, end = place, place + 1
        if "offsets" in self.arrays:
            begin, end = self.arrays["offsets"][place : place + 2].tolist()
        rows = tuple(self.arrays[name][begin:end] for name in ("logits", "tokens") if name in self.arrays)
        if _check(int(self.arrays["keys"][place]), rows) != int(self.arrays["checks"][place]):
            raise _damaged(
                self.directory / "logits.npy", f"the logits of row {sample.id} are not those written"
            )
        return rows


class Writer:
    """DIR.partial, which becomes DIR once all logits are in it; stopped, it goes on where it was."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], lengths: Mapping[int, int]) -> None:
        """Take the final name; what its manifest will say but for the files; and of each key in order how many
        rows it has."""
        self.directory = directory
        self.path = directory.with_name(f"{directory.name}.partial")
        self._state_file = self.path / "state.json"
        self._keys = np.fromiter(lengths, np.uint64, len(lengths))
        counts = np.fromiter(lengths.values(), np.int64, len(lengths))
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        keys = xxhash.xxh3_64_hexdigest(self._keys.tobytes())
        self._of = json.loads(json.dumps({**manifest, "keys": keys}))
        self._manifest = Manifest.model_validate({**manifest, "files": {}, "digest": ""})
        self._arrays: dict[str, np.ndarray] = {}

    def begin(self) -> int:
        """Return how many samples are there already of logits that were begun of the same; what was begun of
        others is removed. Raises StorageError where the disk does not take them."""
        try:
            state: Any = read_json(self._state_file)
        except (OSError, ValueError):
            state = None
        goes_on = isinstance(state, dict) and state.get("of") == self._of
        try:
            if not goes_on:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir()
            for name, (dtype, shape) in _shapes(self._manifest).items():
                file = self.path / f"{name}.npy"
                if goes_on:
                    self._arrays[name] = np.load(file, mmap_mode="r+", allow_pickle=False)
                else:
                    self._arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)
            self._arrays["keys"][:] = self._keys
            if "offsets" in self._arrays:
                self._arrays["offsets"][:] = self._offsets
            if not goes_on:
                self.keep(0)
        except (OSError, ValueError) as error:
            raise self._refused(error) from None
        return int(state["done"]) if goes_on else 0

    def put(self, key: int, rows: tuple[np.ndarray, ...]) -> None:
        """Write the logits of one sample, and its tokens."""
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        begin, end = (place, place + 1) if "offsets" not in self._arrays else self._offsets[place : place + 2]
        for name, values in zip(("logits", "tokens"), rows, strict=False):
            self._arrays[name][begin:end] = values
        written = [self._arrays[name][begin:end] for name, _ in zip(("logits", "tokens"), rows, strict=False)]
        self._arrays["checks"][place] = _check(key, written)

    def keep(self, done: int) -> None:
        """Note, durably, that so many samples are there. Raises StorageError."""
        try:
            for array in self._arrays.values():
                array.flush()  # type: ignore[attr-defined]
            write_atomically(self._state_file, json.dumps({"of": self._of, "done": done}) + "\n")
        except OSError as error:
            raise self._refused(error) from None

    def finish(self) -> Manifest:
        """Give the directory its name. Raises StorageError."""
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
    number, outputs = manifest.num_samples, manifest.num_outputs
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "keys": (np.uint64, (number,)),
        "checks": (np.uint64, (number,)),
    }
    if manifest.vocabulary:
        positions = manifest.num_positions
        shapes |= {"offsets": (np.int64, (number + 1,)), "logits": (np.float32, (positions, outputs + 1))}
        shapes["tokens"] = (np.int32, (positions, outputs))
    else:
        shapes["logits"] = (np.float32, (number, outputs))
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in shapes.items()}


def _check(key: int, rows: Sequence[np.ndarray]) -> int:
    """Return a hash of a sample's logits, 64 bits."""
    digest = key
    for array in rows:
        digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).data, seed=digest)
    return digest


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"distillation.logits: {path}: {what}; write the logits anew")
