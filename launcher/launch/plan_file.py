"""The file plan.json with a copy next to it, by which changes by hand are noticed.

A run must follow the plan that was decided and recorded: an edit of plan.json would appear in no event, and
would escape all that `launcher resume --set` refuses.
"""

from __future__ import annotations

import json

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.changes import changes
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically

COPY = ".plan.json"


def write_plan(run: RunDirectory, plan: Plan) -> None:
    """Write the copy, then the plan. The copy also holds the plan before, so that after a crash between the two
    either plan is accepted."""
    before = json.loads(Plan.read(run.plan_file).to_json()) if run.plan_file.exists() else None
    content = {"plan": json.loads(plan.to_json()), "before": before}
    write_atomically(run.path / COPY, json.dumps(content) + "\n")
    write_atomically(run.plan_file, plan.to_json())


def read_plan(run: RunDirectory) -> Plan:
    """Return the plan of a run to be resumed.

    Raises ConfigurationError with every key that was changed by hand, the value that launcher wrote, and how to
    proceed. The plan of an older run without a copy is accepted as it is.
    """
    plan = Plan.read(run.plan_file)
    written = _written(run)
    if not written or any(not changes(known, plan) for known in written):
        return plan
    edits = changes(written[0], plan)
    problems = [
        Problem(f"plan.json: {change.key}", change.after, f"launcher wrote {change.before!r}")
        for change in edits
    ]
    way = (
        "put it back, and change it by `launcher resume RUN --set KEY=VALUE`, which says what may change, "
        "and records it"
    )
    raise ConfigurationError(problems, f"{run.plan_file} was changed by hand since launcher wrote it; {way}")


def _written(run: RunDirectory) -> list[Plan]:
    """Return the plan that launcher wrote last, and the one before it, as far as they are known."""
    try:
        content = read_json(run.path / COPY)
        return [Plan.model_validate(content[key]) for key in ("plan", "before") if content[key] is not None]
    except (OSError, ValueError, KeyError, TypeError):
        return []
