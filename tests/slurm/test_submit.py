"""A run under Slurm is the run that `launcher run` makes; and whatever Slurm does to it meanwhile, it ends as
that one does."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import NewCluster
from tests.slurm.runs import FAULTS, Run, TrainingInputs, losses, samples
from tests.training.runs import assert_equal, state

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return TrainingInputs(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def undisturbed(material: TrainingInputs) -> RunDirectory:
    """The same job on one machine with as many ranks, not under Slurm."""
    job = material.job("undisturbed", nodes=1, ranks_per_node=4)
    material.launcher("run", job)
    return RunDirectory(material.folder / "runs" / "undisturbed")


def check_equal(run: RunDirectory, undisturbed: RunDirectory) -> None:
    """Bit-equal in losses and weights, with the same samples in the same order."""
    assert samples(run) == samples(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert_equal(state(run), state(undisturbed))


def check_close(run: RunDirectory, undisturbed: RunDirectory) -> None:
    """On another number of ranks: the same samples, the same losses within rounding."""
    assert samples(run) == samples(undisturbed)
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-3)


def test_two_nodes_give_what_one_machine_gives(
    cluster: Cluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    job = material.job("equal")
    before = {path for path in material.folder.rglob("*") if "runs" not in path.parts}
    script = material.launcher("submit", job, "--dry-run", cluster=None).stdout
    run = material.submit(cluster, job)
    submitted = (run.directory.path / "slurm" / "job.json").read_text()
    run.wait_finished()
    check_equal(run.directory, undisturbed)
    assert cluster.wait_state(run.job, "COMPLETED", timeout=30)
    assert len(run.events("started")) == 1
    assert run.events("started")[0]["nodes"] == ["n1", "n2"]
    text = Path(__import__("json").loads(submitted)["script"]).read_text()
    code = next((run.directory.path / "code").iterdir())
    assert text.strip() == script.replace("/code/launcher", f"/code/{code.name}", 1).strip()
    assert {path for path in material.folder.rglob("*") if "runs" not in path.parts} == before
    cluster.run("scontrol", "requeue", run.job)
    cluster.wait_state(run.job, "COMPLETED", timeout=60)
    assert len(run.events("started")) == 1, "a finished run that is requeued began again"


@pytest.mark.parametrize("name", ["USR1", pytest.param("TERM", marks=pytest.mark.very_slow)])
def test_signalled_requeued_and_preempted(
    cluster: Cluster, material: TrainingInputs, undisturbed: RunDirectory, name: str
) -> None:
    """One run through all of it; each costs an attempt, none a step. Preemption sends SIGTERM too."""
    # So slow that it cannot finish before what is done to it arrives.
    slow = {"FAULT": "slow:all:0.8", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    run = material.submit(cluster, material.job(f"chain-{name}", partition="low", environment=slow))
    run.wait_step(5)
    cluster.run("scancel", f"--signal={name}", run.job)
    assert run.wait_event("requeued", 1)["reason"] == "signal"
    run.wait_event("resumed", 1)
    run.wait_step(9)
    cluster.run("scontrol", "requeue", run.job)
    assert "requeue" in run.wait_event("requeued", 2)["reason"]
    run.wait_event("resumed", 2)
    run.wait_step(13)
    cluster.submit("sleep 1", "--partition=high", "--nodes=3", "--exclusive")
    assert run.wait_event("requeued", 3)["reason"] == "preempted"
    assert material.json("status", f"chain-{name}", cluster=cluster)["state"] in (
        "queued",
        "starting",
        "running",
    )
    run.wait_event("resumed", 3)
    run.wait_finished()
    check_equal(run.directory, undisturbed)
    assert len(run.events("started")) == 4


@pytest.mark.very_slow
def test_longer_than_its_time_limit_is_a_chain(
    cluster: Cluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    """Told early enough, the ranks save, and the next attempt goes on."""
    slow = {"FAULT": "slow-first:all:5", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    run = material.submit(cluster, material.job("hourly", time_limit="10min", environment=slow))
    run.wait_step(2)
    run.end_in_seconds(20)  # a limit is given in minutes, and the steps that are left take longer than one
    assert run.wait_event("requeued")["reason"] == "time limit"
    assert run.events("stopped")
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.wait_finished()
    check_equal(run.directory, undisturbed)
    assert len(run.events("requeued")) == 1


@pytest.mark.very_slow
def test_too_little_time_to_save_goes_on_from_what_was_saved(
    cluster: Cluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    """The limit comes in the middle of a step that lasts longer than what is left."""
    slow = {"FAULT": "stuck-first:all:150", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    run = material.submit(
        cluster,
        material.job(
            "abrupt", {"checkpoint": {"every": 1, "keep_last": 100}}, time_limit="10min", environment=slow
        ),
    )
    run.wait_step(1)
    run.end_in_seconds(25)
    assert run.wait_event("requeued")["reason"] == "time limit"
    assert not run.events("stopped")
    # Either the launcher ended the ranks when the time was up, and said so, or Slurm was faster.
    assert all("had not saved and left" in record["failure"]["cause"] for record in run.events("failed"))
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.wait_finished()
    resumed = run.events("resumed")[0]
    saved = [record["step"] for record in run.events("saved") if record["time"] < resumed["time"]]
    assert resumed["step"] == max(saved) and resumed["step"] in (1, 2), (
        "the newest that was whole, in the step that was cut off"
    )
    check_equal(run.directory, undisturbed)


@pytest.mark.very_slow
def test_preempted_twice_before_the_first_step_counts_for_nothing(
    cluster: Cluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    run = material.submit(cluster, material.job("unlucky", partition="low", attempts_without_progress=1))
    for count in (1, 2):
        run.wait_event("started", count)
        cluster.submit("sleep 1", "--partition=high", "--nodes=3", "--exclusive")
        run.wait_event("requeued", count)
        assert not run.events("resumed") and not run.events("gave_up")
    run.wait_finished()
    check_equal(run.directory, undisturbed)


@pytest.mark.very_slow
def test_a_node_loses_its_power_and_another_its_network(
    new_cluster: NewCluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    """First a node that follows, then the one that leads, which goes on living where nobody hears of it."""
    cluster = new_cluster(slurmd_timeout=10)
    run = material.submit(cluster, material.job("lost"))
    run.wait_step(5)
    cluster.power_off("n2")
    run.wait_event("started", 2)
    assert "n2" in run.events("requeued")[0]["reason"]
    assert run.events("started")[1]["nodes"] == ["n1", "n3"]
    run.wait_step(11)
    cluster.power_on("n2")
    cluster.wait_nodes("idle", "n2")
    cluster.cut("n1")
    run.wait_event("started", 3)
    assert run.events("started")[2]["nodes"] == ["n2", "n3"]
    run.wait_finished()
    check_equal(run.directory, undisturbed)


@pytest.mark.very_slow
def test_fewer_nodes_where_the_job_allows_them(
    new_cluster: NewCluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    cluster = new_cluster(slurmd_timeout=10)
    run = material.submit(cluster, material.job("range", nodes="2-3"))
    run.wait_step(5)
    assert run.events("started")[0]["nodes"] == ["n1", "n2", "n3"]
    cluster.power_off("n3")
    cluster.wait_state(run.job, "PENDING", "RUNNING", timeout=60)
    run.wait_event("started", 2)
    assert run.events("started")[1]["nodes"] == ["n1", "n2"] and run.events("started")[1]["world_size"] == 4
    noticed = cluster.show(run.job)
    assert noticed["NumNodes"] == "2"
    run.wait_finished()
    check_close(run.directory, undisturbed)


def test_daemons_die_and_come_back(
    new_cluster: NewCluster, material: TrainingInputs, undisturbed: RunDirectory
) -> None:
    """The controller while the run is submitted, and again while it runs; then a node's slurmd."""
    cluster = new_cluster(nodes=2)
    cluster.stop_controller()
    results: list[Run] = []
    process = threading.Thread(
        target=lambda: results.append(material.submit(cluster, material.job("daemons")))
    )
    process.start()
    time.sleep(4)
    cluster.start_controller()
    process.join()
    run = results[0]
    assert len(cluster.run("squeue", "--noheader", "--format=%i").split()) == 1, "one job, never two"
    run.wait_step(5)
    cluster.restart_controller()
    run.wait_step(9)
    cluster.kill_slurmd("n2")
    time.sleep(1)
    cluster.start_slurmd("n2")
    run.wait_finished()
    check_equal(run.directory, undisturbed)
