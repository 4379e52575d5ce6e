"""Random damage to real checkpoints, of both engines and of adapters: always found, by the right class, never
with a traceback.

LAUNCHER_CORRUPTIONS=10000 makes that many, LAUNCHER_CORRUPTIONS_SEED=1 others; the default is few.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import main
from launcher.errors import CheckpointError
from launcher.runs.checkpoints import newest_valid, verify
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import choose
from tests.training.plans import deepspeed
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for
from tests.unit.checkpoint_corruption import damage

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NUM_CORRUPTIONS = int(os.environ.get("LAUNCHER_CORRUPTIONS", "160"))
SEED = int(os.environ.get("LAUNCHER_CORRUPTIONS_SEED", "18"))
LORA = {"model__adapter": {"rank": 2, "targets": "all-linear"}, "model__weights": "pretrained"}
RUNS: dict[str, dict[str, Any]] = {
    "FSDP": {},
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3),
    "adapters, FSDP": LORA,
    "adapters, ZeRO-3": deepspeed(3, **LORA),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Of each kind a run on 2 ranks with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    model, data = model_directory(folder / "model"), causal_data(folder / "data")
    made = {}
    for name, changes in RUNS.items():
        plan = plan_for(model, data, 2, num_steps=2, checkpoint={"every": 1, "keep_last": 3}, **changes)
        made[name] = new_run(folder / name.replace(" ", "-"), plan)
        finish(made[name], 2, cache=folder / "cache")
    return made


def left_with(*command: str) -> int:
    """The exit code of a command; whatever it raises is what a user would see."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(list(command))
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def restore(target: Path, pristine: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(pristine, target)


@pytest.mark.very_slow  # tests/distributed/test_checkpoint_reading.py damages one kind of them
def test_random_damage_to_every_kind_of_checkpoint(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    generator, began, kinds, files = random.Random(SEED), time.monotonic(), Counter[str](), Counter[str]()
    pristine = {name: shutil.copytree(run.checkpoint(2), tmp_path / name) for name, run in runs.items()}
    for number in range(NUM_CORRUPTIONS):
        name = generator.choice(list(runs))
        run = runs[name]
        others = [
            other.checkpoint(step) for other in runs.values() for step in (1, 2) if (other, step) != (run, 2)
        ]
        what = f"{number}: {name}: {damage(run.checkpoint(2), others, generator)}"
        kinds[
            " ".join(
                word for word in what.split(": ", 2)[2].split() if word.isalpha() and word not in ("at", "to")
            )
        ] += 1
        files.update(
            file.name
            for file in pristine[name].iterdir()
            if f" {file.name} " in f" {what.split(': ', 2)[2]} "
        )
        choice = newest_valid(run, num_threads=1)
        assert choice.chosen is not None and choice.chosen.step == 1, what
        assert [stored.step for stored in choice.rejected] == [2] and all(choice.rejected[0].problems), what
        with pytest.raises(CheckpointError):
            choose(run, 2)
        for command in ("verify", "inspect") if number % 10 == 0 else ("verify",):
            code = left_with("checkpoint", command, str(run.path), "--checkpoint", "2")
            # `inspect` reads the description alone, which may be whole where data is not.
            assert code == CheckpointError.exit_code or (command == "inspect" and code == 0), (
                f"{what}: {command} left with {code}"
            )
        restore(run.checkpoint(2), pristine[name])
    assert all(verify(run.checkpoint(2), run.run_id()) == [] for run in runs.values())
    print(
        f"{NUM_CORRUPTIONS} corruptions in {time.monotonic() - began:.0f} s, all found with exit code "
        f"6; by kind {dict(kinds)}"
    )
    print(f"by file {dict(files)}")


def test_the_damaged_one_is_passed_over_when_training_goes_on(runs: dict[str, RunDirectory]) -> None:
    run = runs["FSDP"]
    damage(run.checkpoint(2), [run.checkpoint(1)], random.Random(3))
    run.finished_file.unlink(missing_ok=True)
    finish(run, 2, cache=run.path.parent / "cache")
    assert verify(run.checkpoint(2), run.run_id()) == []
