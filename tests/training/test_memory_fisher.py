"""The plan of Fisher information against the allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.planner.fisher import memory
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.plan import Plan
from launcher.training.fisher_entry import Fisher
from launcher.training.tracing.make_profile import example_batch
from tests.benchmarks.memory_pool import World
from tests.benchmarks.memory_ranks import PHASE, loaded, timeline
from tests.training.plans import plan_of
from tests.training.runs import model_directory

pytestmark = pytest.mark.distributed
LENGTH = 300
SIZES = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 4000, "head_dim": 64}


def take_two(plan: Plan) -> int:
    """Return the peak of a rank where it takes the second sample in, as `fisher_entry.estimate` has it do."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        config, task, engine = loaded(plan, trains=False)
        fisher = Fisher(engine)
        engine.model.eval()
        for name in ("first", "second", "end"):
            with record_function(f"{PHASE}{name}"):
                if name != "end":
                    fisher.take(example_batch(task, config, (LENGTH,)), plan.batch.data_parallel_size, 2)
    peak: int = timeline(profiler)["peaks"]["second"]
    return peak


@pytest.fixture(scope="module", params=[1, 2])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    ranks = World(request.param)
    yield ranks
    ranks.close()


@pytest.mark.slow
def test_a_sample_and_the_sums_of_squares_are_predicted(world: World, tmp_path: Path) -> None:
    """The peak of a sample: over by no more than 5%, and never under by more than 2%."""
    model, num_ranks = model_directory(tmp_path / "model", num_hidden_layers=6, **SIZES), len(world.pipes)
    ways: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"activation_checkpointing": "full"}]
    for changes in ways:
        plan = plan_of(model, num_ranks, data__max_length=LENGTH, **changes)
        program = Profiles().find(plan)
        assert not isinstance(program, Unknown)
        measured = max(world.call(take_two, plan))
        share = memory(plan, program).total / measured - 1
        assert -0.02 <= share <= 0.05, (changes, num_ranks, measured, f"{share:+.1%}")
