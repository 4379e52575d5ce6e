"""What is said of the rows before the first step, kept in a run's status, and put in its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cli.display import summary
from launcher.cli.progress import notice
from launcher.cli.status import describe
from launcher.runs import prepared
from launcher.runs.events import append, event
from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status

CUT = {"file": "a.jsonl", "line": 2, "reason": "too long", "detail": "cut to 64 tokens", "cut": True}
EMPTY = {"file": "b.jsonl", "line": 9, "reason": "empty", "detail": "", "cut": False}


def record(dropped: dict[str, int], num_rows: int = 1000, **more: Any) -> dict[str, Any]:
    used = num_rows - sum(dropped.values())
    made = {
        "event": "prepared",
        "role": "train",
        "rows_read": num_rows,
        "rows_used": used,
        "dropped": dropped,
        "num_cut": 0,
    }
    return (
        made
        | {"num_tokens": 12345, "num_items": used, "fill": None, "cached": False, "examples": [CUT, EMPTY]}
        | more
    )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (record({}), "train: 1,000 of 1,000 rows used, 12,345 tokens"),
        (
            record({"empty": 4, "too long": 8}, num_cut=3),
            "train: 988 of 1,000 rows used, 12 dropped (8 too long, 4 empty), 3 cut, 12,345 tokens",
        ),
        (
            record({}, num_items=7, fill=0.995),
            "train: 1,000 of 1,000 rows used, 12,345 tokens, 7 packs 99.5% full",
        ),
    ],
)
def test_rows_used_dropped_and_cut_are_one_line(made: dict[str, Any], said: str) -> None:
    assert prepared.line(made) == said


def test_more_than_one_row_of_a_hundred_is_a_warning_with_the_first() -> None:
    assert prepared.warning(record({"empty": 10})) is None
    warned = "warning: train: 11 of 1,000 rows (1.1%) are dropped; the first is b.jsonl, line 9: empty"
    assert prepared.warning(record({"empty": 11})) == warned, "a row that was cut is not dropped"
    assert notice(record({"empty": 11})) == f"{prepared.line(record({'empty': 11}))}\n{warned}"
    assert prepared.lines({"event": "phase"}) == []


def test_status_and_summary_have_the_rows(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert read_status(run).data == {}
    for role, number in (("train", 1), ("evaluation", 0), ("train", 30)):
        append(run.events_file, record({"empty": number} if number else {}, role=role))
    status = read_status(run).to_dict()
    assert (
        status["data"]["train"]["dropped"] == {"empty": 30} and status["data"]["train"]["num_dropped"] == 30
    )
    assert status["data"]["evaluation"]["rows_used"] == 1000
    shown = describe(status)
    assert "train      970 of 1,000 rows used, 30 dropped (30 empty), 12,345 tokens" in shown
    assert "evaluation 1,000 of 1,000 rows used" in shown
    event(run.events_file, "finished", step=1, metrics={})
    assert "  rows        train: 970 of 1,000 rows used, 30 dropped (30 empty)" in summary(run, "runs/a")
