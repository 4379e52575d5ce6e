"""What a look at some rows says of a job before anything is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.data import formats
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.dataset.findings import Findings
from launcher.planner.dataset.usable_rows import look_at_rows
from launcher.planner.search import plan_job

TEXTS = [{"text": f"row {number}", "label": ("x", "y")[number % 2]} for number in range(40)]


def look(
    folder: Path,
    rows: list[dict[str, Any]] | str,
    task: str = "causal-lm",
    name: str = "rows.jsonl",
    **data: Any,
) -> Findings:
    return look_at_rows(job(folder, rows, task, name, **data))


def job(folder: Path, rows: list[dict[str, Any]] | str, task: str, name: str, **data: Any) -> Job:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    columns = data or {"text": "text"}
    content = {
        "name": "a",
        "model": {"name": "hub/none", "task": task},
        "data": {"train": {"path": str(path)}, **columns},
        "cluster": {"gpus_per_node": 0},
    }
    return Job.model_validate(content)


def test_rows_that_are_as_they_should_be_say_nothing(tmp_path: Path) -> None:
    assert look(tmp_path, TEXTS) == Findings()
    assert look(tmp_path, TEXTS, "sequence-classification", text="text", label="label") == Findings()


WRONG = {
    "causal-lm": {"prompt": "qestion", "completion": "text"},
    "masked-lm": {"text": "txt"},
    "sequence-classification": {"text": "text", "label": "labl"},
    "token-classification": {"words": "wrds", "tags": "label"},
    "question-answering": {"question": "text", "context": "contxt"},
    "sequence-to-sequence": {"source": "text", "target": "label2"},
    "image-classification": {"image": "file_nme"},
    "audio-classification": {"audio": "sond"},
    "speech-recognition": {"audio": "sond"},
    "image-to-text": {"image": "file_nme"},
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_wrong_column_is_a_problem_with_every_task(task: str, tmp_path: Path) -> None:
    findings = look(tmp_path, TEXTS, task, **WRONG[task])
    [problem] = findings.problems
    assert problem.key == "data.train" and problem.value == str(tmp_path / "rows.jsonl")
    assert problem.reason.startswith("none of 40 rows can be used, one of them for: missing key: no ")
    with pytest.raises(ConfigurationError, match="none of 40 rows can be used"):
        plan_job(job(tmp_path, TEXTS, task, "rows.jsonl", **WRONG[task]))


def test_a_table_without_a_header_is_a_problem(tmp_path: Path) -> None:
    table = "".join(f"{row['label']}\t{row['text']}\n" for row in TEXTS)
    [problem] = look(tmp_path, table, name="rows.tsv").problems
    assert "has no column 'text'; it has 'x', 'row 0'" in problem.reason
    assert "name columns by number from 0" in problem.reason


def test_a_file_without_rows_is_a_problem(tmp_path: Path) -> None:
    assert look(tmp_path, "").problems == (
        Problem("data.train", str(tmp_path / "rows.jsonl"), "has no rows"),
    )


@pytest.mark.parametrize(
    ("policy", "num_bad", "stops"),
    [
        ("drop-few", 3, False),
        ("drop-few", 21, True),
        ("drop", 39, False),
        ("drop", 40, True),
        ("refuse", 1, True),
    ],
)
def test_some_bad_rows_stop_a_job_as_its_policy_would(
    policy: str, num_bad: int, stops: bool, tmp_path: Path
) -> None:
    rows = [{"text": ""}] * num_bad + TEXTS[num_bad:]
    findings = look(tmp_path, rows, text="text", unusable=policy)
    [told] = findings.problems if stops else findings.remarks
    number = "none of 40 rows can" if num_bad == 40 else f"{num_bad} of 40 rows cannot"
    assert told.reason == f"{number} be used, one of them for: empty: 'text' has no text"
    assert bool(findings.problems) == stops


def test_of_a_large_file_a_share_is_known(tmp_path: Path) -> None:
    """Most of the rows that were looked at: there may be others, so that nobody is stopped."""
    rows = [{"text": "" if number % 4 else "a"} for number in range(2000)]
    findings = look(tmp_path, rows)
    [remark] = findings.remarks
    assert not findings.problems and "rows that were looked at cannot be used" in remark.reason


def test_a_text_in_the_place_of_the_label_is_doubted(tmp_path: Path) -> None:
    swapped = {"text": "label", "label": "text"}
    [remark] = look(tmp_path, TEXTS, "sequence-classification", **swapped).remarks
    assert re.fullmatch(
        r"each of 40 rows has a class of its own, as 'row \d+'; is the label in another column than 'text'\?",
        remark.reason,
    )
    assert look(tmp_path, TEXTS[:9], "sequence-classification", **swapped) == Findings()
    several = look(tmp_path, TEXTS, "sequence-classification", problem="multi-label", **swapped)
    assert several == Findings(), "a row may have a class of its own beside those it shares"


def test_a_file_that_is_read_as_a_whole_is_not_looked_at_where_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.Json, "most_bytes", 10)
    findings = look(tmp_path, json.dumps(TEXTS), name="rows.json")
    assert not findings.problems and findings.remarks[0].reason.startswith("its rows were not looked at: ")


def test_data_elsewhere_are_not_looked_at(tmp_path: Path) -> None:
    there = job(tmp_path, TEXTS, "causal-lm", "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    assert look_at_rows(there) == Findings()
    on_the_hub = there.data.model_copy(update={"train": there.data.train.model_copy(update={"path": None})})
    assert look_at_rows(there.model_copy(update={"data": on_the_hub})) == Findings()
