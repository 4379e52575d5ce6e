"""Run directories to report of: the files that ranks and launchers would have left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.runs import samples
from launcher.runs.layout import RunDirectory
from tests.unit.checkpoint_files import make_run, write_checkpoint
from tests.unit.long_run import write_events
from tests.unit.test_scheduling_local import plan

BEGAN = 1_760_000_000.0
HOSTILE = "</script><script>window.stolen=3</script><img src=x onerror=window.stolen=4>\"'`{{7*7}} $$x^2$$ \u2028 &amp;"
"""A text that runs where it is put into a page as it stands."""


def step_record(step: int, learning_rate: float = 1e-3, **changed: Any) -> dict[str, Any]:
    record = {
        "kind": "train",
        "step": step,
        "loss": 0.5 + 4 * math.exp(-step * learning_rate * 40) + 0.05 * math.sin(step),
        "grad_norm": 1 + 0.5 * math.cos(step),
        "learning_rate": learning_rate * (1 - step / 400),
        "num_tokens": 4096,
        "tokens_per_second": 20_000.0 + 100 * (step % 7),
        "peak_memory_bytes": 2**31 + step * 2**20,
        "time": BEGAN + step,
    }
    return record | changed


def write_metrics(run: RunDirectory, records: list[dict[str, Any]]) -> None:
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def a_run(
    path: Path, learning_rate: float = 1e-3, text: str = "the reason", num_steps: int = 200
) -> RunDirectory:
    """A run of two attempts: the first fails at half of its steps, having saved some before; the second goes on
    from there. `text` stands wherever a text of a run's files may."""
    run = make_run(path)
    run.plan_file.write_text(plan(training__learning_rate=learning_rate).to_json(), encoding="utf-8")
    content = json.loads(run.plan_file.read_text(encoding="utf-8"))
    content["decisions"] = [{"key": "parallel.engine", "value": "fsdp", "reason": text}]
    content["refused"] = [{"what": text, "why": "slower", "reason": text}]
    content["model"]["name"] = f"models/{text}" if text == HOSTILE else "models/tiny"
    run.plan_file.write_text(json.dumps(content), encoding="utf-8")
    run.job_file.write_text(f"name: a job  # {text}\n", encoding="utf-8")
    run.attempt(2).mkdir(parents=True)
    command = {
        "command": ["python", text],
        "directory": text,
        "environment": {"A": text, "HF_TOKEN": "hf_" + "a" * 20},
    }
    (run.attempt(2) / "command.json").write_text(json.dumps(command), encoding="utf-8")
    half, back = num_steps // 2, num_steps // 4
    for first, last, attempt in ((1, half, 1), (back + 1, num_steps, 2)):
        write_events(run, events_of(first, last, attempt, text))
        records = []
        for step in range(first, last + 1):
            records.append(step_record(step, learning_rate))
            if step % 20 == 0:
                metrics = {"loss": 3 / step, f"accuracy{'<b>' * (text == HOSTILE)}": 1 - 1 / step}
                records.append({"kind": "evaluation", "step": step, "metrics": metrics, "time": BEGAN + step})
                rows = [
                    {"row": row, "input": {"text": f"{text} {row}"}, "answer": f"{text} after {step}"}
                    for row in (0, 9)
                ]
                samples.write(run, step, rows)
        write_metrics(run, records)
    for step in (back, num_steps):
        write_checkpoint(run, step, {"loss": 1.0})
    run.finished_file.touch()
    return run


def events_of(first: int, last: int, attempt: int, text: str) -> list[dict[str, Any]]:
    now = BEGAN + 3600 * (attempt - 1)
    prepared = {
        "event": "prepared", "role": "train", "rows_read": 1000, "rows_used": 900, "dropped": {text: 60, "too long": 40},
        "num_cut": 3, "num_tokens": 90_000, "num_supervised": 40_000, "longest": 120, "num_items": 900,
        "files": [{"path": text, "bytes": 12345}],
        "examples": [{"file": text, "line": 3, "reason": text, "detail": text, "cut": False}],
        "lengths": {"median": 40.0, "mean": 44.1, "bins": [[0, 50, 600], [50, 100, 280], [100, 150, 20]]},
        "balance": {"classes": {text: 500, "other": 400}}, "source_hash": "0123abcd",
    }  # fmt: skip
    told: list[dict[str, Any]] = [
        {"event": "started", "attempt": attempt, "world_size": 2, "nodes": [text]},
        prepared,
        {"event": "noted", "text": text},
        {
            "event": "training", "first_step": first - 1, "total_steps": last, "num_parameters": 7_000_000,
            "device": f"gpu {text}", "versions": {"torch": "2.13", "launcher": text},
        },
        {
            "event": "compared",
            "measured": {"tokens_per_second": 19_500.0, "phases": {"loading": 2**30, "steady step": 2**31}},
            "expected": {"memory_bytes": 2**31, "tokens_per_second": 21_000.0, "phases": {"loading": 2**30, "steady step": 2**31}},
        },
        {"event": "saved", "step": last // 2, "seconds": 1.0, "bytes": 10},
        {"event": "evaluated", "step": last, "metrics": {"loss": 3 / last, "accuracy": 0.9}},
    ]  # fmt: skip
    if attempt == 1:
        told.append({"event": "failed", "failure": {"failure_class": "out-of-memory", "cause": text}})
    else:
        told.append({"event": "finished", "step": last, "metrics": {"loss": 3 / last}})
    return [{"time": now + 30 * place, **one} for place, one in enumerate(told)]


def a_sweep(path: Path) -> Path:
    """A sweep of four points over a rate and a schedule; one more has not begun."""
    points = [
        [f"training.learning_rate={rate}", f"training.schedule={name}"]
        for rate in (1e-4, 1e-2)
        for name in ("linear", "cosine")
    ]
    path.mkdir(parents=True)
    described = {
        "format": 1,
        "points": [*points, ["training.learning_rate=1"]],
        "metric": "accuracy",
        "better": "higher",
        "nproc": None,
    }
    (path / "sweep.json").write_text(json.dumps(described), encoding="utf-8")
    for number in range(len(points)):
        a_run(
            path / "points" / f"{number:03d}",
            learning_rate=float(points[number][0].partition("=")[2]),
            num_steps=40 + 20 * number,
        )
    return path


def write_report(file: Path, *runs: Path) -> Path:
    """Write a report by the command, as people do."""
    result = CliRunner().invoke(
        app, ["report", *map(str, runs), "--output", str(file)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return file
