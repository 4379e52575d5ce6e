"""Trace a plan's model on its task."""

from __future__ import annotations

from typing import Any

import torch

from launcher.errors import ConfigurationError, Problem
from launcher.planning.footprint.program import Batch, Setting
from launcher.planning.plan import Plan
from launcher.training import pretrained, tasks
from launcher.training.precision import DTYPES
from launcher.training.tracing.program import Traced


def trace(plan: Plan) -> Traced:
    """What the planner asks for where it goes by the model's real class; built once for all plans that differ in what an engine does.

    Raises ConfigurationError for a plan with an adapter, and for a model that is not there, that cannot do the task, or that has no
    repeated layers.
    """
    if plan.model.adapter is not None:
        reason = "a trace does not know adapters; leave it out, and the formulas say what they know"
        raise ConfigurationError(Problem("--trace", plan.model.name, reason))
    key = (plan.model.model_dump_json(), plan.task, plan.attention, plan.layout, plan.head, plan.precision, plan.data.problem)
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
    task = tasks.unbound(plan, None if plan.data.problem == "regression" else ["0", "1"])
    task.configure(config)
    pretrained.model_class(task.auto_class, config, plan)
    padded = classified if plan.task == "sequence-classification" else causal_padded
    make_batch, options = causal if task.padding_free else padded, {"trust_remote_code": plan.model.trust_remote_code}
    return Traced(config, task.auto_class, task.forward, make_batch, DTYPES[plan.precision], **options)


def causal(setting: Setting, config: Any) -> dict[str, Any]:
    """Samples one after another in one row, as the causal task collates them."""
    lengths = torch.tensor(setting.batch.lengths)
    num_tokens = int(lengths.sum())
    return {
        "input_ids": torch.zeros(1, num_tokens, dtype=torch.int64),
        "position_ids": torch.cat([torch.arange(length) for length in setting.batch.lengths])[None],
        "targets": torch.zeros(num_tokens, dtype=torch.int64),
        "cu_seq_lens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        "max_length": max(setting.batch.lengths),
        "lengths": list(setting.batch.lengths),
    }


def causal_padded(setting: Setting, config: Any) -> dict[str, Any]:
    """Samples padded to the longest, as the causal task collates those that cannot be joined."""
    batch: Batch = setting.batch
    shape = (len(batch.lengths), max(batch.lengths))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if len(set(batch.lengths)) > 1:
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
    return inputs | {"targets": torch.zeros(shape[0] * shape[1], dtype=torch.int64), "lengths": list(batch.lengths)}


def classified(setting: Setting, config: Any) -> dict[str, Any]:
    """Samples padded to the longest, as the classification task collates them."""
    batch: Batch = setting.batch
    shape = (len(batch.lengths), max(batch.lengths))
    inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    return inputs | {"labels": torch.zeros(shape[0], dtype=torch.int64), "weights": torch.ones(shape[0])}


__all__ = ["causal", "classified", "trace"]
