"""What injects faults must itself be right: the shim does what it is told, times add up, and a table is made
of results alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.events import append
from launcher.runs.layout import RunDirectory
from tests.benchmarks import _report
from tests.benchmarks.faults import shim, soak_page, table
from tests.benchmarks.faults.effective import Timeline
from tests.benchmarks.faults.registry import Expected, Injection


def told(tmp_path: Path, order: str, code: str) -> str:
    """What a process under the shim prints."""
    reason = shim.missing()
    if reason:
        pytest.skip(reason)
    shimmed = shim.Shim(tmp_path)
    shimmed.order(order)
    environment = {**os.environ, **shimmed.variables}
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    ).stdout


def test_writes_below_a_directory_fail_and_others_do_not(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    code = (
        "import os\n"
        f"for name in ('bad', 'good'):\n    path = f'{tmp_path}/{{name}}/file'\n"
        "    try:\n        open(path, 'w').close()\n        print(name)\n    except OSError as "
        "error:\n        print(error.errno)\n"
    )
    assert told(tmp_path, f"fail {tmp_path}/bad 5", code).split() == ["5", "good"]


def test_writes_fail_in_files_that_could_be_opened(tmp_path: Path) -> None:
    code = (
        f"import os\nfile = os.open('{tmp_path}/file', os.O_CREAT | os.O_WRONLY)\nprint('open')\n"
        "try:\n    os.write(file, b'x')\nexcept OSError as error:\n    print(error.errno, error.filename)\n"
    )
    assert told(tmp_path, f"spoil {tmp_path} 5", code).split() == ["open", "5", "None"]


def test_a_wait_by_a_clock_that_was_set_back_is_as_long_as_it_was_to_be(tmp_path: Path) -> None:
    """Else what waits by the wall clock would spin, which no machine whose clock is set does."""
    code = (
        "import ctypes, time\n"
        "library, semaphore = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "library.sem_init(semaphore, 0, 0)\n"
        "until, began = time.time() + 0.3, time.monotonic()\n"
        "deadline = (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9))\n"
        "print(library.sem_timedwait(semaphore, deadline), 0.25 < time.monotonic() - began < 60)\n"
    )
    assert told(tmp_path, "clock -7200", code).split() == ["-1", "True"]


def test_the_wall_clock_is_ahead_and_the_other_is_not(tmp_path: Path) -> None:
    wall, monotonic = told(
        tmp_path, "clock 7200", "import time\nprint(time.time(), time.monotonic())"
    ).split()
    assert 7100 < float(wall) - time.time() < 7300
    assert abs(float(monotonic) - time.monotonic()) < 100


def test_what_makes_files_durable_is_noted_in_its_order(tmp_path: Path) -> None:
    code = (
        f"import os\nfile = open('{tmp_path}/a', 'w')\nos.fsync(file.fileno())\nos.rename('{tmp_path}/a', "
        f"'{tmp_path}/b')\n"
    )
    told(tmp_path, f"log {tmp_path}/calls", code)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"fsync {tmp_path}/a",
        f"rename {tmp_path}/a {tmp_path}/b",
    ]


def test_what_failures_and_saves_cost_is_counted_once(tmp_path: Path) -> None:
    """Steps of 1 s, saved every 2 (0.5 s more after each); hit in step 6, held up for 3 s in step 8, and back
    from step 4 after 10 s."""
    run = RunDirectory(tmp_path)
    times = [1.0, 2.0, 3.5, 4.5, 6.0, 17.5, 18.5, 20.0, 24.0, 25.5, 26.5]
    for number, at in enumerate((0.0, 9.0), 1):
        append(run.events_file, {"time": at, "event": "started", "attempt": number})
    for step, at in zip((1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10), times, strict=True):
        append(run.metrics_file, {"kind": "train", "step": step, "loss": 1.0, "time": at})
    found = Timeline.of(run, [{"time": 6.5}, {"time": 21.0}]).times(every=2)
    assert (found.kept, found.lost, found.held, found.stalls, found.failures) == (10.0, 1.5, 3.0, 2.0, 1)
    assert (found.wall, found.restarts) == (23.5, 10.5)
    # All is accounted for; what the save before the step that was done again cost is in two of them.
    assert found.wall == pytest.approx(found.kept + found.lost + found.restarts + found.stalls - 0.5)
    assert found.ratio == pytest.approx(10 / 23.5)
    assert found.formula == pytest.approx(2 / 2.5 * (1 - (10.5 + 2.5 / 2) / 23.5))
    assert found.formula == pytest.approx(found.ratio, abs=0.03)


def test_a_table_says_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "failures.md"
    page.write_text("# Failures\n\nKept.\n")
    record = tmp_path / "fault_matrix.json"
    monkeypatch.setattr(table, "_PAGE", page)
    monkeypatch.setattr(table, "_RECORD", record)
    one = Injection(
        "one", "1", "a rank killed", lambda scene: None, Expected(), ("FSDP", "ZeRO-3"), lambda: None
    )
    base = {
        "name": "one",
        "row": "1",
        "date": "2026-11-28",
        "code": 9,
        "seconds_until_gone": 0.4,
        "samples_lost": 0,
        "samples_repeated": 0,
    }
    table.keep(
        tmp_path,
        base
        | {
            "variant": "FSDP",
            "why_not": [],
            "line": "rank 1 of /a/b/run",
            "bits_equal": True,
            "steps_again": 2,
        },
    )
    table.keep(
        tmp_path,
        base
        | {"variant": "ZeRO-3", "why_not": ["exit code 1, not 9"], "bits_equal": False, "steps_again": 3},
    )
    for folder in (tmp_path, tmp_path / "another machine"):
        table.write([one], table.results(folder))
    assert "/a/b" not in record.read_text(), "no path of the machine"
    text = page.read_text()
    assert "Kept." in text and text.count("## What was injected") == 1
    assert "2 injections of 1 kinds, 1 of which held" in text
    rows = [line for line in text.splitlines() if "a rank killed" in line]
    assert len(rows) == 2
    row = "".join(rows)
    assert (
        "exit code 1, not 9" in row
        and "no (ZeRO-3)" in row
        and "not equal" in row
        and "2 to 3" in row
        and "/a/b" not in row
    )


def test_soaks_of_several_machines_add_up() -> None:
    timeline = vars(Timeline(tuple((step, float(step)) for step in range(1, 10)), (0.0,), ()))
    piece = {"piece": 1, "failures": 2, "saves_failed": 1, "checkpoints_chosen": 2, "differences": []}
    piece |= {"conditions": _report.conditions("torch"), "timeline": timeline}
    done = [
        {"pieces": [piece | {"injections": [{"kind": "kill rank", "time": 1.0}] * number}], "broken": []}
        for number in (3, 4)
    ]
    done[1]["broken"] = [{"piece": 2, "why": "TimeoutError: no step", "injections": [{"kind": "stop"}]}]
    soaks = {str(seed): soak_page.figures(one, 4) for seed, one in enumerate(done, 1)}
    text = soak_page.report(json.loads(json.dumps(soaks)), 60, 4)
    assert "7 injections (3 of seed 1, 4 of seed 2), 4 of which ended an attempt" in text
    assert "| kill rank | 7 |" in text and "- seed 2, piece 2: TimeoutError: no step" in text
    assert "Effective time: 100.0% of 18 s" in text
