"""The formulas of T5 and of mixtures of experts against their real classes: every parameter, every phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.memory.estimate import Estimator, estimator
from launcher.planner.model.model_config import read_config
from launcher.training import operations
from tests.benchmarks.bench_memory import traced
from tests.benchmarks.memory_cases import draw

pytestmark = pytest.mark.slow

SEED = 7


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("pool", ["t5", "experts"])
def test_formulas_and_traces_agree(pool: str, number: int, tmp_path: Path) -> None:
    case = draw(SEED, 6, pool)[number]
    plan = case.plan(tmp_path)
    config = read_config(str(tmp_path))
    assert config is not None
    ours, theirs = estimator(plan, config, case.batch), Estimator(plan, traced(case, plan), case.batch)
    assert ours is not None
    assert ours.units == theirs.units
    for name, near in (("loading", 1e-9), ("steady step", 0.015), ("evaluating", 0.04)):
        made, wanted = (one.footprint().phase(name).peak for one in (ours, theirs))
        assert made == pytest.approx(wanted, rel=near), (name, case)


def test_the_operations_of_a_token_are_those_of_the_chosen_experts(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    found = []
    for chosen in (2, 8):
        config = AutoConfig.for_model(
            "mixtral", **sizes, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=chosen
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found.append(operations.flops_per_token(model, config, 0))
    assert found[1] - found[0] == 6 * 3 * 6 * (3 * 64 * 32)
