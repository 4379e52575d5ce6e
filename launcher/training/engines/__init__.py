"""The engines, FSDP2 and DeepSpeed, behind one protocol."""

from __future__ import annotations

from typing import Any

from launcher.planner.plan import Plan
from launcher.tasks.task import Task
from launcher.training.engines.engine import Engine
from launcher.training.engines.fsdp import FsdpEngine


def build(plan: Plan, task: Task, config: Any, ds_config: dict[str, Any]) -> Engine:
    """The plan's engine with its model loaded. `ds_config` is the rendered configuration, for DeepSpeed
    alone."""
    if plan.engine == "fsdp":
        return FsdpEngine(plan, task, config)
    from launcher.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(plan, task, config, ds_config)
