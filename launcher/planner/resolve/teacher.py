"""Decide which checkpoint of a run teaches, where a job names a run as its teacher."""

from __future__ import annotations

from pathlib import Path

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.planner.decider import Decider
from launcher.planner.plan import Plan
from launcher.runs.checkpoints import Stored, list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import best
from launcher.tasks.distillation import Distillation
from launcher.tasks.mixed import measured

_KEY = "distillation.checkpoint"


def settle(decider: Decider) -> Distillation | None:
    """Return the job's section `distillation`; of a run as the teacher with the step that teaches. Problems go
    to the decider."""
    distillation = decider.job.distillation
    if distillation is None:
        return None
    run = RunDirectory(Path(distillation.teacher).parent)
    if Path(distillation.teacher).name != "model" or not run.plan_file.is_file():
        if distillation.checkpoint is not None:
            decider.refuse(_KEY, distillation.checkpoint, "the teacher is no run, and has none; leave it out")
        return distillation
    try:
        plan = Plan.read(run.plan_file)
    except ConfigurationError as error:
        decider.refuse("distillation.teacher", str(run.path), error.problems[0].reason)
        return distillation
    whole = [stored for stored in list_checkpoints(run) if not stored.problems]
    steps = [stored.step for stored in whole]
    if plan.script or plan.task != decider.job.model.task:
        does = "runs a script of its own" if plan.script else f"is a run of {plan.task}"
        reason = f"{does}, and what learns from it does {decider.job.model.task}"
        decider.refuse("distillation.teacher", str(run.path), reason)
    elif not whole:
        decider.refuse("distillation.teacher", str(run.path), "has no whole checkpoint yet")
    elif distillation.checkpoint is None:
        step, reason = _chosen(plan, whole)
        decider.decide(_KEY, step, reason)
        return distillation.model_copy(update={"checkpoint": step})
    elif distillation.checkpoint not in steps:
        has = ", ".join(map(str, steps[-6:]))
        decider.refuse(_KEY, distillation.checkpoint, f"{run.path.name} has no such checkpoint; it has {has}")
    return distillation


def _chosen(plan: Plan, whole: list[Stored]) -> tuple[int, str]:
    """Return a step of a run, and why it is taken."""
    metric = plan.checkpoint.metric
    ranked = best(whole, 1, metric, measured(tasks.unprepared(plan)).get(metric, "lower"))
    if plan.checkpoint.keep_best and ranked:
        return ranked[0].step, f"the best {metric} of those that the teacher's run kept"
    return whole[-1].step, "the newest of the teacher's run"
