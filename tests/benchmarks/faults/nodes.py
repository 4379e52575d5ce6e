"""Rows 3, 6, 8, 31, 37, 39 and 40: a real Slurm cluster on this machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.runs.layout import RunDirectory
from launcher.runs.status import last_step
from tests.benchmarks.bench_soak import num_injections
from tests.benchmarks.faults.material import PATIENCE
from tests.benchmarks.faults.processes import find, send
from tests.benchmarks.faults.registry import VARIANTS, Expected, injection
from tests.benchmarks.faults.scene import INSIDE, Scene
from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import FAULTS, Run, TrainingInputs, losses, samples

WAYS = ("FSDP", "ZeRO-2", "ZeRO-3, plain saving")
UNDER_SLURM = Expected(codes=None, seconds=300, resumes=False)
SOAK = Path(tempfile.gettempdir()) / "soak"


class PatientRun(Run):
    """A run on a machine that others use too."""

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
        super().wait(condition, what, seconds * PATIENCE[0])


class Stage:
    """A cluster, and a job of 24 steps on two nodes with two ranks each."""

    def __init__(self, scene: Scene, cluster: Cluster) -> None:
        self.scene, self.cluster = scene, cluster
        folder = scene.material.folder / "nodes"
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            TrainingInputs(folder)
            (folder / "made").touch()
        self.material = TrainingInputs.__new__(TrainingInputs)
        self.material.folder, self.material.model = folder, folder / "model"
        data = folder / "data"
        train, held_out = ({"path": str(data / f"{name}.jsonl")} for name in ("train", "evaluation"))
        self.material.data = {
            "train": train,
            "evaluation": held_out,
            "text": "text",
            "max_length": 64,
            "packing": True,
            "num_workers": 1,
        }

    def submit(self, **cluster: Any) -> Run:
        """Hand the job over; the run is the scene's."""
        name = f"{self.scene.injection.name}-{list(VARIANTS).index(self.scene.variant)}"
        shutil.rmtree(self.material.folder / "runs" / name, ignore_errors=True)
        job = self.material.job(name, dict(VARIANTS[self.scene.variant]), **cluster)
        run = self.material.submit(self.cluster, job)
        self.scene.run = run.directory
        return PatientRun(run.directory, run.job, self.cluster)

    def hit(self, run: Run) -> None:
        self.scene.hit()
        self.step_at_hit = last_step(run.directory)

    def compare(self, run: Run) -> None:
        """Against the same job on one machine, not under Slurm."""
        other = self._undisturbed()
        self.scene.check("the same samples in the same order", samples(run.directory) == samples(other))
        self.scene.check("losses equal to the bit", losses(run.directory) == losses(other))
        self.scene.seen["ids_equal"] = samples(run.directory) == samples(other)
        self.scene.seen["bits_equal"] = losses(run.directory) == losses(other)
        self.scene.seen["samples_lost"] = 0 if set(samples(run.directory)) == set(samples(other)) else None
        self.scene.seen["samples_repeated"] = 0 if self.scene.seen["ids_equal"] else None

    def _undisturbed(self) -> RunDirectory:
        name = f"undisturbed-{list(VARIANTS).index(self.scene.variant)}"
        run = RunDirectory(self.material.folder / "runs" / name)
        if not run.finished:
            job = self.material.job(name, dict(VARIANTS[self.scene.variant]), nodes=1, ranks_per_node=4)
            self.material.launcher("run", job)
        return run

    def requeued(self, run: Run, count: int = 1) -> str:
        """Why it was requeued, and after how long the next attempt began; both noted."""
        reason = str(run.wait_event("requeued", count)["reason"])
        started = run.wait_event("started", count + 1)
        self.scene.seen["line"] = f"requeued: {reason}"
        self.scene.seen["seconds_to_end"] = round(started["time"] - (self.scene.hit_at or 0), 1)
        return reason


@contextlib.contextmanager
def stage(scene: Scene, **options: Any) -> Iterator[Stage]:
    """A cluster of three nodes for one injection; a short path, as sockets lie in it."""
    with (
        tempfile.TemporaryDirectory(prefix="faults") as folder,
        Cluster(Path(folder) / "c", **options) as cluster,
    ):
        yield Stage(scene, cluster)


@injection("3", "a node loses its power, then the first one its network", UNDER_SLURM, WAYS, missing)
def nodes_lost(scene: Scene) -> None:
    with stage(scene) as on:
        run = on.submit()
        run.wait_step(5)
        on.hit(run)
        on.cluster.power_off("n2")
        scene.check("the lost node is named", "n2" in on.requeued(run))
        run.wait_step(11)
        on.cluster.power_on("n2")
        on.cluster.wait_nodes("idle", "n2", timeout=30)
        on.cluster.cut("n1")
        run.wait_event("started", 3)
        scene.check("it goes on without it", "n1" not in run.events("started")[2]["nodes"])
        run.wait_finished()
        on.compare(run)


@injection("3", "a node lost, fewer nodes allowed", UNDER_SLURM, ("FSDP",), missing)
def fewer_nodes(scene: Scene) -> None:
    with stage(scene) as on:
        run = on.submit(nodes="2-3")
        run.wait_step(5)
        on.hit(run)
        on.cluster.power_off("n3")
        on.requeued(run)
        scene.check("on two nodes", len(run.events("started")[1]["nodes"]) == 2)
        run.wait_finished()
        other = on._undisturbed()
        scene.check("the same samples in the same order", samples(run.directory) == samples(other))
        theirs = losses(other)
        largest = max(abs(loss - theirs[step]) / theirs[step] for step, loss in losses(run.directory).items())
        scene.seen["largest_difference"] = largest
        scene.check("losses within 1e-3", largest < 1e-3)


@injection("1", "a rank killed -9 under Slurm", UNDER_SLURM, WAYS, missing)
def rank_killed_under_slurm(scene: Scene) -> None:
    with stage(scene) as on:
        run = on.submit()
        run.wait_step(6)
        on.hit(run)
        send([process for process in find(run.directory) if process.rank == 3], signal.SIGKILL)
        scene.check("it is restarted in the job, and the signal named", "SIGKILL" in on.requeued(run))
        run.wait_finished()
        on.compare(run)


@injection("6", "SIGUSR1, and then the time limit", UNDER_SLURM, WAYS, missing)
def time_limit(scene: Scene) -> None:
    slow = {"FAULT": "slow-first:all:5", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    with stage(scene) as on:
        run = on.submit(time_limit="10min", environment=slow)
        run.wait_step(2)
        on.hit(run)
        run.end_in_seconds(20)
        scene.check("the time limit is named", on.requeued(run) == "time limit")
        scene.check("all was saved before it", run.events("stopped"))
        on.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
        run.wait_finished()
        on.compare(run)


@injection("8", "preempted twice before the first step", UNDER_SLURM, ("FSDP", "ZeRO-3"), missing)
def preempted_twice(scene: Scene) -> None:
    with stage(scene) as on:
        run = on.submit(partition="low", attempts_without_progress=1)
        for count in (1, 2):
            run.wait_event("started", count)
            on.hit(run)
            on.cluster.submit("sleep 1", "--partition=high", "--nodes=3", "--exclusive")
            on.requeued(run, count)
        scene.check("it counts for nothing", not run.events("gave_up"))
        run.wait_finished()
        on.compare(run)


@injection("4", "requeued and preempted in its steps", UNDER_SLURM, WAYS, missing)
def requeued_and_preempted(scene: Scene) -> None:
    with stage(scene) as on:
        run = on.submit(partition="low")
        run.wait_step(6)
        on.hit(run)
        on.cluster.run("scontrol", "requeue", run.job)
        on.requeued(run)
        run.wait_event("resumed", 1)
        run.wait_step(13)
        on.cluster.submit("sleep 1", "--partition=high", "--nodes=3", "--exclusive")
        scene.check("preemption is named", on.requeued(run, 2) == "preempted")
        run.wait_finished()
        on.compare(run)


@injection(
    "31",
    "the controller down while it is submitted, while it runs; then a node's slurmd",
    UNDER_SLURM,
    ("FSDP",),
    missing,
)
def controller_down(scene: Scene) -> None:
    with stage(scene, nodes=2) as on:
        on.cluster.stop_controller()
        back = threading.Timer(4, on.cluster.start_controller)
        back.start()
        run = on.submit()
        back.join()
        scene.check(
            "one job, never two", len(on.cluster.run("squeue", "--noheader", "--format=%i").split()) == 1
        )
        run.wait_step(5)
        on.hit(run)
        on.cluster.restart_controller()
        run.wait_step(9)
        on.cluster.kill_slurmd("n2")
        time.sleep(1)
        on.cluster.start_slurmd("n2")
        run.wait_finished()
        scene.check("one attempt", len(run.events("started")) == 1)
        on.compare(run)


@injection(
    "37", "a GPU error (its text: uncorrectable ECC) on a node", UNDER_SLURM, ("FSDP", "ZeRO-3"), missing
)
def gpu_error(scene: Scene) -> None:
    """There is no GPU: a rank raises what CUDA would."""
    broken = {
        "INSIDE": "ecc@exchange:n1:6",
        "INSIDE_SAID": str(scene.folder / "said"),
        "PYTHONPATH": str(INSIDE),
        "LAUNCHER_WARM": "0",
    }
    with stage(scene) as on:
        run = on.submit(environment=broken)
        run.wait_step(5)
        on.hit(run)
        on.requeued(run)
        scene.check("the node is left out", run.events("requeued")[0]["excluded"] == ["n1"])
        run.wait_finished()
        scene.check("it goes on on the others", run.events("started")[-1]["nodes"] == ["n2", "n3"])
        on.compare(run)


@injection("39", "no progress in three attempts", UNDER_SLURM, ("FSDP", "ZeRO-3"), missing)
def crash_loop(scene: Scene) -> None:
    faulty = {"FAULT": "kill:3:6", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    with stage(scene) as on:
        run = on.submit(environment=faulty, attempts_without_progress=3)
        run.wait_step(4)
        on.hit(run)
        reason = str(run.wait_event("gave_up", seconds=300)["reason"])
        scene.seen["line"] = f"gave up: {reason}"
        scene.check(
            "it stops after three, with a diagnosis",
            "no progress in 3 attempts" in reason and "SIGKILL" in reason,
        )


def _no_soak() -> str | None:
    return (
        None
        if (SOAK / "state.json").exists()
        else f"bench_soak has left nothing in {SOAK.name} of the directory for temporary files"
    )


@injection("40", "random soak under Slurm (bench_soak.py)", UNDER_SLURM, ("FSDP",), _no_soak)
def soak(scene: Scene) -> None:
    """What is there of the soak; it runs by itself."""
    done = json.loads((SOAK / "state.json").read_text())
    scene.hit()
    scene.seen["injections"] = num_injections(done)
    different = [piece["piece"] for piece in done["pieces"] if piece["differences"]]
    scene.check("every run got to its end", not done["broken"])
    scene.check("no run differs from the undisturbed one", not different)
    scene.check("at least 200 injections", scene.seen["injections"] >= 200)
    scene.seen["line"] = f"{scene.seen['injections']} injections in {len(done['pieces'])} runs"
