"""The ranks' arrangement: axes by name, who shares samples, which sums a rank counts in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.errors import ConfigurationError
from launcher.planner.axes import DATA_AXES, LOSS_AXES, Mesh
from launcher.planner.plan import Plan
from tests.training.plans import plan_of


def mesh(**sizes: int) -> Mesh:
    """Return a mesh of these sizes; one along which no engine cuts yet is put in past the check."""
    known = {axis: size for axis, size in sizes.items() if axis.startswith("dp")}
    fixed: dict[str, Any] = {
        "nodes": 1,
        "reshard_after_forward": True,
        "device": "cpu",
        "threads_per_rank": 1,
    }
    num_ranks = known.get("dp_replicate", 1) * known.get("dp_shard", 1)
    whole = Mesh(
        **{"dp_replicate": 1, "dp_shard": 1} | known | fixed, ranks_per_node=num_ranks, world_size=num_ranks
    )
    others = {axis: size for axis, size in sizes.items() if axis not in known}
    for size in others.values():
        num_ranks *= size
    return whole.model_copy(update=others | {"world_size": num_ranks})


def test_of_ranks_with_samples_of_their_own_each_is_its_own_share() -> None:
    """What holds today: the share of the data is the rank."""
    for sizes in ({"dp_shard": 6}, {"dp_replicate": 2, "dp_shard": 3}, {"dp_replicate": 6}):
        arranged = mesh(**sizes)
        assert [arranged.data_rank(rank) for rank in range(6)] == list(range(6))
        assert arranged.data_parallel_size == 6
        assert all(arranged.counts(rank, axes) for rank in range(6) for axes in (DATA_AXES, LOSS_AXES))


def test_places_count_the_last_axis_fastest() -> None:
    arranged = mesh(dp_replicate=2, dp_shard=3, tp=2)
    assert [tuple(arranged.coordinates(rank).values()) for rank in (0, 1, 2, 6, 11)] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0), (1, 2, 0, 1),
    ]  # fmt: skip


def test_ranks_that_share_a_layer_share_samples_and_count_once() -> None:
    arranged = mesh(dp_shard=2, tp=2)
    assert [arranged.data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [arranged.counts(rank, LOSS_AXES) for rank in range(4)] == [True, False, True, False]


def test_ranks_that_share_a_sample_add_up_their_losses_and_count_its_evaluation_once() -> None:
    arranged = mesh(dp_shard=2, cp=2)
    assert [arranged.data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert all(arranged.counts(rank, LOSS_AXES) for rank in range(4))
    assert [arranged.counts(rank, DATA_AXES) for rank in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("axis", ["cp", "tp", "ep"])
def test_an_axis_that_no_engine_cuts_along_is_refused(axis: str) -> None:
    values = mesh(dp_shard=2).model_dump()
    with pytest.raises(
        ValidationError, match=f"{axis} = 2: no engine cuts along this axis yet; the nearest that works is 1"
    ):
        Mesh.model_validate(values | {axis: 2, "world_size": 4})


def test_axes_that_do_not_make_up_the_ranks_are_refused(tmp_path: Path) -> None:
    content = json.loads(plan_of(tmp_path, 2).to_json())
    content["mesh"]["dp_replicate"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(content))
    text = "mesh: .*dp_replicate 2 x dp_shard 2 x cp 1 x tp 1 = 4 ranks, and world_size is 2"
    with pytest.raises(ConfigurationError, match=text):
        Plan.read(tmp_path / "plan.json")


def test_a_plan_of_before_the_axes_had_names_is_read(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 4, mesh__dp_replicate=2, mesh__dp_shard=2)
    content = json.loads(plan.to_json())
    older = {"replicate": content["mesh"].pop("dp_replicate"), "shard": content["mesh"].pop("dp_shard")}
    content["mesh"] = {
        key: value for key, value in content["mesh"].items() if key not in ("cp", "tp", "ep")
    } | older
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert Plan.read(tmp_path / "plan.json") == plan
