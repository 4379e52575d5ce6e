"""Automatic resumption with smaller micro-batches after a rank ran out of memory late in a run."""

from __future__ import annotations

from typing import Any

from launcher.errors import OutOfMemoryError
from launcher.launch import local
from launcher.launch.attempt_failure import OF_AGENT
from launcher.launch.run_setup import reopen
from launcher.launch.screen import Watcher
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import divisors
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.runs.status import last_step, newest_checkpoint


def run_with_cuts(run: RunDirectory, plan: Plan, watcher: Watcher, stop_at: int | None = None) -> int:
    """Run an attempt on this machine, and further ones with smaller micro-batches while memory is short.

    Returns the exit code of the last attempt. Raises what `local.run` raises.
    """
    code = local.run(run, plan, watcher, stop_at)
    while code == OutOfMemoryError.exit_code and (smaller := cut(run)):
        plan, reason = smaller
        watcher.say(reason)
        code = local.run(run, plan, watcher, stop_at)
    return code


def cut(run: RunDirectory, here: bool = True) -> tuple[Plan, str] | None:
    """Halve the micro-batch, write the plan into the run, and return it with a line for people.

    The global batch stays the same. Returns None if no rank of the last attempt ran out of memory (it may have
    been the agent), if resuming would lose steps (the last one was not saved, as after the kernel's OOM killer),
    if it was the very first step, or if a micro-batch is one sample. Then the failure's own advice applies.
    """
    attempt, plan = run.last_attempt(), Plan.read(run.plan_file)
    failure = _failure(run, attempt)
    step, micro = last_step(run), plan.batch.micro_batch_size
    newest = newest_checkpoint(run)
    if (
        failure.get("failure_class") != OutOfMemoryError.failure_class
        or failure["rank"] == OF_AGENT
        or plan.script
        or micro == 1
        or newest is None
    ):
        return None
    if step == 0 or newest.name != run.checkpoint(step).name:
        return None
    half = max(size for size in divisors(micro) if 2 * size <= micro)
    smaller = reopen(run, [f"batch.micro_batch_size={half}"], None, here)
    who = f"rank {failure['rank']} on {failure['host']} ran out of memory after step {step}"
    text = (
        f"{who}, whose state is saved: going on there by itself, with passes of {half} "
        f"samples in place of {micro}"
    )
    event(run.events_file, "cut", step=step, before=micro, after=half, text=text)
    return smaller, text


def _failure(run: RunDirectory, attempt: int) -> dict[str, Any]:
    try:
        content = read_json(run.attempt(attempt) / "failure.json")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
