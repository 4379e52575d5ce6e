"""Compute the task's metrics over held-out data, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed

from launcher.planner.axes import DATA_AXES
from launcher.planner.plan import BatchPlan, Plan
from launcher.runs.places import here
from launcher.tasks.task import Draws, Evaluator, Sample, Task
from launcher.training import exchange
from launcher.training.data.ahead import Loader
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine

Report = Callable[[int, int], None]


class Interrupted(Exception):
    """The evaluation was given up on request; there are no metrics."""


def evaluate(
    engine: Engine,
    task: Task,
    dataset: Dataset,
    plan: Plan,
    report: Report = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
    leaving: Callable[[], bool] = lambda: False,
    details: Callable[[dict[str, Any]], object] = lambda details: None,
    evaluator: Evaluator | None = None,
) -> dict[str, float]:
    """Metrics over every sample of `dataset`, equal on all ranks.

    `stopping` is asked before every batch, on all ranks, and must answer the same on each; a yes raises
    Interrupted. `leaving` is asked before every token that is written, on each rank by itself; a yes ends
    the writing of this rank, where `stopping` will be a yes too. `details` is called with what no single
    number shows. `evaluator`, where it is given, takes the place of the task's own.
    """
    mesh, size = plan.mesh, plan.batch.data_parallel_size
    data_rank = mesh.data_rank(distributed.get_rank())
    micro = plan.batch.micro_batch_size
    cut = BatchPlan(
        global_batch_size=micro * size, micro_batch_size=micro, accumulation_steps=1, data_parallel_size=size
    )
    batches = Batches(dataset, Order(0, dataset.num_items, shuffle=False), cut, data_rank, dataset.num_items)
    loader = Loader(task, batches, plan, lambda step: Draws(plan.training.seed, 0))
    evaluator = evaluator or task.evaluator()
    here.at("evaluating", total=batches.num_steps)
    for step in range(batches.num_steps):
        if stopping():
            raise Interrupted
        items = batches.step(step).micro_batches[0]
        batch = loader.batch(step, 0, items)
        output = engine.evaluate(to_device(batch, plan.mesh.device))
        if task.generates:
            output = output._replace(generated=written(engine, task, items, plan.mesh.device, leaving))
        evaluator.update(output, batch)
        here.moved(step + 1)
        report(step + 1, batches.num_steps)
    if task.generates and stopping():
        raise Interrupted  # what was written last may have been cut short
    here.at("measuring")
    states = exchange.all_gather_arrays(evaluator.state())
    # Ranks that share their samples have seen the same: the first of them stands for all.
    seen = [state for rank, state in enumerate(states) if mesh.counts(rank, DATA_AXES)]
    leads = distributed.get_rank() == 0
    metrics = evaluator.compute(seen) if leads else {}
    told = evaluator.details() if leads else {}
    metrics, told = exchange.from_first([{name: float(value) for name, value in metrics.items()}, told])
    details(told)
    return dict(metrics)


def written(
    engine: Engine,
    task: Task,
    items: Sequence[Sequence[Sample]],
    device: str,
    leaving: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Return what the model writes to a micro-batch's samples, int64 [samples, n], in the order of
    `collate`.

    Called by all ranks together. `leaving` is asked before every token, on each rank by itself; a yes cuts
    this rank's texts short.
    """

    def each_token() -> bool:
        here.moved(done)
        return leaving()

    done = here.done
    prompts = task.prompts([sample for item in items for sample in item])
    return engine.generate(to_device(prompts, device), task.generation, each_token)
