"""The test cluster itself: that what other tests rely on is there, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.accounting import ACCOUNT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import NewCluster
from tests.slurm.machines import poll


def until_there_is(path: Path) -> str:
    """A line of a script that ends once the test makes this file."""
    return f"until [ -e {path} ]; do sleep 0.2; done"


def test_nodes_have_their_own_names_and_addresses(cluster: Cluster) -> None:
    lines = cluster.run("srun", "--nodes=2", "bash", "-c", "echo $(hostname) $(hostname -I)").splitlines()
    assert sorted(lines) == [f"n1 {cluster.address('n1')}", f"n2 {cluster.address('n2')}"]


def test_nodes_see_the_files_of_the_host_and_each_other(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen")
    script = f"import launcher, socket; print(open('{tmp_path}/file').read(), socket.gethostbyname('n3'))"
    printed = cluster.run("srun", "--nodelist=n2", sys.executable, "-c", script)
    assert printed.split() == ["seen", cluster.address("n3")]


def test_batch_job_writes_its_output(cluster: Cluster) -> None:
    job = cluster.submit("srun --label hostname; exit 3", "--nodes=3", "--exclusive")
    cluster.wait_state(job, "FAILED")
    assert sorted(cluster.output(job).split()) == ["0:", "1:", "2:", "n1", "n2", "n3"]
    assert cluster.show(job)["ExitCode"] == "3:0"


def test_impossible_requests_are_refused(cluster: Cluster) -> None:
    for options in (
        ["--partition=short", "--time=10"],
        ["--partition=short", "--nodes=3"],
        ["--nodes=4"],
        ["--partition=none"],
    ):
        with pytest.raises(
            RuntimeError, match=r"sbatch: error: (Batch job submission failed|invalid partition)"
        ):
            cluster.submit("true", *options)


def test_power_off_requeues_elsewhere_and_power_on_brings_the_node_back(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, slurmd_timeout=10)
    job = cluster.submit("hostname; [ $SLURM_RESTART_COUNT ] || sleep 100", "--nodes=1", "--nodelist=n1")
    cluster.wait_state(job, "RUNNING")
    poll(lambda: cluster.output(job), 10, "the first output")
    cluster.power_off("n1")
    cluster.wait_nodes("down*", "n1")
    cluster.wait_state(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "NodeList=")
    cluster.wait_state(job, "COMPLETED")
    assert cluster.output(job).split() == ["n1", "n2"]
    cluster.power_on("n1")
    cluster.wait_nodes("idle")


def test_partition_that_heals_leaves_the_job_running(cluster: Cluster) -> None:
    job = cluster.submit("srun --ntasks=1 bash -c 'echo begun; sleep 1000'", "--nodelist=n2")
    poll(lambda: cluster.output(job) == "begun\n", 60, "the step")
    cluster.cut("n2")
    with pytest.raises((RuntimeError, subprocess.TimeoutExpired)):
        cluster.run(
            "srun", "--nodelist=n2", "--overlap", f"--jobid={job}", "--immediate=2", "hostname", timeout=30
        )
    cluster.reconnect("n2")

    def answers() -> bool:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            return cluster.run("srun", "--overlap", f"--jobid={job}", "hostname", timeout=30) == "n2\n"
        return False

    poll(answers, 60, "the node")
    assert cluster.state(job) == "RUNNING"


def test_higher_partition_requeues_a_job_of_the_lower(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=1, grace_time=2, kill_wait=1)
    low = cluster.submit("sleep 1000", "--partition=low", "--exclusive")
    cluster.wait_state(low, "RUNNING")
    high = cluster.submit(until_there_is(tmp_path / "go"), "--partition=high", "--exclusive")
    cluster.wait_state(low, "PENDING")
    (tmp_path / "go").touch()
    cluster.wait_state(high, "COMPLETED")
    cluster.wait_state(low, "RUNNING")
    assert cluster.show(low)["Restarts"] == "1"


def test_job_outlives_controller_and_daemon(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(f"echo begun; {until_there_is(tmp_path / 'go')}; echo done", "--nodelist=n1")
    # A daemon that dies between the controller's word and the script's begin loses the job, and the controller takes
    # minutes to notice.
    poll(lambda: cluster.output(job) == "begun\n", 60, "the script")
    cluster.kill_slurmd("n1")
    cluster.restart_controller()
    cluster.start_slurmd("n1")
    (tmp_path / "go").touch()
    cluster.wait_state(job, "COMPLETED")
    assert cluster.output(job) == "begun\ndone\n"


def test_drained_node_gets_no_job(cluster: Cluster) -> None:
    cluster.drain("n1")
    cluster.wait_nodes("drained", "n1")
    assert cluster.run("srun", "--nodes=2", "hostname").split() in (["n2", "n3"], ["n3", "n2"])
    cluster.resume("n1")
    cluster.wait_nodes("idle")


def test_gpus_are_handed_out(cluster_with_gpus: Cluster) -> None:
    script = "echo $SLURM_GPUS_ON_NODE $CUDA_VISIBLE_DEVICES"
    assert (
        cluster_with_gpus.run("srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", script)
        == "2 0,1\n2 0,1\n"
    )
    with pytest.raises(RuntimeError, match="configuration is not available"):
        cluster_with_gpus.submit("true", "--gpus-per-node=3")


def test_accounting_answers(cluster_with_accounting: Cluster) -> None:
    cluster = cluster_with_accounting
    job = cluster.submit("srun true", "--account=research")
    cluster.wait_state(job, "COMPLETED")
    question = ("sacct", "--noheader", "--parsable2", "--jobs", job, "--format=JobID,State,Account")
    poll(lambda: f"{job}|COMPLETED|{ACCOUNT}" in cluster.run(*question).splitlines(), 20, "sacct")
    with pytest.raises(RuntimeError, match="Invalid account"):
        cluster.submit("true", "--account=none")


_HOLDS_A_CLUSTER = """
import pathlib, sys, time
from tests.slurm.cluster import Cluster
with Cluster(pathlib.Path(sys.argv[1])) as cluster:
    cluster.submit("sleep 100")
    print(cluster.address("n1"), flush=True)
    time.sleep(100)
"""


def test_nothing_outlives_a_killed_pytest(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`cluster` is here to skip where there can be none, and to be seen unharmed."""
    directory = str(tmp_path_factory.mktemp("other"))
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS_A_CLUSTER, directory], stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout is not None
        subnet = held.stdout.readline().rpartition(".")[0]
        held.send_signal(signal.SIGKILL)
    assert subnet.startswith("198.")

    def processes() -> bool:
        return any(
            directory in command
            for command in subprocess.check_output(["ps", "-eo", "args"], text=True).splitlines()
        )

    poll(lambda: not processes(), 10, "end of its processes")
    # With its last dot: the number of another cluster's network may begin with this one's.
    poll(
        lambda: f"{subnet}." not in subprocess.check_output(["ip", "route"], text=True),
        10,
        "end of its cable",
    )
    assert set(cluster.node_states().values()) == {"idle"}
