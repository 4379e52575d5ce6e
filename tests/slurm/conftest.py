"""Real Slurm clusters for tests, or the reason why there are none here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing

NewCluster = Callable[..., Cluster]
PATIENT = {"slurmd_timeout": 60, "kill_wait": 30}
"""Where nothing is to be lost or killed: for so long a busy machine may leave a daemon, or ranks that save, without a
core."""


@pytest.fixture
def new_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewCluster]:
    """Starts clusters that end with the test, patient but for what is said: `new_cluster(nodes=2, kill_wait=1)`."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Cluster:
            reason = missing(accounting=options.get("accounting", False))
            if reason:
                pytest.skip(f"no Slurm cluster here: {reason}")
            return stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm"), **PATIENT | options))

        yield start


@pytest.fixture
def cluster(new_cluster: NewCluster) -> Cluster:
    """Three nodes for this test alone: a cluster is up in less than a second, and no test finds what another
    left."""
    return new_cluster()


@pytest.fixture
def cluster_with_gpus(new_cluster: NewCluster) -> Cluster:
    """Three nodes with two GPUs each, which Slurm believes in."""
    return new_cluster(gpus_per_node=2)


@pytest.fixture(scope="module")
def cluster_with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, sacct, and the account `research`; for the whole file, as the database takes seconds to
    start."""
    reason = missing(accounting=True)
    if reason:
        pytest.skip(f"no Slurm cluster with accounting here: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm"), accounting=True, **PATIENT) as cluster:
        yield cluster
