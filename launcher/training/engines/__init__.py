"""The engines, FSDP2 and DeepSpeed, behind one protocol."""

from __future__ import annotations

from typing import Any

from launcher.planner.plan import Plan
from launcher.tasks.task import Task
from launcher.training.engines.engine import Engine
from launcher.training.engines.fsdp import FsdpEngine


def build(plan: Plan, task: Task, config: Any, ds_config: dict[str, Any], trains: bool = True) -> Engine:
    """Return the plan's engine with its model loaded. Called by all ranks together.

    `ds_config` is the rendered configuration; only DeepSpeed uses it. Without `trains`, FSDP has no optimizer.
    ZeRO always has one, because its optimizer owns the fp32 shards.
    """
    if plan.engine == "fsdp":
        engine: Engine = FsdpEngine(plan, task, config, trains)
    else:
        from launcher.training.engines.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(plan, task, config, ds_config)
    engine.load()
    return engine
