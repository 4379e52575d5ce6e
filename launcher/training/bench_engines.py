"""Measure what a step of each engine takes beside its computing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM

from launcher.errors import first_line
from launcher.planner.plan import Plan
from launcher.training import engines, heads
from launcher.training.bench import Report, reference_batch
from launcher.training.fresh import in_fresh_ranks
from launcher.training.model import pretrained

Steps = dict[str, tuple[tuple[Plan, dict[str, Any]], ...]]
"""By name, plans with DeepSpeed's configuration, empty for FSDP."""
_ROUNDS, _FIRST = 24, 3
"""Steps that are counted, and those before them, in which the rank's memory grows."""
_RAISED = re.compile(r"[\w.]+(Error|Exception)\b")
"""The line of a traceback that says what was raised."""


class _Reference:
    """A task that has no data."""

    auto_class = AutoModelForCausalLM
    companions: ClassVar[dict[str, Any]] = {}
    loss = staticmethod(heads.causal_lm)


def extra_seconds(
    engine: str, steps: Steps, num_ranks: int, allocator: Mapping[str, str], report: Report
) -> dict[str, tuple[float, ...]]:
    """Return the seconds, by name, that a step of each plan takes beyond the same passes without any engine,
    as rank 0 of `num_ranks` ranks of this CPU sees it.

    `allocator` is how the ranks' C library keeps memory. Nothing of an engine that does not run here; why is
    reported.
    """
    seconds = {}
    for name, both in steps.items():
        try:
            seconds[name] = tuple(in_fresh_ranks(extra, one, num_ranks, allocator) for one in both)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            raised = [line for line in str(error).splitlines() if _RAISED.match(line)]
            report(
                f"{engine} does not run here, and is left out: {' '.join(raised[-1:]) or first_line(error)}"
            )
            return {}
    return seconds


def extra(plan: Plan, ds_config: dict[str, Any]) -> float:
    """Return what a rank of a plan takes for a step beyond its passes."""
    config, batch = pretrained.read_config(plan), reference_batch(plan.data.max_length, torch.device("cpu"))
    without = _bare_seconds(config, batch)
    return _engine_seconds(plan, config, ds_config, batch) - without


def _bare_seconds(config: Any, batch: dict[str, Any]) -> float:
    model = AutoModelForCausalLM.from_config(config).train()

    def passes() -> None:
        heads.causal_lm(model, batch).loss_sum.backward()
        model.zero_grad(set_to_none=True)

    return _least(passes)


def _engine_seconds(plan: Plan, config: Any, ds_config: dict[str, Any], batch: dict[str, Any]) -> float:
    task: Any = _Reference()
    engine = engines.build(plan, task, config, ds_config)

    def step() -> None:
        engine.micro_step(batch, 1.0, True)
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-4, 1.0)

    return _least(step)


def _least(work: Callable[[], None]) -> float:
    """Seconds of the fastest round: what else a machine does only ever adds to it."""
    taken = []
    for _ in range(_FIRST + _ROUNDS):
        distributed.barrier()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken[_FIRST:])
