"""Trace a plan's model on its task."""

from __future__ import annotations

from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.planner.memory.program import Setting
from launcher.planner.plan import Plan
from launcher.training.model import pretrained
from launcher.training.precision import DTYPES
from launcher.training.tracing.program import Traced


def trace(plan: Plan) -> Traced:
    """Return what the planner asks for where it goes by the model's real class; built once for all plans that
    differ in what an engine does.

    Raises ConfigurationError for a plan with an adapter, and for a model that is not there, that cannot do
    the task, or that has no repeated layers.
    """
    if plan.model.adapter is not None:
        reason = "a trace does not know adapters; leave it out, and the formulas say what they know"
        raise ConfigurationError(Problem("--trace", plan.model.name, reason))
    key = (
        plan.model.model_dump_json(),
        plan.task,
        plan.attention,
        plan.layout,
        plan.head,
        plan.precision,
        plan.data.model_dump_json(),
    )
    if key not in _BUILT:
        _BUILT.clear()
        _BUILT[key] = _built(plan)
    return _BUILT[key]


_BUILT: dict[tuple[str | None, ...], Traced] = {}
"""The one that was asked for last: a search asks for many plans of one model."""


def _built(plan: Plan) -> Traced:
    # The kernel of flash-attn runs on a GPU alone; PyTorch's own keeps the same.
    here = plan.model_copy(update={"attention": "sdpa"}) if plan.attention == "flash_attention_2" else plan
    config = pretrained.read_config(here)
    task = tasks.unprepared(plan)
    task.labels = ["0", "1"] if task.needs_labels else None
    task.configure(config)
    pretrained.model_class(task.auto_class, config, plan)

    def make_batch(setting: Setting, config: Any) -> dict[str, Any]:
        """Return samples of the lengths that are planned for, as the task collates them."""
        return task.collate([[task.example(length)] for length in setting.batch.lengths])

    options = {"trust_remote_code": plan.model.trust_remote_code}
    return Traced(config, task.auto_class, task.loss, make_batch, DTYPES[plan.precision], **options)
