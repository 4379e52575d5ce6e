"""Every injection of the fault matrix on its first engine; the others, and the table in docs/failures.md, by
bench_fault_matrix.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.bench_fault_matrix import INJECTIONS, perform
from tests.benchmarks.faults.material import PATIENCE, TrainingInputs
from tests.benchmarks.faults.registry import Injection

pytestmark = [pytest.mark.very_slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    PATIENCE[0] = 3.0
    return TrainingInputs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("injection", INJECTIONS, ids=lambda injection: injection.name)
def test_what_must_be_seen_is_seen(injection: Injection, material: TrainingInputs, tmp_path: Path) -> None:
    result = perform(injection, injection.variants[0], material, tmp_path / "scene")
    if "missing" in result:
        pytest.skip(result["missing"])
    assert not result["why_not"], result
