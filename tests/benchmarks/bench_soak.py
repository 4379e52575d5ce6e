"""A run of a real Slurm cluster that is hit at random again and again, and is compared with one that was left
alone.

    python -m tests.benchmarks.bench_soak /tmp/soak --injections 200 [--seed 1] [--write]

It goes in pieces: a cluster of three nodes, one run on two of them with two ranks each, and what chance does
to it until it is finished. Kills (a rank, all ranks of a node, agent, launcher, srun, slurmd), stops
(SIGSTOP, and SIGCONT seconds later), freezes of all processes of a node, hangs (SIGSTOP for good, where
`cluster.hang_after` ends them), full disks, signals, requeues, and nodes that lose their power or their
network. Each piece has a seed of its own, made of the soak's and its number. What came of it is in
FOLDER/state.json, and what is in there is not done again: the same command goes on. A piece that was broken
off begins anew. Several soaks, each with a folder and a seed of its own, can go side by side: most of the time
is spent waiting for Slurm. --write adds a soak to those that were written before.

The run directory is a file system of its own in memory (`mount` needs root), so that a disk can be filled.
After each injection that ended an attempt, the checkpoint that the next one chose is read and hashed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.job.schema import Cluster as ClusterKeys
from launcher.runs.checkpoints import verify
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import ATTEMPT_PREFIX
from launcher.runs.status import last_step
from tests.benchmarks import _report
from tests.benchmarks.faults import soak_page
from tests.benchmarks.faults.effective import Timeline
from tests.benchmarks.faults.processes import Process, find, send
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Run, TrainingInputs
from tests.training.runs import assert_equal, state

_TITLE = "Hit at random under Slurm, and compared"
NUM_STEPS = 60
EVERY = 4
MOST_PER_PIECE = 25
SECONDS_STUCK = 300.0
SECONDS_HELD = 60.0
HANG_AFTER = "hang_after" in ClusterKeys.model_fields
WEIGHTS = {
    "kill rank": 24,
    "kill node's ranks": 8,
    "kill agent": 10,
    "kill launcher": 10,
    "kill srun": 3,
    "kill slurmd": 2,
    "stop": 14,
    "freeze": 6,
    "full disk": 12,
    "signal": 4,
    "requeue": 2,
    "power": 3,
    "network": 2,
    "hang": 5 if HANG_AFTER else 0,
}


class Piece:
    """One run under one cluster, and what is done to it."""

    def __init__(self, folder: Path, material: TrainingInputs, seed: int, number: int) -> None:
        self.folder, self.material, self.number = folder, material, number
        self.random = random.Random(f"{seed}:{number}")
        self.disk = folder / f"disk-{number}"
        self.injections: list[dict[str, Any]] = []
        self.chosen: list[str] = []
        self.released = 0

    def play(self) -> dict[str, Any]:
        """Until the run is finished; what was done and what came of it."""
        began = time.time()
        with self._mounted(), Cluster(self.folder / f"c{self.number}", slurmd_timeout=6) as cluster:
            job = self.material.job(f"soak-{self.number}", _changes(), **_cluster_keys())
            run = self.material.submit(cluster, job, "--run-dir", self.disk / f"soak-{self.number}")
            try:
                self._until_finished(cluster, run)
                return self._result(run.directory, time.time() - began)
            except BaseException:
                kept = self.folder / f"kept-{self.number}"
                shutil.copytree(
                    run.directory.path, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("code")
                )
                (kept / "story.txt").write_text(run.story(), encoding="utf-8")
                for log in cluster.directory.rglob("*.log"):
                    shutil.copy(log, kept / log.name)
                for things in ("job", "nodes"):
                    with contextlib.suppress(RuntimeError):
                        (kept / f"{things}.txt").write_text(cluster.run("scontrol", "show", things))
                raise

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        self.disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
            self.disk.rmdir()
            shutil.rmtree(self.folder / f"c{self.number}", ignore_errors=True)

    def _until_finished(self, cluster: Cluster, run: Run) -> None:
        seen, alive = (0, 0), time.monotonic()
        while not run.directory.finished:
            now = last_step(run.directory), len(run.events("started"))
            if now != seen:
                alive = time.monotonic()
            seen = now
            self._check_choice(run.directory)
            if gave_up := run.events("gave_up"):
                raise RuntimeError(f"it gave up: {gave_up[-1]['reason']}")
            if time.monotonic() - alive > SECONDS_HELD * (1 + self.released):
                self._let_go(cluster, run)
            if time.monotonic() - alive > SECONDS_STUCK:
                raise TimeoutError(f"no step and no attempt for {SECONDS_STUCK:g} s")
            if now[1] and len(self.injections) < MOST_PER_PIECE and self._wait_moment(run):
                self._inject(cluster, run)
            time.sleep(0.05)
        self._check_choice(run.directory)

    def _let_go(self, cluster: Cluster, run: Run) -> None:
        """Do what an administrator does with a job that Slurm itself holds, and with the nodes that it drained.

        A slurmd that is restarted while a requeued job ends makes Slurm do so (`Duplicate jobid`).
        """
        with contextlib.suppress(RuntimeError):
            if "held" not in cluster.show(run.job).get("Reason", ""):
                return
            for node, state in cluster.node_states().items():
                if state.startswith("drain"):
                    cluster.resume(node)
            cluster.run("scontrol", "release", run.job)
            self.released += 1
            print(
                f"{time.strftime('%H:%M:%S')} piece {self.number}: Slurm held the job; released", flush=True
            )

    def _wait_moment(self, run: Run) -> bool:
        """Wait for a moment drawn by chance: at start-up, in a save, in steps. False where the run ended
        before it."""
        directory = run.directory
        kind = self.random.choices(("starting", "saving", "training"), (1, 3, 5))[0]
        delay = {
            "starting": self.random.uniform(0, 6),
            "saving": self.random.uniform(0, 0.03),
            "training": self.random.uniform(0, 5),
        }[kind]
        first, until = last_step(directory), time.monotonic() + 60
        before = set(directory.checkpoints.glob(f"{ATTEMPT_PREFIX}*"))
        while time.monotonic() < until and not directory.finished:
            saving = set(directory.checkpoints.glob(f"{ATTEMPT_PREFIX}*")) - before
            if (
                kind == "starting"
                or (kind == "training" and last_step(directory) != first)
                or (kind == "saving" and saving)
            ):
                break
            time.sleep(0.002)
        time.sleep(delay)
        return not directory.finished and any(process.role == "rank" for process in find(directory))

    def _inject(self, cluster: Cluster, run: Run) -> None:
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        entry = {
            "kind": kind,
            "time": time.time(),
            "step": last_step(run.directory),
            "attempt": run.directory.last_attempt(),
        }
        processes = [process for process in find(run.directory) if process.role != "helper"]
        if not processes:
            return
        print(
            f"{time.strftime('%H:%M:%S')} piece {self.number}, {len(self.injections) + 1}: {kind} "
            f"after step {entry['step']}",
            flush=True,
        )
        self._check_choice(run.directory)
        self._do(kind, cluster, run, processes)
        self.injections.append(entry)

    def _do(self, kind: str, cluster: Cluster, run: Run, processes: list[Process]) -> None:
        """Do it."""
        ranks = [process for process in processes if process.role == "rank"] or processes
        one = self.random.choice(ranks)
        node = self.random.choice(sorted({process.namespace for process in processes}))
        on_node = [process for process in processes if process.namespace == node]
        name = self.random.choice(sorted(cluster.nodes)[:2])
        if kind in ("kill rank", "hang"):
            send([one], signal.SIGKILL if kind == "kill rank" else signal.SIGSTOP)
        elif kind == "kill node's ranks":
            send([process for process in on_node if process.role == "rank"], signal.SIGKILL)
        elif kind in ("kill agent", "kill launcher", "kill srun"):
            those = [process for process in processes if process.role == kind.split()[1]] or [one]
            send([self.random.choice(those)], signal.SIGKILL)
        elif kind in ("stop", "freeze"):
            self._hold([self.random.choice(processes)] if kind == "stop" else on_node)
        elif kind == "full disk":
            self._fill()
        elif kind in ("signal", "requeue"):
            command = (
                ["scancel", f"--signal={self.random.choice(['USR1', 'TERM'])}"]
                if kind == "signal"
                else ["scontrol", "requeue"]
            )
            with contextlib.suppress(RuntimeError):  # it may have ended just now
                cluster.run(*command, run.job)
        else:
            self._machine(kind, cluster, name)

    def _hold(self, processes: list[Process]) -> None:
        send(processes, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.3, 5))
        send(processes, signal.SIGCONT)

    def _fill(self) -> None:
        """The disk has not one byte left, for some seconds."""
        filler, began = self.disk / "filler", time.monotonic()
        seconds = self.random.uniform(0.5, 4)
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        while time.monotonic() - began < seconds:
            with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.05)
        filler.unlink()

    def _machine(self, kind: str, cluster: Cluster, node: str) -> None:
        if kind == "power":
            cluster.power_off(node)
            time.sleep(self.random.uniform(1, 12))
            cluster.power_on(node)
        elif kind == "network":
            cluster.cut(node)
            time.sleep(self.random.uniform(1, 12))
            cluster.reconnect(node)
        else:
            cluster.kill_slurmd(node)
            time.sleep(self.random.uniform(0, 2))
            cluster.start_slurmd(node)

    def _check_choice(self, run: RunDirectory) -> None:
        """Read and hash every checkpoint that was ever chosen, once.

        A run whose disk is full removes older ones, also the one that it began with.
        """
        for record in read(run.events_file):
            if record["event"] == "resumed" and (name := record["checkpoint"]) not in self.chosen:
                problems = verify(run.checkpoints / name, run.run_id())
                if problems and not self._was_removed(run, name, record["time"]):
                    raise AssertionError(f"{name} was chosen and is not whole: {problems}")
                if not problems:
                    self.chosen.append(name)

    def _was_removed(self, run: RunDirectory, name: str, since: float) -> bool:
        """Return whether the run itself removed a checkpoint later: events say so once it is gone."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            records = [record for record in read(run.events_file) if record["event"] == "made_room"]
            removed = {step for record in records if record["time"] >= since for step in record["removed"]}
            if name in {run.checkpoint(step).name for step in removed}:
                return True
            time.sleep(0.2)
        return False

    def _result(self, run: RunDirectory, seconds: float) -> dict[str, Any]:
        undisturbed = RunDirectory(self.material.folder / "runs" / "undisturbed")
        differences = compare(run, undisturbed)
        names = Counter(record["event"] for record in read(run.events_file))
        return {
            "piece": self.number,
            "injections": self.injections,
            "attempts": names["started"],
            "failures": names["started"] - 1,
            "saves_failed": names["save_failed"],
            "checkpoints_chosen": len(self.chosen),
            "released": self.released,
            "differences": differences,
            "seconds": round(seconds, 1),
            "timeline": vars(Timeline.of(run, self.injections)),
        }


def compare(run: RunDirectory, undisturbed: RunDirectory) -> list[str]:
    """What differs from the run that was left alone: samples, loss and gradient norm of each step ever done,
    and the weights at the end."""
    kept = ("sample_ids", "loss", "grad_norm")
    wanted = {record["step"]: [record[key] for key in kept] for record in _training(undisturbed)}
    found = [(record["step"], [record[key] for key in kept]) for record in _training(run)]
    differences = [
        f"step {step}: {values} and not {wanted[step]}" for step, values in found if values != wanted[step]
    ]
    differences += [f"step {step} is missing" for step in sorted(set(wanted) - {step for step, _ in found})]
    with contextlib.ExitStack() as stack:
        try:
            assert_equal(state(run), state(undisturbed))
        except AssertionError as error:
            stack.callback(
                differences.append, f"weights: {str(error).splitlines()[0] if str(error) else 'not equal'}"
            )
    return differences


def _training(run: RunDirectory) -> list[dict[str, Any]]:
    return [record for record in read(run.metrics_file) if record.get("kind") == "train"]


def _changes() -> dict[str, Any]:
    return {"training": {"max_steps": NUM_STEPS}, "checkpoint": {"every": EVERY, "keep_last": 100}}


def _cluster_keys() -> dict[str, Any]:
    return {"attempts_without_progress": 1000, **({"hang_after": "10s"} if HANG_AFTER else {})}


def undisturbed(folder: Path) -> TrainingInputs:
    """Model, data and the run that is left alone, made once."""
    made = folder / "material"
    if (made / "runs" / "undisturbed" / "FINISHED").exists():
        material = TrainingInputs.__new__(TrainingInputs)
        material.folder, material.model, material.data = (
            made,
            made / "model",
            json.loads((made / "data.json").read_text()),
        )
        return material
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    material = TrainingInputs(made)
    (made / "data.json").write_text(json.dumps(material.data))
    material.launcher("run", material.job("undisturbed", _changes(), nodes=1, ranks_per_node=4))
    return material


def soak(folder: Path, seed: int, wanted: int) -> dict[str, Any]:
    """Pieces until there are `wanted` injections."""
    file = folder / "state.json"
    done: dict[str, Any] = (
        json.loads(file.read_text()) if file.exists() else {"seed": seed, "pieces": [], "broken": []}
    )
    material = undisturbed(folder)
    while num_injections(done) < wanted:
        number = len(done["pieces"]) + len(done["broken"]) + 1
        piece = Piece(folder, material, done["seed"], number)
        try:
            result = piece.play()
            print(
                json.dumps(
                    {key: value for key, value in result.items() if key not in ("injections", "timeline")}
                ),
                flush=True,
            )
            done["pieces"].append({**result, "conditions": _report.conditions("torch")})
        except Exception as error:
            traceback.print_exc()
            done["broken"].append(
                {
                    "piece": number,
                    "why": f"{type(error).__name__}: {error}"[:2000],
                    "injections": piece.injections,
                }
            )
        new = file.with_suffix(".new")
        new.write_text(json.dumps(done, indent=1))
        new.replace(file)
    return done


def num_injections(done: dict[str, Any]) -> int:
    return sum(len(piece["injections"]) for piece in [*done["pieces"], *done["broken"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="state, model and data; with a short path, as sockets lie below it"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--injections", type=int, default=200)
    parser.add_argument(
        "--write", action="store_true", help="put what came of it into docs/benchmarks/faults.md"
    )
    options = parser.parse_args()
    os.environ.setdefault("XDG_CACHE_HOME", str(options.folder / "cache"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that mounts and machines go
    done = soak(options.folder, options.seed, options.injections)
    new = {str(done["seed"]): soak_page.figures(done, EVERY)}
    if options.write:
        soaks = (
            json.loads((_report.DOCUMENTS / "faults.json").read_text(encoding="utf-8")).get(_TITLE, {}) | new
        )
        _report.write("faults", _TITLE, soak_page.report(soaks, NUM_STEPS, EVERY), soaks)
    print(soak_page.report(new, NUM_STEPS, EVERY))


if __name__ == "__main__":
    main()
