"""Random damage to a checkpoint, as disks, crashes and people do it."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from launcher.runs.checkpoints import MANIFEST_NAME, _canonical, _text_hash

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
    """A file of another step or another run: old metadata over new shards, a foreign shard, a foreign
    manifest."""
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


def overwrite(target: Path, other: Path, generator: random.Random) -> str:
    """Noise over a range of bytes, as a misdirected write leaves it."""
    path = _any_file(target, generator)
    content = bytearray(path.read_bytes())
    begin, length = generator.randrange(len(content)), generator.choice([1, 8, 512, PAGE_BYTES])
    content[begin : begin + length] = generator.randbytes(min(length, len(content) - begin))
    path.write_bytes(content)
    return f"{path.name} overwritten at {begin}"


def shift(target: Path, other: Path, generator: random.Random) -> str:
    """Bytes lost in the middle, or put in: everything behind them moves."""
    path = _any_file(target, generator)
    content = bytearray(path.read_bytes())
    begin, length = generator.randrange(len(content)), generator.randrange(1, 64)
    content[begin : begin + generator.choice([0, length])] = generator.choice(
        [b"", generator.randbytes(length)]
    )
    path.write_bytes(content)
    return f"{path.name} shifted at {begin}"


def swap_pages(target: Path, other: Path, generator: random.Random) -> str:
    """Two ranges of one file in each other's place: every byte is there, and the size is right."""
    path = _any_file(target, generator)
    content = bytearray(path.read_bytes())
    length = min(PAGE_BYTES, len(content) // 2)
    first, second = 0, generator.randrange(length, len(content) - length + 1)
    content[first : first + length], content[second : second + length] = (
        content[second : second + length],
        content[first : first + length],
    )
    path.write_bytes(content)
    return f"pages at {first} and {second} of {path.name} swapped"


def lose_tail(target: Path, other: Path, generator: random.Random) -> str:
    """Zeros at the end of the right length, as a file system leaves what was never flushed."""
    path = _any_file(target, generator)
    size = path.stat().st_size
    os.truncate(path, generator.randrange(size))
    os.truncate(path, size)
    return f"the tail of {path.name} zeroed"


def empty(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    os.truncate(path, 0)
    return f"{path.name} emptied"


def rename(target: Path, other: Path, generator: random.Random) -> str:
    path = _any_file(target, generator)
    path.rename(
        target
        / generator.choice([path.name.upper() + "_", f"{path.name}~", f"{path.name} (1)", f".{path.name}"])
    )
    return f"{path.name} renamed"


def replace(target: Path, other: Path, generator: random.Random) -> str:
    """Something else than a file under its name."""
    path = _any_file(target, generator)
    path.unlink()
    kind = generator.choice(["directory", "pipe", "link to nothing", "link to itself", "device"])
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(
            {"link to nothing": "nowhere", "link to itself": path.name, "device": "/dev/zero"}[kind]
        )
    return f"{path.name} made a {kind}"


def rewrite_manifest(target: Path, other: Path, generator: random.Random) -> str:
    """A manifest of other content, with the right hash of itself: valid JSON all the way, and not what was
    written."""
    path = target / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("manifest_xxh3_128")
    key = generator.choice(
        [
            "step",
            "run_id",
            "files",
            "progress",
            "format",
            "world_size",
            "created",
            "metrics",
            "mesh",
            "a file",
        ]
    )
    if key == "a file":
        content["files"].pop(generator.choice(sorted(content["files"])))
    else:
        content[key] = generator.choice([None, -1, "x", [], {"a": {}}, 10**30])
    path.write_text(_canonical({**content, "manifest_xxh3_128": _text_hash(content)}))
    return f"{key} of the manifest rewritten"


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
    overwrite,
    shift,
    swap_pages,
    lose_tail,
    empty,
    rename,
    replace,
    rewrite_manifest,
]


def damage(target: Path, others: list[Path], generator: random.Random) -> str:
    """Damage a checkpoint in one random way and say how; `others` lend files. The bytes are never left as
    they were."""
    before = _state(target)
    while True:
        what = generator.choice(KINDS)(target, generator.choice(others), generator)
        if _state(target) != before:
            return what


def _state(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Names, kinds and bytes; a link counts as a change, lest the next damage be done through it to another
    checkpoint."""
    modes = {path: stat.S_IFMT(path.lstat().st_mode) for path in directory.iterdir()}
    return {
        path.name: (mode, path.read_bytes() if mode == stat.S_IFREG else b"") for path, mode in modes.items()
    }
