"""A rank that runs out of memory between passes: its peer does not wait for it, and the run ends by its class
within seconds.

In CI tests/training/test_rescue.py has one of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import OutOfMemoryError
from launcher.runs.status import newest_checkpoint
from tests.distributed.hanging_runs import finish, launch, make_run
from tests.distributed.judging import STRUCK
from tests.training.plans import deepspeed
from tests.training.runs import causal_data, model_directory, named

pytestmark = [pytest.mark.slow, pytest.mark.very_slow]

SECONDS_TO_END = 30.0
"""Of a busy machine; a rescue that nobody comes to takes a minute, and a group's patience half an hour."""
ZERO3 = deepspeed(3)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    return model_directory(folder / "model"), causal_data(folder / "data", packing=False)


@pytest.mark.parametrize(
    ("place", "step", "engine", "saved"),
    [
        ("told", 7, {}, 0),
        ("told", 7, ZERO3, 0),
        ("loading", 0, {}, 0),
        ("loading", 0, ZERO3, 0),
        ("checking the loss", 0, {}, 0),
        ("restoring", 0, ZERO3, 0),
        ("data", 7, {}, 0),
        ("collating", 7, {}, 7),  # in the pass: all save, and the next attempt has smaller ones
        ("collating", 7, ZERO3, 7),
        ("exchange", 7, {}, 7),
        ("exchange", 7, ZERO3, 7),
        ("optimizer", 7, {}, 0),
        ("optimizer", 7, ZERO3, 0),
        ("evaluating", 6, {}, 0),
        ("evaluating", 6, ZERO3, 0),
        ("measuring", 6, {}, 0),
        ("staging", 0, {}, 0),
        ("staging", 0, ZERO3, 0),
    ],
)
def test_the_run_ends_by_its_class_and_nobody_waits(
    place: str,
    step: int,
    engine: dict[str, Any],
    saved: int,
    tmp_path: Path,
    material: tuple[Path, dict[str, Any]],
) -> None:
    fault = {"place": place, "kind": "memory", "rank": 1, "step": step}
    run = make_run(tmp_path, material, fault, hang_after=None, checkpoint={"every": 8}, **engine)
    code, errors = finish(run, launch(run))
    struck = json.loads((run.attempt(1) / STRUCK).read_text())
    seconds = time.time() - struck["time"]
    failure = json.loads((run.attempt(1) / "failure.json").read_text())
    print(f"{place}, {engine.get('engine', 'fsdp')}: ended after {seconds:.1f} s")
    assert code == OutOfMemoryError.exit_code and failure["failure_class"] == "out-of-memory", errors
    assert failure["rank"] == 1 and seconds < SECONDS_TO_END
    newest = newest_checkpoint(run)
    assert newest == (run.checkpoint(saved) if saved else None)


@pytest.mark.parametrize("place", ["filling the image", "saving"])
@pytest.mark.parametrize("engine", [{}, ZERO3], ids=["fsdp", "zero3"])
def test_a_save_that_has_no_memory_fails_and_training_goes_on(
    place: str, engine: dict[str, Any], tmp_path: Path, material: tuple[Path, dict[str, Any]]
) -> None:
    fault = {"place": place, "kind": "memory", "rank": 1}
    run = make_run(tmp_path, material, fault, hang_after=None, checkpoint={"every": 4}, **engine)
    code, errors = finish(run, launch(run))
    assert code == 0 and run.finished, errors
    [failed] = named(run, "save_failed")
    assert failed["step"] == 4 and "MemoryError" in failed["reason"], failed
    assert newest_checkpoint(run) == run.checkpoint(12)
