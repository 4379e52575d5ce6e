"""What is refused before it waits in the queue, and what happens to runs that fail: again, elsewhere, or not
again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.runs import FAULTS, Run, TrainingInputs
from tests.training.runs import state

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return TrainingInputs(tmp_path_factory.mktemp("material"))


def faulty(material: TrainingInputs, name: str, fault: str, micro: int = 2, **cluster: object) -> Path:
    return material.job(
        name,
        {"batch": {"micro_batch_size": micro}},
        environment={"FAULT": fault, "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"},
        **cluster,
    )


@pytest.mark.very_slow
def test_a_crash_loop_ends_with_a_diagnosis(cluster: Cluster, material: TrainingInputs) -> None:
    run = material.submit(cluster, faulty(material, "loop", "kill:3:6", nodes=2, attempts_without_progress=2))
    reason = run.wait_event("gave_up", seconds=240)["reason"]
    # The first attempt saved step 4: it counts as progress. The next two come no further.
    assert (
        "no progress in 2 attempts in a row" in reason
        and "rank-lost" in reason
        and "killed by signal 9 (SIGKILL)" in reason
    )
    assert len(run.events("started")) == 3
    cluster.wait_state(run.job, "FAILED", timeout=30)
    seen = material.json("status", "loop", cluster=cluster)
    assert seen["state"] == "failed" and "no progress" in seen["last_word"]
    failure = seen["failure"]
    assert failure["rank"] == 3 and failure["host"] == "n2" and failure["step"] in (6, 7)


@pytest.mark.very_slow
def test_out_of_memory_late_goes_on_with_smaller_passes(cluster: Cluster, material: TrainingInputs) -> None:
    run = material.submit(cluster, faulty(material, "late", "memory:1:3", nodes=1))
    run.wait_finished()
    [cut] = run.events("cut")
    assert (cut["before"], cut["after"]) == (2, 1) and cut["step"] == run.events("resumed")[0]["step"]
    assert len(run.events("started")) == 2


@pytest.mark.very_slow
def test_out_of_memory_with_one_sample_is_not_tried_again(cluster: Cluster, material: TrainingInputs) -> None:
    run = material.submit(cluster, faulty(material, "memory", "memory:1:3", micro=1, nodes=1))
    assert "out-of-memory" in run.wait_event("gave_up")["reason"]
    cluster.wait_state(run.job, "FAILED", timeout=30)
    assert cluster.show(run.job)["ExitCode"] == "4:0"
    assert len(run.events("started")) == 1


@pytest.mark.very_slow
def test_a_node_with_a_broken_disk_is_left_out(cluster: Cluster, material: TrainingInputs) -> None:
    run = material.submit(cluster, faulty(material, "disk", "disk:n1:5", nodes=2))
    assert run.wait_event("requeued")["excluded"] == ["n1"]
    run.wait_finished()
    assert run.events("started")[-1]["nodes"] == ["n2", "n3"]
    assert state(run.directory)


@pytest.mark.very_slow
def test_two_runs_on_the_same_nodes_never_meet(cluster: Cluster, material: TrainingInputs) -> None:
    """Both lead on n1, at the same time."""
    jobs = [material.job(name, ranks_per_node=1) for name in ("first", "second")]
    runs = [material.submit(cluster, job) for job in jobs]
    for run in runs:
        run.wait_finished()
    assert [run.events("started")[0]["nodes"] for run in runs] == [["n1", "n2"]] * 2
    first, second = (json.loads((run.directory.attempt(1) / "allocation.json").read_text()) for run in runs)
    assert first["port"] != second["port"]
    assert runs[0].events("started")[0]["time"] < runs[1].events("finished")[0]["time"]
    assert runs[1].events("started")[0]["time"] < runs[0].events("finished")[0]["time"]


@pytest.mark.parametrize(
    ("cluster_keys", "said"),
    [
        ({"partition": "nope"}, ["cluster.partition", "invalid partition"]),
        ({"nodes": 6}, ["cluster.nodes", "`sinfo -Nl` lists"]),
        ({"partition": "short", "time_limit": "1h"}, ["cluster.time_limit", "time limit"]),
        ({"interface": "lo"}, ["cluster.interface", "leads to no other node"]),
        (
            {"gpus_per_node": "auto", "ranks_per_node": "auto"},
            ["cluster.gpus_per_node", "how many GPUs each has"],
        ),
        ({"mem": "900G"}, ["mem"]),
    ],
    ids=["partition", "nodes", "time", "interface", "gpus", "memory"],
)
def test_what_cannot_run_is_one_clear_line_at_submit(
    cluster_keys: dict[str, object], said: list[str], cluster: Cluster, material: TrainingInputs
) -> None:
    done = material.launcher("submit", material.job("refused", **cluster_keys), cluster=cluster, code=None)
    assert done.returncode in (2, 11), done.stderr
    assert done.stderr.count("error:") == 1 and len(done.stderr.strip().splitlines()) == 1
    assert all(words.lower() in done.stderr.lower() for words in said), done.stderr
    assert not cluster.run("squeue", "--noheader").strip()


def test_an_account_that_is_missing_is_one_clear_line(
    cluster_with_accounting: Cluster, material: TrainingInputs
) -> None:
    done = material.launcher(
        "submit", material.job("account", account="nobody"), cluster=cluster_with_accounting, code=11
    )
    assert "cluster.account" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_run_directory_that_cannot_be_written_is_one_clear_line(
    cluster: Cluster, material: TrainingInputs
) -> None:
    done = material.launcher(
        "submit", material.job("nowhere"), "--run-dir", "/proc/nowhere", cluster=cluster, code=5
    )
    assert "/proc/nowhere" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_interface_that_a_node_has_not_is_named_with_those_it_has(
    cluster: Cluster, material: TrainingInputs
) -> None:
    run = material.submit(cluster, material.job("interface", interface="ib7"))
    reason = run.wait_event("gave_up")["reason"]
    assert "cluster.interface" in reason and "ib7" in reason and "eth0" in reason
    assert len(run.events("started")) == 1


def test_a_line_of_the_setup_that_fails_ends_the_job(cluster: Cluster, material: TrainingInputs) -> None:
    run = material.submit(cluster, material.job("setup", setup=["cat /etc/no-such-file"]))
    assert "before an attempt began" in run.wait_event("gave_up")["reason"]
    cluster.wait_state(run.job, "FAILED", timeout=30)


def test_a_second_submission_is_refused_while_the_first_is_there(
    cluster: Cluster, material: TrainingInputs
) -> None:
    run = material.submit(cluster, material.job("twice", begin="now+1hour"))
    done = material.launcher("submit", material.job("twice", begin="now+1hour"), cluster=cluster, code=7)
    assert f"job {run.job} already (pending)" in done.stderr
    material.launcher("cancel", "twice", cluster=cluster)
    done = material.launcher("cancel", "twice", cluster=cluster, code=2)
    assert "is over" in done.stderr
    time.sleep(0.2)
    again = material.submit(cluster, material.job("twice", begin="now+1hour"))
    assert again.job != run.job


def test_after_another_run(cluster: Cluster, material: TrainingInputs) -> None:
    first = material.submit(cluster, material.job("before", begin="now+1hour"))
    second = material.submit(cluster, material.job("behind"), "--after", "before")
    assert cluster.show(second.job)["Dependency"].startswith(f"afterok:{first.job}")
    done = material.launcher("submit", material.job("third"), "--after", "unknown", cluster=cluster, code=2)
    assert "unknown" in done.stderr


def test_a_script_of_ones_own_runs_as_it_was_when_it_was_submitted(
    cluster: Cluster, material: TrainingInputs
) -> None:
    """Edited while it waits, it is the old one that runs, on all ranks of both nodes."""
    folder = material.folder / "mine"
    folder.mkdir()
    (folder / "part.py").write_text("WORD = 'old'\n")
    script = folder / "train.py"
    script.write_text(
        "import os, sys, part\nprint('said', part.WORD, os.environ['RANK'], os.environ['WORLD_SIZE'], "
        "sys.argv[1])\n"
    )
    job = material.folder / "script.yaml"
    job.write_text(
        "name: mine\nprecision: fp32\ncluster: {nodes: 2, gpus_per_node: 0, ranks_per_node: 2, "
        "threads_per_rank: 1, begin: now+1hour}\n"
    )
    environment = material.environment(cluster)
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "submit",
        str(job),
        "--script",
        str(script),
        "--json",
        "--",
        "an argument",
    ]
    done = subprocess.run(
        command, env=environment, cwd=material.folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    run = Run(RunDirectory(material.folder / "runs" / "mine"), json.loads(done.stdout)["job"], cluster)
    (folder / "part.py").write_text("WORD = 'new'\n")
    cluster.run("scontrol", "update", f"JobId={run.job}", "StartTime=now")
    run.wait_finished()
    for rank in range(4):
        assert f"said old {rank} 4 an argument" in (run.directory.attempt(1) / f"rank-{rank}.log").read_text()
