"""Compute the task's metrics over held-out data, on all ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import distributed

from launcher.planner.plan import BatchPlan, Plan
from launcher.runs.places import here
from launcher.tasks.task import Draws, Task
from launcher.training import exchange
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
) -> dict[str, float]:
    """Metrics over every sample of `dataset`, equal on all ranks.

    `stopping` is asked before every batch, on all ranks, and must answer the same on each; a yes raises
    Interrupted.
    """
    rank, size = distributed.get_rank(), plan.batch.data_parallel_size
    micro = plan.batch.micro_batch_size
    cut = BatchPlan(
        global_batch_size=micro * size, micro_batch_size=micro, accumulation_steps=1, data_parallel_size=size
    )
    batches = Batches(dataset, Order(0, dataset.num_items, shuffle=False), cut, rank, dataset.num_items)
    evaluator = task.evaluator()
    here.at("evaluating", total=batches.num_steps)
    for step in range(batches.num_steps):
        if stopping():
            raise Interrupted
        batch = task.collate(batches.step(step).micro_batches[0], Draws(plan.training.seed, 0))
        evaluator.update(engine.evaluate(to_device(batch, plan.mesh.device)), batch)
        here.moved(step + 1)
        report(step + 1, batches.num_steps)
    here.at("measuring")
    states = exchange.all_gather_arrays(evaluator.state())
    metrics = evaluator.compute(states) if rank == 0 else {}
    return dict(exchange.from_first({name: float(value) for name, value in metrics.items()}))
