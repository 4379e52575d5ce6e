"""The content of a report about one run, read through the modules that know its files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.metrics import told
from launcher.plain_files import read_json, read_text
from launcher.redaction import redact, redact_all
from launcher.runs import events, samples
from launcher.runs.attempts import Attempt, attempts
from launcher.runs.checkpoints import Stored, list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.series import Series
from launcher.runs.status import Status, read_status
from launcher.runs.totals import Totals

MOST_SAMPLE_STEPS = 10
"""The number of evaluations whose samples are shown: the first, the last, and evenly spaced ones between."""
MOST_SAMPLE_ROWS = 12
MOST_TEXT = 600
"""The most characters of a sample's text or prediction."""
_MOST_JOB_TEXT = 20_000
_NO_SETTINGS = ("decisions", "refused", "format")


@dataclass(frozen=True)
class RunContent:
    """The content for one run. Texts are as in its files, with secrets redacted; the page escapes them."""

    status: Status
    plan: dict[str, Any]
    """The content of plan.json; empty if it cannot be read."""
    job: str
    series: Series
    last: dict[str, dict[str, Any]]
    """The newest event of each name."""
    attempts: list[Attempt]
    data: list[dict[str, Any]]
    """The event `prepared` of each role: row counts, with files and examples."""
    samples: list[dict[str, Any]]
    """The `input` of each shown row, and its `answers`: (step, text)."""
    measured: list[dict[str, Any]]
    """The results of each `launcher evaluate`: `on`, `step`, and `metrics` as (name, before, after, change)."""
    checkpoints: list[Stored]
    commands: dict[str, Any]
    """The command, directory and environment variables of the last attempt."""
    identity: dict[str, str]
    """The names and digests that identify the run."""

    @property
    def name(self) -> str:
        """Return the name of the run's directory."""
        return self.status.name

    @property
    def settings(self) -> dict[str, Any]:
        """Return every value of the plan by its dotted key."""
        return dict(_flat("", {key: value for key, value in self.plan.items() if key not in _NO_SETTINGS}))

    @property
    def unit(self) -> str:
        """Return the unit of its rate: token, image and so on."""
        return str(self.last.get("training", {}).get("unit", "token"))

    @property
    def seconds(self) -> float:
        """Return the wall time of all its attempts."""
        return self.status.seconds


def read_run(run: RunDirectory, series: Series | None = None) -> RunContent:
    """Return the content of a run's directory; missing or damaged parts are empty. Raises OSError if its events
    or metrics cannot be read.

    A repeated reader passes the `series` that it has, so that only new lines of the metrics are read.
    """
    totals = Totals(run)
    status = read_status(run, totals)
    # Events and failures were redacted when written; a job, a sample or a command from elsewhere was not.
    records = list(events.read(run.events_file))
    series = Series.read(run) if series is None else series.refresh()
    prepared = {str(record.get("role")): record for record in records if record.get("event") == "prepared"}
    last_step_at = series.columns["time"][-1] if series.steps else math.nan
    return RunContent(
        status=status,
        plan=redact_all(_plan(run)),
        job=redact(_text(run)),
        series=series,
        last=totals.last,
        attempts=attempts(records, last_step_at if math.isfinite(last_step_at) else None),
        data=list(prepared.values()),
        samples=redact_all(_samples(run)),
        measured=redact_all(_measured(run)),
        # Listing checkpoints would create the identity of a run that has none, and a report writes nothing.
        checkpoints=list_checkpoints(run) if run.run_id_file.exists() else [],
        commands=redact_all(_command(run)),
        identity=_identity(run, totals, prepared),
    )


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def _plan(run: RunDirectory) -> dict[str, Any]:
    """Return plan.json without values of the wrong type."""
    kinds: dict[str, type] = {"decisions": list, "refused": list, "model": dict, "batch": dict}
    content = _json(run.plan_file)
    return {key: value for key, value in content.items() if isinstance(value, kinds.get(key, object))}


def _command(run: RunDirectory) -> dict[str, Any]:
    """Return command.json of the last attempt, with its parts as texts."""
    content = _json(run.attempt(run.last_attempt()) / "command.json")
    command, variables = content.get("command"), content.get("environment")
    return {
        "command": [str(word) for word in command] if isinstance(command, list) else [],
        "directory": str(content.get("directory", "")),
        "environment": {str(key): str(value) for key, value in variables.items()}
        if isinstance(variables, dict)
        else {},
    }


def _text(run: RunDirectory) -> str:
    try:
        text = read_text(run.job_file)
    except (OSError, ValueError):
        return ""
    return text if len(text) <= _MOST_JOB_TEXT else f"{text[:_MOST_JOB_TEXT]}\n... (cut)"


def _measured(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the model's metrics before and after training, for each set of rows it was evaluated on."""
    measured = []
    for file in sorted((run.path / "evaluations").glob("evaluate-step-*.json")):
        content = _json(file)
        both = [content.get("before"), content.get("after")]
        if not isinstance(both[0], dict) or not isinstance(both[1], dict):
            continue
        details = content.get("details")
        after = details.get("after") if isinstance(details, dict) else None
        known = after if isinstance(after, dict) else {}
        pairs = [(told(str(name), known), both[0].get(name), value) for name, value in both[1].items()]
        metrics = [
            (name, before, after, after - before)
            for name, before, after in pairs
            if isinstance(before, (int, float)) and isinstance(after, (int, float))
        ]
        on = Path(str(content.get("on") or "held-out rows of the job")).name
        measured.append({"on": on, "step": content.get("step"), "metrics": metrics})
    return measured


def _samples(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the sampled rows, each with the model's predictions in the course of training."""
    steps = samples.steps(run)
    if len(steps) > MOST_SAMPLE_STEPS:
        last = len(steps) - 1
        steps = [steps[last * place // (MOST_SAMPLE_STEPS - 1)] for place in range(MOST_SAMPLE_STEPS)]
    rows: dict[Any, dict[str, Any]] = {}
    for step in steps:
        for record in samples.read(run, step):
            row = rows.setdefault(
                str(record.get("row")), {"input": samples.told(record.get("input"), MOST_TEXT), "answers": []}
            )
            row["answers"].append((step, samples.told(record.get("answer"), MOST_TEXT)))
    return list(rows.values())[:MOST_SAMPLE_ROWS]


def _identity(run: RunDirectory, totals: Totals, prepared: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the run's identity, the digests of its plan and data, and the code kept with it."""
    named = {"plan": str(totals.last.get("planned", {}).get("digest", ""))}
    with contextlib.suppress(OSError):
        named["run"] = read_text(run.run_id_file).strip()
    for role, record in prepared.items():
        named[f"{role} data, files"] = str(record.get("source_hash", ""))
        named[f"{role} data, samples"] = str(record.get("samples_hash", ""))
    with contextlib.suppress(OSError):
        named["code kept with the run"] = ", ".join(
            sorted(path.name for path in (run.path / "code").iterdir())
        )
    return {name: digest for name, digest in named.items() if digest}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each value in nested mappings with its dotted key; lists count as values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value not in (None, {}, [], ""):
        yield prefix, value
