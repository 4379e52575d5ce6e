"""Streamed rows on several nodes of a real cluster: each makes its own windows, and all have the same order."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.runs.events import steps
from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.runs import TrainingInputs
from tests.training.runs import assert_equal, state

pytestmark = [pytest.mark.very_slow, pytest.mark.timeout(1800)]
NUMBERS = ("sample_ids", "loss", "grad_norm")


def numbers(run: RunDirectory) -> list[list[object]]:
    return [[record[key] for key in NUMBERS] for record in steps(run.metrics_file).values()]


def test_two_nodes_requeued_are_one_machine_undisturbed(tmp_path: Path, cluster: Cluster) -> None:
    material = TrainingInputs(tmp_path / "material")
    material.data.pop("num_workers")
    changes = {"data": material.data | {"streaming": True, "shuffle_window": 48}}
    material.launcher("run", material.job("whole", changes, nodes=1, ranks_per_node=4))
    run = material.submit(cluster, material.job("nodes", changes))
    run.wait_step(9)
    cluster.run("scontrol", "requeue", run.job)
    run.wait_finished()
    whole = RunDirectory(material.folder / "runs" / "whole")
    assert len(run.events("started")) == 2 and len({*run.events("started")[0]["nodes"]}) == 2
    assert numbers(run.directory) == numbers(whole)
    assert_equal(state(run.directory), state(whole))
    assert not list(tmp_path.rglob("*-windows"))
