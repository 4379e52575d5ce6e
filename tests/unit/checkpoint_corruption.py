"""Random damage to a checkpoint, as disks, crashes and people do it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.runs.checkpoints import MANIFEST_NAME

PAGE_BYTES = 4096


def flip_bit(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    content = bytearray(path.read_bytes())
    position = generator.randrange(len(content) * 8)
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    return f"bit {position} of {path.name} flipped"


def zero_page(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    content = bytearray(path.read_bytes())
    begin = generator.randrange(len(content)) // PAGE_BYTES * PAGE_BYTES
    end = min(begin + PAGE_BYTES, len(content))
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    return f"page at {begin} of {path.name} zeroed"


def truncate(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    length = generator.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"{path.name} cut to {length}"


def lengthen(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    with open(path, "ab") as file:
        file.write(generator.randbytes(generator.randrange(1, 100)))
    return f"{path.name} made longer"


def swap(target: Path, other: Path, generator: random.Random) -> str:
    first, second = generator.sample(sorted(target.iterdir()), 2)
    aside = target / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return f"{first.name} and {second.name} swapped"


def miss(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    path.unlink()
    return f"{path.name} missing"


def add(target: Path, other: Path, generator: random.Random) -> str:
    name = generator.choice(["__9_0.distcp", "notes.txt", ".nfs0001", "manifest.json.tmp"])
    (target / name).write_bytes(generator.randbytes(50))
    return f"{name} added"


def mix(target: Path, other: Path, generator: random.Random) -> str:
    """A file of another step or another run: old metadata over new shards, a foreign shard, a foreign manifest."""
    source = _any_file(other, generator)
    shutil.copyfile(source, target / source.name)
    return f"{source.name} taken from {other}"


def halve_manifest(target: Path, other: Path, generator: random.Random) -> str:
    path = target / MANIFEST_NAME
    os.truncate(path, path.stat().st_size // 2)
    return "manifest half written"


def link(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    path.unlink()
    path.symlink_to(other / path.name)
    return f"{path.name} made a link"


def _any_file(directory: Path, generator: random.Random) -> Path:
    return generator.choice(sorted(directory.iterdir()))


KINDS: list[Callable[[Path, Path, random.Random], str]] = [
    flip_bit,
    zero_page,
    truncate,
    lengthen,
    swap,
    miss,
    add,
    mix,
    halve_manifest,
    link,
]


def damage(target: Path, others: list[Path], generator: random.Random) -> str:
    """Damage a checkpoint in one random way and say how; `others` lend files. The bytes are never left as they were."""
    before = _state(target)
    while True:
        what = generator.choice(KINDS)(target, generator.choice(others), generator)
        if _state(target) != before:
            return what


def _state(directory: Path) -> dict[str, tuple[bool, bytes]]:
    """Names, kinds and bytes; a link counts as a change, lest the next damage be done through it to another checkpoint."""
    return {path.name: (path.is_symlink(), path.read_bytes()) for path in directory.iterdir()}
