"""One run on this machine to which something happens, and what is to be seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.planner.plan import Plan
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.status import last_step
from tests.benchmarks.faults.material import LAUNCHER, NUM_STEPS, PATIENCE, TrainingInputs, variables
from tests.benchmarks.faults.processes import Process, find, living, send
from tests.benchmarks.faults.registry import Expected, Injection
from tests.benchmarks.faults.shim import Shim
from tests.slurm.runs import ROOT
from tests.training.runs import causal_data

HIT_AT = 12
INSIDE = Path(__file__).with_name("inside")


class Scene:
    """A run directory, the launcher that works in it, and the notes of what was seen."""

    def __init__(self, injection: Injection, variant: str, material: TrainingInputs, folder: Path) -> None:
        self.injection, self.variant, self.material, self.folder = injection, variant, material, folder
        self.expected: Expected = injection.expected
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.run = RunDirectory(folder / "run")
        self.checks: dict[str, bool] = {}
        self.seen: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.output_file = folder / "output.txt"
        self.hit_at: float | None = None
        self.hit_step = 0
        self.shim = Shim(folder)
        self._pids: set[int] = set()
        self._began = self._noted_at = 0.0
        self._mounts: list[Path] = []

    # What an injection does.

    def start(
        self,
        *options: str,
        changes: dict[str, Any] | None = None,
        inside: str = "",
        shim: bool = False,
        **how: Any,
    ) -> None:
        """`launcher run` in a process of its own. `how` goes to `launch`."""
        job = self.material.job(self.folder / "job.yaml", self.variant, changes or {})
        self.launch(
            "run", str(job), "--run-dir", str(self.run.path), *options, inside=inside, shim=shim, **how
        )

    def start_again(self, *options: str, **how: Any) -> None:
        """`launcher resume`."""
        self.launch("resume", str(self.run.path), *options, **how)

    def launch(
        self,
        *arguments: str,
        inside: str = "",
        shim: bool = False,
        attempt: int = 1,
        output: Any = None,
        more: dict[str, str] | None = None,
        limits: int = 0,
        address_space: int = 0,
    ) -> None:
        """A command of ours, its output in a file. `inside`: what inside/sitecustomize.py is to do, in which
        attempt.

        `shim`: under shim.c; `output`: a descriptor in place of the file; `more`: further variables;
        `limits`: file descriptors; `address_space`: bytes.
        """
        environment = variables(**(more or {}))
        if inside:
            environment["PYTHONPATH"] = f"{INSIDE}{os.pathsep}{ROOT}"
            environment |= {
                "INSIDE": inside,
                "INSIDE_SAID": str(self.folder / "said"),
                "LAUNCHER_WARM": "0",
                "INSIDE_ATTEMPT": f"{attempt:04d}",
            }
        if shim:
            environment |= self.shim.variables
        self._began = time.time()
        with self.output_file.open("ab") as file:
            target = file if output is None else output
            limit = (
                ["prlimit", f"--nofile={limits}"]
                if limits
                else ["prlimit", f"--as={address_space}"]
                if address_space
                else []
            )
            self.process = subprocess.Popen(
                [*limit, *LAUNCHER, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                start_new_session=True,
            )

    def copy_stopped(self) -> None:
        """Make the run a copy of one that was stopped after step 20."""
        shutil.copytree(self.material.stopped(self.variant).path, self.run.path)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        """Raises TimeoutError; RuntimeError where the launcher has ended before."""
        until = time.monotonic() + seconds * PATIENCE[0]
        while not condition():
            self._note_processes(seldom=True)
            if self.process and self.process.poll() is not None and not condition():
                raise RuntimeError(f"the launcher ended before {what}: {self.output()[-1500:]}")
            if time.monotonic() > until:
                raise TimeoutError(f"not {what} within {seconds:g} s: {self.output()[-1500:]}")
            time.sleep(0.01)

    def wait_step(self, step: int = HIT_AT) -> None:
        """Until that step is written down; by then the run's processes are known."""
        self.wait(lambda: last_step(self.run) >= step, f"step {step}")
        self._note_processes()

    def wait_said(self) -> None:
        """Until what was to break inside has broken."""
        said = self.folder / "said"
        self.wait(said.exists, "the fault inside")
        time.sleep(0.05)
        self.hit(float(said.read_text().split()[0]))

    def processes(self, *roles: str, rank: int | None = None) -> list[Process]:
        """Those of the run, now."""
        found = [process for process in find(self.run) if not roles or process.role in roles]
        return [process for process in found if rank is None or process.rank == rank]

    def signal(self, number: signal.Signals, *roles: str, rank: int | None = None) -> None:
        """To the processes of these roles; the time of it is the time of the fault."""
        targets = self.processes(*roles, rank=rank)
        assert targets, f"there is no {roles} to send {number.name} to"
        self._note_processes()
        self.hit()
        send(targets, number)

    def hit(self, at: float | None = None) -> None:
        """Now, or then, the fault happened."""
        self.hit_at, self.hit_step = at or time.time(), last_step(self.run)

    def check(self, what: str, holds: object) -> None:
        """Note something that must be so."""
        self.checks[what] = bool(holds)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [record for record in read(self.run.events_file) if record.get("event") == name]

    def output(self) -> str:
        """What the launcher has printed so far."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def ask(
        self, *arguments: str, seconds: float = 60.0, shim: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Another command of ours beside it; code 124 where it does not end in time."""
        environment = variables(**(self.shim.variables if shim else {}))
        try:
            return subprocess.run(
                [*LAUNCHER, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds * PATIENCE[0],
                cwd=self.folder,
            )
        except subprocess.TimeoutExpired as error:
            said = [
                text.decode(errors="replace") if isinstance(text, bytes) else text or ""
                for text in (error.stdout, error.stderr)
            ]
            return subprocess.CompletedProcess(arguments, 124, *said)

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A few lines of Python in a process of their own."""
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=variables(),
            capture_output=True,
            text=True,
            timeout=600,
        )

    def own_data(self) -> dict[str, Any]:
        """A copy of the data that may be changed."""
        return causal_data(self.folder / "data", packing=False)

    @contextlib.contextmanager
    def terminal(self) -> Iterator[None]:
        """`launcher run` on a terminal of its own, which is closed at the end of the block."""
        ours, theirs = pty.openpty()
        self.start(output=theirs)
        os.close(theirs)
        over = threading.Event()

        def read_all() -> None:
            # Never in a read that waits: it would hold the terminal open beyond its close.
            with contextlib.suppress(OSError), self.output_file.open("ab", buffering=0) as file:
                while not over.is_set():
                    if select.select([ours], [], [], 0.05)[0]:
                        file.write(os.read(ours, 65536))

        reader = threading.Thread(target=read_all, daemon=True)
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()
            self.hit()
            os.close(ours)

    def mount(self, megabytes: float) -> None:
        """The folder of the run becomes a file system of its own, which can be filled."""
        self.run = RunDirectory(self.mount_at(self.folder / "disk", megabytes) / "run")

    def mount_at(self, place: Path, megabytes: float) -> Path:
        """A file system of that size, in memory."""
        place.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(place)], check=True
        )
        self._mounts.append(place)
        return place

    def note(self) -> set[int]:
        """The run's processes as they are now, for `give_up` when they can no longer be found by their path."""
        self._note_processes()
        return set(self._pids)

    def give_up(self, pids: Iterable[int] = ()) -> None:
        """End what did not end by itself."""
        if self.running():
            self.seen["ended_by_hand"] = True
        self._note_processes()
        self._pids |= set(pids)
        self._kill_all()

    @contextlib.contextmanager
    def stopwatch(self, name: str) -> Iterator[None]:
        """Note how many seconds something takes."""
        began = time.monotonic()
        yield
        self.seen[name] = round(time.monotonic() - began, 2)

    def running(self) -> bool:
        """Whether the launcher still runs."""
        return self.process is not None and self.process.poll() is None

    def wait_end(self, seconds: float) -> None:
        """Until the launcher has ended, or for so long."""
        until = time.monotonic() + seconds * PATIENCE[0]
        while self.running() and time.monotonic() < until:
            time.sleep(0.05)

    def wait_gone(self, seconds: float = 20.0) -> None:
        """Until none of the run's processes is left."""
        until = time.monotonic() + seconds
        while find(self.run) and time.monotonic() < until:
            time.sleep(0.05)

    def wait_named(self, *words: str, seconds: float) -> None:
        """Until all words stand on one line of the screen. Where they do not in that time, the run is ended:
        nobody else will."""
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until and not self._named(words):
            time.sleep(0.2)
        named = self._named(words)
        self.seen["named_after"] = round(time.time() - (self.hit_at or 0), 1) if named else None
        self.check(f"named within {seconds:g} s ({', '.join(words)})", named)
        if not named and self.running():
            self.seen["ended_by_hand"] = True
            self._note_processes()
            self._kill_all()

    def _named(self, words: tuple[str, ...]) -> bool:
        return any(all(word.lower() in line.lower() for word in words) for line in self.output().splitlines())

    @contextlib.contextmanager
    def memory_group(self) -> Iterator[MemoryGroup]:
        """A control group of our own for memory, gone afterwards."""
        group = MemoryGroup(Path("/sys/fs/cgroup/memory") / f"launcher-faults-{os.getpid()}")
        group.path.mkdir()
        try:
            yield group
        finally:
            self.wait_gone(5)
            with contextlib.suppress(OSError):
                group.path.rmdir()

    # What is looked at afterwards.

    def end(self, seconds: float) -> None:
        """Wait for the launcher and all that it started, and note how it went; what is still there then is
        killed."""
        assert self.process is not None
        self.hit_at = self.hit_at or self._began
        until = time.monotonic() + seconds * PATIENCE[0]
        while self.process.poll() is None and time.monotonic() < until:
            self._note_processes(seldom=True)
            time.sleep(0.05)
        ended = self.process.poll() is not None
        self.seen["code"] = self.process.returncode
        self.seen["seconds_to_end"] = round(time.time() - self.hit_at, 1) if ended else None
        gone = time.monotonic() + 5
        while (left := living(self._pids)) and time.monotonic() < gone:
            time.sleep(0.05)
        self.seen["seconds_until_gone"] = round(time.time() - self.hit_at, 1) if ended and not left else None
        self.seen["left_over"] = len(left) if ended else 0
        self._kill_all()
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        self.seen["line"] = lines[-1][:600] if lines else ""
        self.seen["failure_class"] = self._failure_class()
        self.seen["output"] = lines[-40:]

    def _failure_class(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(
                json.loads((self.run.attempt(self.run.last_attempt()) / "failure.json").read_text())[
                    "failure_class"
                ]
            )
        return ""

    def resume(self) -> None:
        """Go on to the end, where it is not there yet."""
        if not self.run.finished:
            longer = Plan.read(self.run.plan_file).length.value > NUM_STEPS
            stop = ["--stop-at", str(max(NUM_STEPS, last_step(self.run) + 1))] if longer else []
            done = self.ask("resume", str(self.run.path), *stop, seconds=240)
            self.check("it can be resumed to its end", done.returncode == (75 if longer else 0))
            if done.returncode:
                self.seen["resume_said"] = done.stderr[-600:]

    def compare(self) -> None:
        """Hold the run against the one that was left alone."""
        mine, other = _steps(self.run), _steps(self.material.undisturbed(self.variant))
        last = {record["step"]: record for record in mine}
        wanted = {record["step"]: record for record in other}
        self.seen["samples_lost"] = sum(
            record["num_samples"] for step, record in wanted.items() if step not in last
        )
        common = [(record, wanted[record["step"]]) for record in mine if record["step"] in wanted]
        different = {
            one["step"]: one["num_samples"] for one, two in common if one["sample_ids"] != two["sample_ids"]
        }
        self.seen["samples_repeated"] = sum(different.values())
        self.seen["steps_again"] = len(mine) - len(last)
        if first := next(
            (record["step"] for record in self.events("resumed") if record["time"] > (self.hit_at or 0)), None
        ):
            self.seen["steps_lost"] = max(0, self.hit_step - first)
        self.seen["ids_equal"] = not different and set(last) >= set(wanted)
        self.seen["bits_equal"] = all(
            (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"]) for one, two in common
        )

    def largest_difference(self) -> float:
        """Of the losses of both runs, relative."""
        return self.against(self.material.undisturbed(self.variant).path)[1]

    def against(self, other: Path) -> tuple[bool, float]:
        """Whether both runs did the same steps with the same samples, and the largest relative difference of
        their losses."""
        mine, theirs = (
            {record["step"]: record for record in _steps(run)} for run in (self.run, RunDirectory(other))
        )
        ids = all(
            mine[step]["sample_ids"] == theirs[step]["sample_ids"] for step in mine.keys() & theirs.keys()
        )
        common = mine.keys() & theirs.keys()
        differences = [
            abs(mine[step]["loss"] - theirs[step]["loss"]) / theirs[step]["loss"] for step in common
        ]
        return ids and mine.keys() == theirs.keys(), max(differences, default=0.0)

    def close(self) -> None:
        """Leave nothing: no process, no mount, no order to the shim."""
        self.shim.order()
        self._note_processes()
        self._kill_all()
        for place in self._mounts:
            subprocess.run(["umount", "--lazy", str(place)], check=False)

    def _note_processes(self, seldom: bool = False) -> None:
        if seldom and time.monotonic() - self._noted_at < 0.5:
            return
        self._noted_at = time.monotonic()
        self._pids |= {process.pid for process in find(self.run) if process.pid != os.getpid()}

    def _kill_all(self) -> None:
        for pid in living(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()
        self._pids.clear()


@dataclass(frozen=True)
class MemoryGroup:
    """A control group (version 1) that limits memory."""

    path: Path

    @staticmethod
    def missing() -> str | None:
        """Why there can be none here; None where there can."""
        return (
            None
            if os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK) and os.geteuid() == 0
            else "no memory control groups (v1) here"
        )

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, num_bytes: int) -> None:
        """To no more than it has now and so much: the next page costs it its life."""
        used = int((self.path / "memory.usage_in_bytes").read_text())
        (self.path / "memory.limit_in_bytes").write_text(str(used + num_bytes))


def _steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [record for record in read(run.metrics_file) if record.get("kind") == "train"]


def later(seconds: float, do: Callable[[], object]) -> threading.Timer:
    """Do it after so long, in a thread."""
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()
    return timer
