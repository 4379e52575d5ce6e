"""What `make gpu-check` writes of a run, by files as a run leaves them. What it measures needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import first
from tests.gpu.first import row

ROOT = Path(__file__).parents[2]
FIGURES: dict[str, Any] = {
    "tokens_per_second": 31_415.9,
    "share_of_peak": 0.4126,
    "step_seconds": 0.521,
    "seconds_to_the_first_step": 41.7,
    "measured_bytes": 21 * 2**30,
    "planned_bytes": 22.5 * 2**30,
}


def test_a_line_of_the_table() -> None:
    assert row("1B", FIGURES) == ["1B", "31,416", "41.3%", "0.52", "42", "21.00 of 22.50"]
    assert row("1B", FIGURES | {"share_of_peak": None})[2] == "unknown"


def test_what_was_left_out_has_its_reason_and_no_figures() -> None:
    line = row("3B", {"left_out": "not done in the 40 s that were left"})
    assert line == ["3B", "not done in the 40 s that were left", "", "", "", ""]
    assert len(line) == len(row("1B", FIGURES))


def test_rows_have_as_many_words_as_are_asked_for(tmp_path: Path) -> None:
    first.write_texts(tmp_path / "rows.jsonl", 5000)
    texts = [json.loads(line)["text"].split() for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum(map(len, texts)) == 5000 and max(map(len, texts)) <= 2000


@pytest.mark.very_slow
def test_a_rehearsal_goes_through_all_of_it_and_writes_nothing() -> None:
    page = ROOT / "docs" / "benchmarks" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    environment = os.environ | {"LAUNCHER_GPU_REHEARSAL": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.gpu.first"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(first.CASES) and all(" of " in line for line in lines), ended.stdout
    assert (page.read_bytes() if page.exists() else None) == before
