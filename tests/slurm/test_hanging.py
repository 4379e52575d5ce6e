"""A rank that hangs on a real cluster: named with its node, requeued, and the second time without that node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.hangs_on_nodes import Nodes
from tests.slurm.cluster import missing
from tests.training.runs import state

pytestmark = [pytest.mark.very_slow, pytest.mark.timeout(1800)]


def test_a_node_that_hangs_twice_is_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := missing():
        pytest.skip(f"no Slurm cluster here: {reason}")
    folder: Path = tmp_path_factory.mktemp("hangs")
    fault = {"place": "forward", "kind": "stop", "host": "n2", "step": 5, "attempts": 2}
    with Nodes.of(folder, seconds=5.0) as nodes:
        run = nodes.submit("twice", "fsdp", fault, nodes=2, ranks=1)
        run.wait_event("requeued", 2)
        assert [one["excluded"] for one in run.events("requeued")] == [[], ["n2"]]
        for said, failed in zip(run.events("suspected"), run.events("failed"), strict=True):
            assert "rank 1 on n2 is stopped (SIGSTOP)" in said["line"]
            assert (failed["failure"]["failure_class"], failed["failure"]["host"]) == ("hung", "n2")
        run.wait_finished()
        assert run.events("started")[-1]["nodes"] == ["n1", "n3"]
        assert state(run.directory)
