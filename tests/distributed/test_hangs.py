"""Real ranks of the real trainer that hang: named within the seconds of the job, with who and where, and
ended with a code of their own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import HungError
from launcher.runs import events
from launcher.runs.seen import ranks_of
from launcher.runs.status import read_status
from tests.distributed.hanging_runs import SECONDS, finish, launch, make_run
from tests.distributed.judging import STRUCK
from tests.training.plans import deepspeed
from tests.training.runs import causal_data, model_directory, named

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hangs")
    return model_directory(folder / "model"), causal_data(folder / "data", packing=False)


CASES = [
    (
        {"place": "forward", "kind": "stop", "rank": 1, "step": 7},
        {},
        "is stopped (SIGSTOP); rank 0 waits in all_gather",
    ),
    ({"place": "data", "kind": "sleep", "rank": 0, "step": 7}, deepspeed(2), "is in the loader ("),
    (
        {"place": "evaluating", "kind": "stop", "rank": 1, "step": 6},
        {},
        "is stopped (SIGSTOP); rank 0 waits in",
    ),
    (
        {"place": "preparing", "kind": "stop"},
        {},
        "is stopped (SIGSTOP); rank {other} waits for the preparation",
    ),
    (
        {"place": "backward", "kind": "stop", "rank": 0, "step": 3},
        deepspeed(3),
        "is stopped (SIGSTOP); rank 1 waits in",
    ),
    (
        {"place": "optimizer", "kind": "sleep", "rank": 1, "step": 8},
        {},
        "is in optimizer, at strike (hanging.py:",
    ),
]


@pytest.mark.parametrize(
    ("fault", "changes", "words"),
    [
        pytest.param(
            *case,
            id=f"{case[0]['place']}-{case[0]['kind']}",
            marks=pytest.mark.slow if number == 1 else pytest.mark.very_slow,
        )
        for number, case in enumerate(CASES)
    ],
)
def test_a_hang_is_named(
    tmp_path: Path,
    material: tuple[Path, dict[str, Any]],
    fault: dict[str, Any],
    changes: dict[str, Any],
    words: str,
) -> None:
    run = make_run(tmp_path, material, fault, **changes)
    code, errors = finish(run, launch(run))
    struck = json.loads((run.attempt(1) / STRUCK).read_text())
    [said] = named(run, "suspected")
    rank = struck["rank"]
    assert f"rank {rank} on {os.uname().nodename} {words.format(other=1 - rank)}" in said["line"], errors
    assert said["line"] in errors and "Stacks: " in errors
    assert said["time"] - struck["time"] < SECONDS + 120
    assert (
        code == HungError.exit_code == json.loads((run.attempt(1) / "failure.json").read_text())["exit_code"]
    )
    stacks = (run.attempt(1) / "stacks-1.txt").read_text()
    assert "most recent call first" in stacks
    assert ("stopped (SIGSTOP or the like), so that it writes no stack" in stacks) == (
        fault["kind"] == "stop"
    )
    status = read_status(run)
    assert (
        status.state == "failed" and status.failure is not None and status.failure["failure_class"] == "hung"
    )


@pytest.mark.very_slow
def test_a_rank_that_goes_on_again_ends_the_suspicion(
    tmp_path: Path, material: tuple[Path, dict[str, Any]]
) -> None:
    # By the bounds of a job that names none: of a rank that is stopped 10 s, and a minute until the run is ended.
    fault = {"place": "forward", "kind": "stop", "rank": 1, "step": 7}
    run = make_run(tmp_path, material, fault, hang_after=None)
    process = launch(run)
    deadline = time.monotonic() + 600
    while not named(run, "suspected"):
        assert time.monotonic() < deadline and process.poll() is None, "suspected"
        time.sleep(0.05)
    status = read_status(run)
    assert (
        status.state == "running"
        and status.phase == "training"
        and status.hang is not None
        and "rank 1" in status.hang
    )
    assert status.step_age_seconds is not None and status.step_age_seconds > SECONDS / 2
    who = json.loads((run.attempt(1) / "rank-1.json").read_text())
    os.kill(who["pid"], signal.SIGCONT)
    code, errors = finish(run, process)
    assert code == 0, errors
    assert [
        record["event"]
        for record in events.read(run.events_file)
        if record["event"] in ("suspected", "recovered")
    ] == ["suspected", "recovered"]
    assert "it goes on again" in errors
    last = ranks_of(run.attempt(1))
    assert [seen.rank for seen in last] == [0, 1] and all(
        seen.step == 12 and seen.memory_bytes > 0 for seen in last
    )


@pytest.mark.very_slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_hangs_is_named_and_given_up(
    tmp_path: Path, material: tuple[Path, dict[str, Any]], asynchronous: bool
) -> None:
    """Training goes on; nothing is saved until the storage answers, and then again."""
    fault = {"place": "saving", "kind": "sleep", "rank": 1, "seconds": 5 * SECONDS}
    checkpoint = {"every": 4, "keep_last": 2, "asynchronous": asynchronous}
    run = make_run(tmp_path, material, fault, checkpoint=checkpoint, num_steps=600, evaluate_every=None)
    code, errors = finish(run, launch(run))
    assert code == 0, errors
    stalled, failed = named(run, "save_stalled"), named(run, "save_failed")
    assert stalled[0]["rank"] == 1 and "rank 1" in stalled[0]["line"] and stalled[0]["line"] in errors
    assert (
        failed[0]["step"] == 4
        and "storage hangs" in failed[0]["reason"]
        and "(rank 1: writing" in failed[0]["reason"]
    )
    assert not named(run, "suspected")
    saved = [record["step"] for record in named(run, "saved")]
    assert 4 not in saved and saved[-1] == 600 and all(step > failed[-1]["step"] for step in saved)


@pytest.mark.very_slow
def test_a_stopped_agent_is_named_and_its_ranks_go_on(
    tmp_path: Path, material: tuple[Path, dict[str, Any]]
) -> None:
    fault = {"place": "forward", "kind": "agent", "rank": 1, "step": 2}
    run = make_run(tmp_path, material, fault, num_steps=200, hang_after=4.0, evaluate_every=None)
    code, errors = finish(run, launch(run, "--exit-seconds", "5"))
    [said] = named(run, "suspected")
    host = os.uname().nodename
    assert said["line"].startswith(f"the agent on {host} is stopped (SIGSTOP) for "), said
    assert said["line"].endswith("the ranks go on, and one that ends is not noticed there")
    assert said["line"] in errors and said["rank"] == -1 and said["stacks"] == ""
    assert code == 0 and run.finished, errors


@pytest.mark.very_slow
def test_an_agent_that_is_stopped_before_it_has_a_rank_ends_the_run(
    tmp_path: Path, material: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_WARM", "hanging")
    run = make_run(tmp_path, material, {"place": "importing", "kind": "agent"}, hang_after=4.0)
    code, errors = finish(run, launch(run))
    line = f"the agent on {os.uname().nodename} is stopped (SIGSTOP) for "
    assert code == HungError.exit_code and errors.count(line) == 2, errors
    assert "its ranks cannot start" in named(run, "suspected")[0]["line"]
    failure = json.loads((run.attempt(1) / "failure.json").read_text())
    assert (failure["failure_class"], failure["rank"]) == ("hung", -1)
