"""One module of the training half, run supervised in a scratch run directory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from launcher.errors import Stopped, by_failure_class
from launcher.launch import local
from launcher.launch.screen import Watcher
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.render import deepspeed
from launcher.runs import failure as failures
from launcher.runs import prepared
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory, write_atomically


def ask(plan: Plan, module: str, request: dict[str, Any], answer: str, watcher: Watcher) -> dict[str, Any]:
    """Return the content of the file `answer`, which `module` writes from request.json. Raises the failure's own
    class if the ranks failed, and Stopped after a stop request."""
    with tempfile.TemporaryDirectory(prefix="launcher-") as directory:
        scratch = RunDirectory(Path(directory))
        write_atomically(scratch.plan_file, plan.to_json())
        if plan.engine == "deepspeed":
            scratch.rendered.mkdir()
            write_atomically(scratch.rendered / "ds_config.json", json.dumps(deepspeed.config(plan)) + "\n")
        write_atomically(scratch.request_file, json.dumps(request))
        code = local.run(scratch, plan, watcher, entry=module)
        if code != 0:
            _raise(scratch, code)
        for record in read(scratch.events_file):
            for line in prepared.lines(record):
                watcher.say(line)
        result: dict[str, Any] = read_json(scratch.path / answer)
        return result


def _raise(scratch: RunDirectory, code: int) -> None:
    if code == Stopped.exit_code:
        stops = [record for record in read(scratch.events_file) if record.get("event") == "stopped"]
        message = next((record["line"] for record in reversed(stops) if "line" in record), None)
        raise Stopped(message or "stopped before anything was done; the same command begins anew")
    failure = failures.read(scratch.attempt(scratch.last_attempt()) / "failure.json")
    if failure is None:
        raise KeyboardInterrupt
    where = f"rank {failure.rank}: " if failure.rank > 0 else ""
    raise by_failure_class(failure.failure_class)(f"{where}{failure.cause}")
