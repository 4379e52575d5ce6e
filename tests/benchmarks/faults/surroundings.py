"""Terminals, pipes, clocks, locks and sockets: what is around a run, and rows 30 to 38 as far as one machine
goes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.benchmarks.faults import shim
from tests.benchmarks.faults.material import LAUNCHER, NUM_STEPS, variables
from tests.benchmarks.faults.processes import find
from tests.benchmarks.faults.registry import ALL, ENGINES, ONE, Expected, injection
from tests.benchmarks.faults.scene import Scene


@injection("S2", "the terminal is closed", Expected(codes=(75,), seconds=30, most_lost=0), ENGINES)
def terminal_closed(scene: Scene) -> None:
    with scene.terminal():
        scene.wait_step()
    os.kill(scene.process.pid, signal.SIGHUP)  # type: ignore[union-attr]
    scene.wait_end(40)
    scene.check("it says that it stopped", scene.events("stopped"))


@injection(
    "S2b", "the reader of its output goes away, as `head` does", Expected(codes=(0,), seconds=90), ENGINES
)
def pipe_closed(scene: Scene) -> None:
    reading, writing = os.pipe()
    scene.start(output=writing)
    os.close(writing)
    scene.wait_step(3)
    scene.hit()
    os.close(reading)


@injection("32", "a second launcher in the same run", Expected(seconds=90), ("FSDP", "ZeRO-3"))
def two_launchers(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.hit()
    done = scene.ask("resume", str(scene.run.path))
    scene.check("the second leaves with code 7", done.returncode == 7)
    scene.check("it names the first", str(scene.process.pid) in done.stderr)  # type: ignore[union-attr]


@injection("32", "two launchers at once from nothing", Expected(codes=None, seconds=90), ONE)
def two_from_nothing(scene: Scene) -> None:
    scene.start()
    second = subprocess.Popen(
        [*LAUNCHER, "run", str(scene.folder / "job.yaml"), "--run-dir", str(scene.run.path)],
        env=variables(),
        stderr=subprocess.DEVNULL,
    )
    scene.hit()
    scene.wait_end(120)
    codes = sorted([second.wait(60), scene.process.returncode])  # type: ignore[union-attr]
    scene.seen["codes"] = codes
    scene.check("one trains, the other leaves with code 7", codes == [0, 7])
    scene.check("one attempt", scene.run.last_attempt() == 1)


def _clock(seconds: int) -> None:
    @injection(
        "33",
        f"the clock jumps by {seconds:+} s in training",
        Expected(seconds=90),
        ONE,
        shim.missing,
        name=f"clock{seconds:+}",
    )
    def clock(scene: Scene) -> None:
        scene.start(shim=True)
        scene.wait_step()
        scene.hit()
        scene.shim.order(f"clock {seconds}")
        scene.wait_end(90)
        scene.shim.order()


_clock(7200)
_clock(-7200)


@injection(
    "33, S9",
    "the clock jumps by an hour within the grace",
    Expected(codes=(75,), seconds=40, most_lost=0),
    ENGINES,
    shim.missing,
)
def clock_in_the_grace(scene: Scene) -> None:
    scene.start(inside="slow=1.5@step:all:13", shim=True)
    scene.wait_said()
    scene.signal(signal.SIGTERM, "launcher")
    time.sleep(0.5)
    scene.shim.order("clock 3600")
    scene.wait_end(40)
    scene.shim.order()
    scene.check("it saved", not any(record.get("reason") for record in scene.events("stopped")))


@injection(
    "33, S9",
    "the clock is 30 s ahead of when the run began: `status`",
    Expected((75,), seconds=60, most_lost=0),
    ONE,
    shim.missing,
)
def clock_of_status(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 4000}})
    scene.wait_step(3)
    scene.shim.order("clock 30")
    ahead = scene.ask("status", str(scene.run.path), "--json", shim=True).stdout
    scene.shim.order()
    lock = scene.run.path / ".lock"
    os.utime(lock, (lock.stat().st_mtime - 30, lock.stat().st_mtime - 30))
    older = scene.ask("status", str(scene.run.path), "--json").stdout
    for when, text in (("its lock is 30 s older", older), ("its clock is 30 s ahead", ahead)):
        scene.check(f"`status` says running, where {when}", '"running"' in text)
    scene.signal(signal.SIGTERM, "launcher")


@injection(
    "33",
    "a clock that is two hours off between two attempts",
    Expected(seconds=120),
    ("FSDP", "ZeRO-3"),
    shim.missing,
)
def clock_between_attempts(scene: Scene) -> None:
    scene.copy_stopped()
    scene.shim.order("clock -7200")
    scene.start_again(shim=True)
    scene.hit()
    scene.wait_end(120)
    scene.shim.order()


@injection("S1", "listening sockets that others than this machine reach", Expected(seconds=90), ENGINES)
def listening(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.hit()
    sockets = {inode for process in find(scene.run) for inode in _sockets(process.pid)}
    found = [
        line for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    fields = [line.split() for line in found]
    addresses = [entry[1] for entry in fields if entry[3] == "0A" and entry[9] in sockets]
    loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
    scene.seen["listening"] = [address for address in addresses if not address.startswith(loopback)]
    scene.check("none listens beyond this machine", not scene.seen["listening"])
    argv = "\0".join(
        Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace") for process in find(scene.run)
    )
    scene.check("the run's id is not on a command line", scene.run.run_id() not in argv)


def _sockets(pid: int) -> set[str]:
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                if match := re.match(r"socket:\[(\d+)\]", str(Path(entry.path).readlink())):
                    found.add(match[1])
            except OSError:
                continue
    except OSError:
        pass
    return found


@injection(
    "29",
    "a data file changed between two attempts",
    Expected((3,), "data", ("train.jsonl",), 60, resumes=False),
    ENGINES,
)
def data_changed(scene: Scene) -> None:
    data = scene.own_data()
    scene.start("--stop-at", "12", changes={"data": data})
    scene.wait_end(120)
    path = Path(data["train"]["path"])
    text = path.read_text()
    path.write_text(text.replace("w1", "w2", 1))
    scene.start_again()
    scene.hit()


@injection(
    "29",
    "a data file truncated between two attempts",
    Expected((3,), "data", ("train.jsonl",), 60, resumes=False),
    ONE,
)
def data_truncated(scene: Scene) -> None:
    data = scene.own_data()
    scene.start("--stop-at", "12", changes={"data": data})
    scene.wait_end(120)
    path = Path(data["train"]["path"])
    os.truncate(path, path.stat().st_size // 2)
    scene.start_again()
    scene.hit()


@injection(
    "29, S12",
    "the prepared data truncated under a run",
    Expected((9, 3, 5), None, ("rank",), 30),
    ("FSDP", "ZeRO-3"),
)
def cache_truncated(scene: Scene) -> None:
    cache = scene.folder / "cache"
    scene.start(more={"XDG_CACHE_HOME": str(cache)}, changes={"training": {"max_steps": NUM_STEPS}})
    scene.wait_step(6)
    scene.hit()
    for path in cache.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096 and "launcher/data" in str(path):
            os.truncate(path, 0)
    scene.wait_end(60)
    scene.check(
        "the line speaks of the prepared data",
        any(word in scene.output() for word in ("prepared", "cache", "cut off")),
    )


@injection(
    "30",
    "bad rows: no text, not JSON, not UTF-8, too long",
    Expected(codes=(0, 3), seconds=90, resumes=False),
    ONE,
)
def bad_rows(scene: Scene) -> None:
    data = scene.own_data()
    path = Path(data["train"]["path"])
    long = json.dumps({"text": " ".join(["w1"] * 500)})
    bad = [b'{"text": ""}', b'{"other": "w1 w2"}', long.encode(), b'{"text": "w1 \xff\xfe w2"}']
    path.write_bytes(path.read_bytes() + b"\n".join(bad) + b"\n")
    scene.start(changes={"data": data})
    scene.hit()
    scene.wait_end(90)
    said = [record for record in scene.events("prepared") if record.get("role") == "train"]
    scene.check(
        "they are counted by reason, or refused with file and line",
        "dropped" in str(said) or re.search(r"train\.jsonl.{0,40}20\d", scene.output()),
    )


@injection(
    "34", "another learning rate between two attempts", Expected(codes=None, seconds=120, bits=False), ENGINES
)
def job_changed(scene: Scene) -> None:
    scene.copy_stopped()
    scene.start_again("--set", "training.learning_rate=0.0005")
    scene.hit()
    scene.wait_end(120)
    refused = scene.process.returncode == 2 and "learning_rate" in scene.output()  # type: ignore[union-attr]
    scene.check("it is refused by its key, or written down", refused or scene.events("plan_changed"))


@injection(
    "36",
    "the engine changed from FSDP to ZeRO-3 and back",
    Expected(codes=(0,), seconds=240, bits=False),
    ONE,
)
def engine_changed(scene: Scene) -> None:
    scene.copy_stopped()
    for engine, stop in (("deepspeed", ["--stop-at", "30"]), ("fsdp", [])):
        scene.start_again("--set", f"parallel.engine={engine}", "--set", "parallel.shard=full", *stop)
        scene.hit()
        scene.wait_end(120)
    scene.check(
        "both changes are written down",
        len(scene.events("other_engine")) + len(scene.events("plan_changed")) >= 2,
    )
    scene.compare()
    scene.check("losses within 1e-5 of the undisturbed run's", scene.largest_difference() < 1e-5)


@injection(
    "35",
    "the number of ranks changed, each of 1, 2, 3, 4, 7, 8 into each other",
    Expected(codes=(0, 75), seconds=1800, resumes=False),
    ("FSDP", "ZeRO-3"),
)
def ranks_changed(scene: Scene) -> None:
    sizes = (1, 2, 3, 4, 7, 8)
    # A way over all ordered pairs: 1 2 1 3 1 4 1 7 1 8 2 3 2 4 and so on, and back.
    order = [size for first, second in itertools.combinations(sizes, 2) for size in (first, second)] + [1]
    changes = {
        "batch": {"global_batch_size": 168, "micro_batch_size": 1},
        "training": {"max_steps": len(order) + 1},
        "checkpoint": {"every": 1000},
    }
    scene.start("--nproc", "1", "--stop-at", "1", changes=changes, more={"OMP_NUM_THREADS": "1"})
    scene.wait_end(120)
    for index, size in enumerate(order[1:], 2):
        scene.start_again("--nproc", str(size), "--stop-at", str(index))
        scene.wait_end(240)
        if scene.process.returncode not in (0, 75):  # type: ignore[union-attr]
            break
    scene.seen["pairs"] = len({*itertools.pairwise(order)})
    alone = scene.folder / "alone"
    done = scene.ask(
        "run",
        str(scene.folder / "job.yaml"),
        "--run-dir",
        str(alone),
        "--nproc",
        "1",
        "--stop-at",
        str(len(order)),
        seconds=600,
    )
    scene.check("the run on one rank got there", done.returncode == 75)
    ids, difference = scene.against(alone)
    scene.check("the same samples in the same order", ids)
    scene.seen["largest_difference"] = difference
    scene.check("losses within 1e-4", difference < 1e-4)


@injection("38", "a tracker that cannot write", Expected(seconds=120), ("FSDP", "ZeRO-3"))
def tracker_down(scene: Scene) -> None:
    scene.copy_stopped()
    shutil.rmtree(scene.run.path / "trackers", ignore_errors=True)
    (scene.run.path / "trackers").write_text("a file where a directory should be")
    scene.start_again("--set", "trackers=[tensorboard]")
    scene.hit()


@injection(
    "S12",
    "`status` of a run that was stopped by SIGTERM",
    Expected(codes=(75,), seconds=30, most_lost=0),
    ONE,
)
def status_names_the_signal(scene: Scene) -> None:
    scene.start()
    scene.wait_step()
    scene.signal(signal.SIGTERM, "launcher")
    scene.wait_end(30)
    said = scene.ask("status", str(scene.run.path)).stdout
    scene.check("`status` names SIGTERM", "SIGTERM" in said and "SIGUSR1" not in said)


@injection("S3", "`status` of a run that trains", Expected((75,), seconds=60, most_lost=0), ONE)
def status_in_training(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 4000}})
    scene.wait_step()
    said = scene.ask("status", str(scene.run.path)).stdout
    scene.seen["status"] = said[:200]
    scene.check(
        "`status` does not say that it loads or evaluates",
        not any(word in said for word in ("loading", "checking", "evaluating")),
    )
    scene.signal(signal.SIGTERM, "launcher")


@injection(
    "21, S12",
    "a learning rate of a million: the loss stays at ln(vocabulary)",
    Expected(codes=None, seconds=120, resumes=False),
    ("FSDP", "ZeRO-3"),
)
def learning_rate_too_high(scene: Scene) -> None:
    scene.start(changes={"training": {"max_steps": 60, "learning_rate": 1e6, "clip_norm": 0}})
    scene.hit()
    scene.wait_end(120)
    words = ("guessing gives", "does not learn", "diverged", "is not finite")
    scene.check("it is said while it runs", any(word in scene.output() for word in words))


@injection("-", "one row, two ranks, batches of eight", Expected(seconds=90, resumes=False), ALL)
def one_row(scene: Scene) -> None:
    data = scene.own_data()
    path = Path(data["train"]["path"])
    path.write_text(path.read_text().splitlines()[0] + "\n")
    scene.start(changes={"data": data, "training": {"max_steps": 6}})
    scene.hit()
