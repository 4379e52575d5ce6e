"""Writing logits ahead: every rank writes its own samples' into one directory, under a temporary name."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from launcher.errors import StorageError
from launcher.plain_files import read_json
from launcher.runs.layout import sync_directory, write_atomically
from launcher.runs.wording import size
from launcher.tasks.written_logits import MANIFEST, Manifest
from launcher.training.data.written_logits import as_stored, bounds, check_of, hash_of_matrix, shapes
from launcher.training.precision import DTYPES

_ELEMENTS = 1 << 24
"""Numbers of an output matrix that are copied at a time."""


class Writer:
    """DIR.partial, which becomes DIR once it has all logits; if stopped, it can be resumed.

    The ranks of one machine write into the same mapped files. Rank 0 creates them, the others join, and only
    rank 0 records what is done.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Mapping[str, Any],
        keys: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> None:
        """Take the final name, the content of its manifest without the files, the keys of all samples in order,
        and of a language model the number of supervised tokens of each."""
        self.directory = directory
        self.path = directory.with_name(f"{directory.name}.partial")
        self._state_file = self.path / "state.json"
        self._keys = np.array(keys, dtype=np.uint64)
        self._ends = None if counts is None else np.cumsum(counts, dtype=np.int64)
        digest = xxhash.xxh3_64_hexdigest(self._keys.tobytes())
        self._of = json.loads(json.dumps({**manifest, "keys": digest}))
        self._manifest = Manifest.model_validate({**manifest, "files": {}, "digest": ""})
        self._arrays: dict[str, np.memmap[Any, Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all arrays on the disk."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes(self._manifest).values())

    def begin(self) -> int:
        """Return the number of samples already written by an interrupted call with the same content; other
        partial files are removed.

        Raises StorageError if the disk has no room; then nothing is left there.
        """
        try:
            state: Any = read_json(self._state_file)
        except (OSError, ValueError):
            state = None
        goes_on = isinstance(state, dict) and state.get("of") == self._of
        created = False
        try:
            if not goes_on:
                if self._state_file.is_file():
                    shutil.rmtree(self.path)  # a directory without it belongs to somebody else
                self.path.mkdir()
                created = True
            self._open("r+" if goes_on else "w+")
            for array in self._arrays.values():
                with open(
                    str(array.filename), "r+b"
                ) as whole:  # if the disk fills up later, the process is killed
                    os.posix_fallocate(whole.fileno(), 0, Path(str(array.filename)).stat().st_size)
            self._arrays["keys"][:] = self._keys
            if self._ends is not None:
                self._arrays["ends"][:] = self._ends
            if not goes_on:
                self.keep(0)
        except (OSError, ValueError) as error:
            if created:
                self._arrays.clear()
                shutil.rmtree(self.path, ignore_errors=True)
            raise self._refused(error, f"it takes {size(self.num_bytes)}" if created else None) from None
        return int(state["done"]) if goes_on else 0

    def join(self) -> None:
        """Map the files that rank 0 has created. Raises StorageError."""
        try:
            self._open("r+")
        except (OSError, ValueError) as error:
            raise self._refused(error) from None

    def put(self, key: int, values: np.ndarray) -> None:
        """Write the values of one sample: logits, fp32 [outputs], or hidden states [supervised tokens, width] as
        they are stored."""
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        begin, end = bounds(self._ends, place)
        array = self._arrays["logits" if self._ends is None else "states"]
        array[begin:end] = values
        self._arrays["checks"][place] = check_of(key, array[begin:end])

    def put_matrix(self, name: str, tensor: torch.Tensor) -> None:
        """Write a language model's output `matrix`, or its `bias`, some rows at a time."""
        dtype, array = DTYPES[self._manifest.precision], self._arrays[name]
        rows = max(1, _ELEMENTS // math.prod(array.shape[1:]))
        for begin in range(0, len(array), rows):
            array[begin : begin + rows] = as_stored(tensor[begin : begin + rows].to(dtype))

    def flush(self) -> None:
        """Write what this rank has put to the disk. Raises StorageError."""
        try:
            for array in self._arrays.values():
                array.flush()
        except OSError as error:
            raise self._refused(error) from None

    def keep(self, done: int) -> None:
        """Record durably that `done` samples are written, once all ranks have flushed theirs. Raises
        StorageError."""
        self.flush()
        try:
            write_atomically(self._state_file, json.dumps({"of": self._of, "done": done}) + "\n")
        except OSError as error:
            raise self._refused(error) from None

    def finish(self) -> Manifest:
        """Rename the directory to its final name. Raises StorageError."""
        try:
            hidden, digest = self._manifest.hidden, xxhash.xxh3_128(self._keys.tobytes())
            digest.update(np.ascontiguousarray(self._arrays["checks"]).data)
            if hidden is not None:
                of_matrix = hash_of_matrix(self._arrays["matrix"], self._arrays.get("bias"))
                digest.update(of_matrix.encode())
                hidden = hidden.model_copy(update={"matrix_hash": of_matrix})
            files = {f"{name}.npy": (self.path / f"{name}.npy").stat().st_size for name in self._arrays}
            changes = {"files": files, "digest": digest.hexdigest(), "hidden": hidden}
            manifest = self._manifest.model_copy(update=changes)
            write_atomically(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            self._state_file.unlink()
            self._arrays.clear()
            self.path.rename(self.directory)
            sync_directory(self.directory.parent)
        except OSError as error:
            raise self._refused(error) from None
        return manifest

    def _open(self, mode: str) -> None:
        for name, (dtype, shape) in shapes(self._manifest).items():
            file = self.path / f"{name}.npy"
            self._arrays[name] = np.lib.format.open_memmap(file, mode, dtype, shape)

    def _refused(self, error: Exception, also: str | None = None) -> StorageError:
        why = getattr(error, "strerror", None) or error
        return StorageError(
            f"--logits {self.directory}: {why}; {also or f'what is there stays in {self.path.name}'}"
        )
