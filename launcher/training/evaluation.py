"""Compute the task's metrics over held-out data, on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import distributed

from launcher.planning.plan import BatchPlan, Plan
from launcher.runs.places import here
from launcher.training import exchange
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine
from launcher.training.tasks.task import Task

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

    `stopping` is asked before every batch, on all ranks, and must answer the same on each; a yes raises Interrupted.
    """
    rank, size = distributed.get_rank(), plan.batch.data_parallel_size
    micro = plan.batch.micro_batch_size
    cut = BatchPlan(global_batch_size=micro * size, micro_batch_size=micro, accumulation_steps=1, data_parallel_size=size)
    batches = Batches(dataset, Order(0, dataset.num_items, shuffle=False), cut, rank, dataset.num_items)
    totals = np.zeros(4)
    collected: list[tuple[np.ndarray, np.ndarray]] = []
    here.at("evaluating", total=batches.num_steps)
    for step in range(batches.num_steps):
        if stopping():
            raise Interrupted
        step_batch = batches.step(step)
        batch = task.collate(step_batch.micro_batches[0])
        output = engine.evaluate(to_device(batch, plan.mesh.device))
        share = step_batch.num_supervised / size
        router = 0.0 if output.router_loss_sum is None else float(output.router_loss_sum)
        totals += [float(output.loss_sum), float(output.num_correct), share, router]
        if output.predictions is not None:
            real = batch["weights"].numpy() > 0
            collected.append((output.predictions.cpu().numpy()[real], batch["labels"].numpy()[real]))
        here.moved(step + 1)
        report(step + 1, batches.num_steps)
    here.at("measuring")
    return _combine(task, totals, collected)


def _combine(task: Task, totals: np.ndarray, collected: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Rank 0 computes the metrics from what all ranks counted, and tells them."""
    mine = [np.concatenate(pieces) for pieces in zip(*collected, strict=True)]
    gathered = exchange.all_gather_arrays([totals, *mine])
    metrics: dict[str, float] = {}
    if distributed.get_rank() == 0:
        sums = np.sum([sums for sums, *_ in gathered], axis=0).tolist()
        named = dict(zip(("loss_sum", "num_correct", "num_supervised", "router_loss_sum"), sums, strict=True))
        parts = [part for _, *part in gathered if part]
        predictions, labels = map(np.concatenate, zip(*parts, strict=True)) if parts else (None, None)
        metrics = task.metrics(named, predictions, labels)
    return dict(exchange.from_first({name: float(value) for name, value in metrics.items()}))
