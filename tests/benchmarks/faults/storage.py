"""Rows 9 to 11 and 18, and what was seen of disks and directories before."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.runs.status import last_step
from tests.benchmarks.faults import shim
from tests.benchmarks.faults.material import EVERY, NUM_STEPS
from tests.benchmarks.faults.registry import ENGINES, ONE, SAVING, Expected, injection
from tests.benchmarks.faults.scene import Scene, later

SURVIVES = Expected(words=("training goes on",), seconds=90)


def needs_root() -> str | None:
    """Why nothing can be mounted here."""
    return None if os.geteuid() == 0 else "mounting needs root"


@contextlib.contextmanager
def full(place: Path, spare: int = 0) -> Iterator[None]:
    """The file system below `place` has `spare` bytes left."""
    filler = place / "filler"
    _fill(filler)
    if spare:
        os.truncate(filler, max(0, filler.stat().st_size - spare))
    try:
        yield
    finally:
        filler.unlink()


def _fill(filler: Path) -> None:
    for size in (1 << 20, 4096):
        with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))


@injection(
    "9",
    "a disk that gets full in the middle of a shard, and has room again later",
    Expected(words=("was given up for it",), seconds=90),
    SAVING,
    needs_root,
)
def full_in_a_shard(scene: Scene) -> None:
    scene.mount(64)
    scene.start()
    scene.wait_step()
    before = {path.name for path in scene.run.checkpoints.glob("step-*")}
    with full(scene.run.path.parent, spare=300_000):
        scene.hit()
        scene.wait(
            lambda: scene.events("save_failed") or scene.events("made_room"),
            "a save that failed, or older ones given up for it",
        )
        scene.check(
            "the newest checkpoint stays",
            (scene.run.checkpoints / max(before)).is_dir() or scene.events("made_room"),
        )
    scene.wait_end(90)
    scene.check("training went on", scene.run.finished)


@injection(
    "9, S6",
    "a disk that is full to the last byte, and stays so",
    # No class can be written down there: the screen has it.
    Expected(
        (5,), words=("storage:", "no space left", "tried again for a minute", "launcher resume"), seconds=150
    ),
    ENGINES,
    needs_root,
)
def full_to_the_last_byte(scene: Scene) -> None:
    scene.mount(64)
    # With an older checkpoint to give up, or one about to go, there would be room for the next.
    scene.start(changes={"checkpoint": {"keep_last": 1}})
    scene.wait_step()
    places = scene.run.checkpoints
    scene.wait(
        lambda: last_step(scene.run) % EVERY in (1, 2) and len(list(places.iterdir())) == 1,
        "one checkpoint alone",
    )
    with full(scene.run.path.parent):
        scene.hit()
        scene.wait_end(150)
        scene.check("no traceback on the screen", "Traceback" not in scene.output())
        scene.check("one line tells the cause", "storage:" in scene.output())
    left = [path.name for path in scene.run.attempt(1).glob(".*")]
    scene.check("no leftovers of files that could not be written", not left)


@injection(
    "S12", "a disk with room for two checkpoints and not for three", Expected(seconds=90), ONE, needs_root
)
def room_for_two(scene: Scene) -> None:
    scene.mount(64)
    scene.start(changes={"checkpoint": {"keep_last": 2}})
    scene.wait(lambda: len(scene.events("saved")) >= 2, "two saves")
    one = sum(path.stat().st_size for path in scene.run.checkpoint(5).iterdir())
    place = scene.run.path.parent
    file_system = os.statvfs(place)
    used = (file_system.f_blocks - file_system.f_bfree) * file_system.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={used + one // 2}", str(place)], check=True)
    scene.hit()
    scene.wait_end(90)
    scene.check("its last step is saved", scene.run.checkpoint(NUM_STEPS).exists())


def _fails(number: int, variants: tuple[str, ...]) -> None:
    @injection(
        "10",
        f"{errno.errorcode[number]} on every write of a checkpoint, for a while",
        SURVIVES,
        variants,
        shim.missing,
        f"fails_{errno.errorcode[number]}",
    )
    def fails(scene: Scene) -> None:
        scene.start(shim=True, changes={"training": {"max_steps": NUM_STEPS}})
        scene.wait_step()
        before = {path.name for path in scene.run.checkpoints.glob("step-*")}
        scene.shim.order(f"spoil {scene.run.checkpoints} {number}")
        scene.hit()
        scene.wait(lambda: scene.events("save_failed"), "a save that failed")
        scene.check("the newest checkpoint stays", (scene.run.checkpoints / max(before)).is_dir())
        reason = scene.events("save_failed")[0]["reason"]
        scene.check(
            "the reason names a file",
            any(name in reason for name in ("distcp", ".metadata", "manifest.json")),
        )
        scene.shim.order()
        scene.wait_end(90)
        scene.check("training went on", scene.run.finished)


_fails(errno.EIO, SAVING)
_fails(errno.EROFS, ("FSDP", "ZeRO-3"))
_fails(errno.EDQUOT, ("FSDP", "ZeRO-2, plain saving"))


@injection(
    "10",
    "EIO on every write of a checkpoint to the end",
    Expected((5,), "storage", ("input/output error", "tried again for a minute", "launcher resume"), 150),
    ENGINES,
    shim.missing,
)
def fails_to_the_end(scene: Scene) -> None:
    scene.start(shim=True)
    scene.wait_step()
    scene.shim.order(f"spoil {scene.run.checkpoints} {errno.EIO}")
    scene.hit()
    scene.wait_end(150)
    scene.shim.order()


@injection(
    "11, S3",
    "writes below checkpoints/ hang",
    Expected(codes=None, words=("the save of step", "has not moved"), seconds=200),
    ENGINES,
    shim.missing,
)
def saves_hang(scene: Scene) -> None:
    scene.start(shim=True)
    scene.wait_step(11)
    scene.shim.order(f"hang {scene.run.checkpoints}")
    scene.hit()
    scene.wait_named("has not moved", seconds=90)
    scene.shim.order()


@injection(
    "11, S3",
    "every write of the run directory hangs, then SIGTERM",
    Expected(codes=None, seconds=60, most_lost=8),
    ONE,
    shim.missing,
)
def run_directory_hangs(scene: Scene) -> None:
    scene.start(shim=True, changes={"cluster": {"grace": "8s"}})
    scene.wait_step(11)
    scene.shim.order(f"hang {scene.run.path}")
    scene.hit()
    later(2, lambda: scene.signal(signal.SIGTERM, "launcher")).join()
    scene.wait_end(30)
    scene.check("SIGTERM ends it within its grace", not scene.running())
    scene.give_up()
    scene.shim.order()


@injection(
    "11",
    "writes of the run directory hang for 10 s, and go on",
    Expected(seconds=90),
    ("FSDP", "ZeRO-3"),
    shim.missing,
)
def run_directory_hangs_for_a_while(scene: Scene) -> None:
    scene.start(shim=True)
    scene.wait_step(11)
    scene.shim.order(f"hang {scene.run.path}")
    scene.hit()
    time.sleep(10)
    scene.shim.order()


@injection(
    "18",
    "a checkpoint without its sync to disk (order of calls)",
    Expected(seconds=90, resumes=False),
    SAVING,
    shim.missing,
)
def synced_before_it_is_named(scene: Scene) -> None:
    log = scene.folder / "calls"
    scene.shim.order(f"log {log}")
    scene.start(shim=True)
    scene.hit()
    scene.wait_end(90)
    calls = [line.split() for line in log.read_text().splitlines()]
    target = str(scene.run.checkpoint(10))
    at = next(index for index, call in enumerate(calls) if call[0] == "rename" and call[-1] == target)
    synced = {call[1] for call in calls[:at] if call[0] == "fsync"}
    attempt = calls[at][1]
    wanted = {f"{attempt}/{path.name}" for path in scene.run.checkpoint(NUM_STEPS).iterdir()} | {attempt}
    scene.check("every file and the directory are synced before the rename", wanted <= synced)
    after = [call[1] for call in calls[at:] if call[0] == "fsync"]
    scene.check("the directory of checkpoints is synced after it", str(scene.run.checkpoints) in after)
    everything = {call[1] for call in calls if call[0] == "fsync"}
    scene.check(
        "the run directory is synced (it names checkpoints/, FINISHED, run_id)",
        str(scene.run.path) in everything,
    )


@injection(
    "S5", "the run directory is deleted", Expected((5,), None, ("run directory",), 40, resumes=False), ONE
)
def deleted(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 4000}})
    scene.wait_step()
    pids = scene.note()
    scene.hit()
    shutil.rmtree(scene.run.path, ignore_errors=True)
    scene.wait_end(40)
    scene.check("it ends by itself within 40 s", not scene.running())
    scene.give_up(pids)


@injection(
    "S5", "the run directory is renamed", Expected((5,), None, ("run directory",), 40), ("FSDP", "ZeRO-3")
)
def renamed(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 4000}})
    scene.wait_step()
    pids = scene.note()
    scene.hit()
    scene.run.path.rename(scene.folder / "elsewhere")
    scene.wait_end(40)
    scene.check("it ends by itself within 40 s", not scene.running())
    scene.give_up(pids)
    (scene.folder / "elsewhere").rename(scene.run.path)


@injection("-", "TMPDIR full", Expected(seconds=90), ("FSDP", "ZeRO-3"), needs_root)
def temporary_full(scene: Scene) -> None:
    place = scene.mount_at(scene.folder / "tmp", 1)
    _fill(place / "filler")
    scene.start(more={"TMPDIR": str(place)})
    scene.hit()
    scene.wait_end(90)


@injection(
    "-",
    "HOME and the cache cannot be written",
    Expected((5,), None, ("XDG_CACHE_HOME",), 30, resumes=False),
    ONE,
    shim.missing,
)
def cache_read_only(scene: Scene) -> None:
    cache = scene.folder / "cache"
    cache.mkdir()
    scene.shim.order(f"fail {cache} {errno.EROFS}")
    scene.start(shim=True, more={"XDG_CACHE_HOME": str(cache)})
    scene.hit()
    scene.wait_end(60)


@injection("S10", "a file system without flock (ENOSYS)", Expected(codes=None, seconds=90), ONE, shim.missing)
def no_flock(scene: Scene) -> None:
    scene.shim.order(f"flock {errno.ENOSYS}")
    scene.start(shim=True)
    scene.hit()
    scene.wait_end(90)
    scene.check("it does not blame another launcher", "in use by another process" not in scene.output())
    scene.check("it runs, or says what is missing", scene.run.finished or "flock" in scene.output())
    scene.shim.order()


@injection(
    "S12",
    "few file descriptors (ulimit -n 40)",
    Expected((2, 5), None, ("ulimit -n", "files open"), 60, resumes=False),
    ONE,
)
def few_descriptors(scene: Scene) -> None:
    scene.start(limits=40)
    scene.hit()
    scene.wait_end(90)
    scene.check("it ends", not scene.running())
    scene.give_up()
