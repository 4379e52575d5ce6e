"""One attempt at a run: from a run directory with a plan to a trained, evaluated and saved model."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.planner.plan import Plan
from launcher.runs import cache
from launcher.runs.layout import RunDirectory
from launcher.runs.places import here
from launcher.training.devices import start_process_group
from launcher.training.engines.operators import build_operators
from launcher.training.inputs import TrainingInputs, phase_report
from launcher.training.model import pretrained
from launcher.training.reporting.whereabouts import say_compiling, waited
from launcher.training.signals import StopRequest
from launcher.training.trainer import Trainer


def train(
    run: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Train until the plan is done or a stop is requested, resuming from the newest complete checkpoint.
    Called by every rank."""
    here.at("preparing")
    planned, plan = plan, pretrained.settled(plan)
    material = TrainingInputs.prepare(run, plan, stop)
    here.at("building operators")
    build_operators(plan, phase_report(run, "building operators", "operators"))
    here.at("loading")
    device = start_process_group(plan)
    waited.watch()
    if material.stream is not None:
        material.stream.compare_ranks()
    if plan.model.compile:
        cache.hold_until_the_end(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")))
        say_compiling()
    trainer = Trainer(run, plan, material, device, stop, stop_at, run.attempt(attempt))
    trainer.load()
    if plan != planned:
        now, then = (
            f"{one.layout} samples with {one.attention} attention and the {one.head} head"
            for one in (plan, planned)
        )
        why = "the model's config was not here when this was planned"
        trainer.event("noted", text=f"{why}: it takes {now}, where {then} had been planned")
    trainer.run_to_the_end()
