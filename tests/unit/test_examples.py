"""Ready-made jobs: each in docs/examples/ loads, and can be planned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.job.load import load, read, validate
from launcher.planner.search import plan_job

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").rglob("*.yaml"))
JOBS = sorted((ROOT / "tests" / "jobs").glob("*.yaml"))
"""What figures in docs/benchmarks come from, or will."""


CHAT = [{"role": role, "content": "word"} for role in ("user", "assistant")]
OF_ONE_WORD = {
    "relatedness": "3.5",
    "answers": {"text": ["word"], "answer_start": [0]},
    "messages": CHAT,
    "images": [],
}
"""Columns that hold no text, in a row whose text is one word."""


def stand_in(folder: Path, named: str, columns: Sequence[str]) -> Path:
    """A file of the same format with a row of these columns, or a folder, as the data lies on no other machine."""
    path = folder / Path(named).name.replace("*", "0")
    if not path.suffix:  # a folder whose files are the rows
        (path / "word").mkdir(parents=True)
        for ending in ("jpg", "wav"):
            (path / "word" / f"0.{ending}").write_bytes(b"x")
        return path
    row: dict[str, Any] = {column: OF_ONE_WORD.get(column, "word") for column in columns}
    if path.suffix == ".conll":
        path.write_text("word O\n")
        return path
    if path.suffix in (".tsv", ".csv"):
        between = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\n".join(between.join(cells) for cells in (row, row.values())) + "\n")
    else:
        path.write_text(f"{json.dumps([row] if path.suffix == '.json' else row)}\n")
    return path


@pytest.mark.parametrize("path", [*EXAMPLES, *JOBS], ids=lambda path: path.stem)
def test_an_example_loads_and_plans(path: Path, tmp_path: Path) -> None:
    content, overrides = read(path), []
    asked, problems = validate(content)
    assert asked is not None and problems == []
    columns = [str(column) for column in tasks.find(asked.model.task)(asked.data).columns]
    for role in ("train", "evaluation"):
        given = content["data"].get(role, {})
        if isinstance(given, list):
            there = [one | {"path": str(stand_in(tmp_path, one["path"], columns))} for one in given]
            overrides.append(f"data.{role}={json.dumps(there)}")
        elif named := given.get("path"):
            file = stand_in(tmp_path, named, columns)
            overrides.append(f"data.{role}.path={file}")
    job = load(path, overrides)
    plan = plan_job(job)
    assert plan.task == job.model.task
    assert plan.batch.global_batch_size == job.batch.global_batch_size
    first = path.read_text(encoding="utf-8").splitlines()[:3]
    command = f"launcher run {path.relative_to(ROOT)}"
    assert first[0].startswith("# ") and any(command in line for line in first)


def test_every_task_has_an_example() -> None:
    shown = {read(path)["model"].get("task", "causal-lm") for path in EXAMPLES}
    assert shown >= set(tasks.TASKS), f"no example of {sorted(set(tasks.TASKS) - shown)}"
