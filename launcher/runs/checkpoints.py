"""Checkpoints as files, without torch: manifests, hashes, and the choice of the one to trust.

A checkpoint is complete if its manifest is intact and belongs to this run and to the step in the directory's
name, and if it lists exactly the files of the directory, with the right sizes and hashes. No other checkpoint
is ever chosen.
"""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.plain_files import parse_json, plain, read_text
from launcher.runs.layout import STEP_DIRECTORY, RunDirectory

MANIFEST_NAME = "manifest.json"
_BLOCK_BYTES = 1 << 20
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileRecord(_Frozen):
    """The size and hash of one file, from its writer."""

    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    xxh3_128: str


class Progress(_Frozen):
    """The progress of training at a checkpoint."""

    step: Count
    """Optimizer steps done."""
    samples: Count
    """Global samples (packs) consumed: the position in the data."""
    tokens: Count
    """Non-padding tokens consumed."""
    extra: dict[str, Any] = {}
    """Other state that the trainer needs to resume; anything JSON can hold."""


class Manifest(_Frozen):
    """The content of manifest.json, which is written last: where it exists, all other files were written."""

    format: Literal[1] = 1
    run_id: str
    step: Count
    engine: str
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    mesh: dict[str, int]
    plan_digest: str
    created: Annotated[float, Field(ge=0, lt=1e11)]
    """Seconds since 1970."""
    progress: Progress
    metrics: dict[str, float]
    files: dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], FileRecord]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> str:
        """Return the canonical text of this manifest, which includes a hash of its own content."""
        content = self.model_dump(mode="python")
        return _canonical({**content, "manifest_xxh3_128": _text_hash(content)})

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Read a manifest. Raises ValueError, with the reason, for any text that `to_json` did not write."""
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(content, dict) or _canonical(content) != text:
            raise ValueError("not as it was written")
        if content.pop("manifest_xxh3_128", None) != _text_hash(content):
            raise ValueError("its hash of itself does not fit its content")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _text_hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_canonical(content).encode())


@dataclass(frozen=True)
class Stored:
    """A directory that is named as a checkpoint: with its manifest, if that can be read, and its problems."""

    step: int
    directory: Path
    manifest: Manifest | None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True)
class Choice:
    """The newest complete checkpoint, and the newer ones that were rejected."""

    chosen: Stored | None
    rejected: tuple[Stored, ...] = field(default=())


def hash_file(path: Path) -> str:
    """Return the xxh3_128 hash of a file's content, read in blocks. Raises OSError."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0, opener=plain) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def look(directory: Path, run_id: str | None) -> Stored:
    """Check a checkpoint without reading its data: manifest, file names and sizes.

    `run_id` None accepts any run's.
    """
    match = STEP_DIRECTORY.match(directory.name)
    step = int(match[1]) if match else -1
    try:
        text = read_text(directory / MANIFEST_NAME)
        manifest = Manifest.parse(text)
    except FileNotFoundError:
        return Stored(step, directory, None, (f"{MANIFEST_NAME} is missing: it was never finished",))
    except (OSError, ValueError) as error:
        return Stored(step, directory, None, (f"{MANIFEST_NAME} cannot be trusted: {error}",))
    problems: list[str] = []
    if manifest.step != step:
        problems.append(f"the directory is named {directory.name}, its manifest says step {manifest.step}")
    if run_id is not None and manifest.run_id != run_id:
        problems.append(f"it belongs to another run ({manifest.run_id}, this one is {run_id})")
    problems += _listing_problems(directory, manifest)
    return Stored(step, directory, manifest, tuple(problems))


def _listing_problems(directory: Path, manifest: Manifest) -> list[str]:
    present: dict[str, os.stat_result] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name != MANIFEST_NAME:
                    present[entry.name] = entry.stat(follow_symlinks=False)
    except OSError as error:
        return [f"cannot be listed: {error}"]
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - present.keys())]
    problems += [f"{name} does not belong to it" for name in sorted(present.keys() - manifest.files.keys())]
    for name in sorted(present.keys() & manifest.files.keys()):
        expected = manifest.files[name].bytes
        if not stat.S_ISREG(present[name].st_mode):
            problems.append(f"{name} is not a plain file")
        elif present[name].st_size != expected:
            problems.append(f"{name} has {present[name].st_size:,} bytes, {expected:,} were written")
    return problems


def file_problem(directory: Path, name: str, record: FileRecord) -> str | None:
    """Return the problem with the content of one file of a checkpoint; None if there is none."""
    try:
        digest = hash_file(directory / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return (
        None
        if digest == record.xxh3_128
        else f"{name} is not what was written (xxh3_128 {digest}, should be {record.xxh3_128})"
    )


def content_problems(
    directory: Path, files: dict[str, FileRecord], num_threads: int | None = None
) -> list[str]:
    """Return the problems with the content of these files. Hashing releases the GIL, so threads help."""
    workers = min(len(files), num_threads or len(os.sched_getaffinity(0)))
    if workers <= 1:
        problems = [file_problem(directory, name, record) for name, record in files.items()]
    else:
        with ThreadPoolExecutor(workers) as pool:
            problems = list(pool.map(lambda item: file_problem(directory, *item), files.items()))
    return [problem for problem in problems if problem]


def verify(directory: Path, run_id: str | None = None, num_threads: int | None = None) -> list[str]:
    """Return all problems with a checkpoint, with its data read and hashed; an empty list if it is complete."""
    stored = look(directory, run_id)
    if stored.problems or stored.manifest is None:
        return list(stored.problems)
    return content_problems(directory, stored.manifest.files, num_threads)


def list_checkpoints(run: RunDirectory) -> list[Stored]:
    """Return all directories named as checkpoints, oldest first, each checked without reading its data."""
    if not run.checkpoints.is_dir():
        return []
    run_id = run.run_id()
    names = [path for path in run.checkpoints.iterdir() if STEP_DIRECTORY.match(path.name)]
    return [
        look(path, run_id) for path in sorted(names, key=lambda path: int(path.name.removeprefix("step-")))
    ]


def newest_valid(run: RunDirectory, num_threads: int | None = None) -> Choice:
    """Return the newest checkpoint that verifies, and the newer ones that do not, with their problems."""
    rejected: list[Stored] = []
    for stored in reversed(list_checkpoints(run)):
        problems = stored.problems
        if not problems and stored.manifest is not None:
            problems = tuple(content_problems(stored.directory, stored.manifest.files, num_threads))
        if not problems:
            return Choice(stored, tuple(rejected))
        rejected.append(Stored(stored.step, stored.directory, stored.manifest, problems))
    return Choice(None, tuple(rejected))
