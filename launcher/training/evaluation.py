"""Evaluation: the task's metrics over held-out data, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from launcher.planner.axes import DATA_AXES
from launcher.planner.model.model_support import continues_alone
from launcher.planner.plan import BatchPlan, Plan
from launcher.runs.places import here
from launcher.tasks.task import Draws, Evaluator, Sample, Task
from launcher.training import exchange
from launcher.training.data.ahead import Loader
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import MixedDataset
from launcher.training.data.order import Stretch
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine
from launcher.training.model.forward import model_class_of

Report = Callable[[int, int], None]


class Interrupted(Exception):
    """The evaluation was stopped on request; there are no metrics."""


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
    """Return the metrics over every sample of `dataset`, equal on all ranks. With several sources, the
    metrics of each are added, as `ALIAS/loss`.

    `stopping` is called before every batch and must return the same on all ranks; True raises Interrupted.
    `leaving` is called before every generated token, on each rank by itself; True ends this rank's
    generation, and `stopping` must then return True too. `details` receives results that are not single
    numbers. `evaluator` replaces the task's own, if given.
    """
    parts = batches_by_source(dataset, plan)
    whole = evaluator or task.evaluator()
    each = _by_source(task, dataset, plan)
    done, total = 0, sum(batches.num_steps for batches in parts)
    here.at("evaluating", total=total)
    for number, batches in enumerate(parts):
        loader = Loader(task, batches, plan, lambda step: Draws(plan.training.seed, 0))
        for step in range(batches.num_steps):
            if stopping():
                raise Interrupted
            items = batches.step(step).micro_batches[0]
            batch = loader.batch(step, 0, items)
            output = engine.evaluate(to_device(batch, plan.mesh.device))
            if task.generates:
                output = output._replace(generated=written(engine, task, items, plan.mesh.device, leaving))
            for one in (whole, *each[number : number + 1]):
                if one is not None:
                    one.update(output, batch)
            done += 1
            here.moved(done)
            report(done, total)
    if task.generates and stopping():
        raise Interrupted  # the last texts may have been cut short
    here.at("measuring")
    metrics, told = _measured(whole, plan)
    details(told)
    if isinstance(dataset, MixedDataset):
        for alias, one in zip(dataset.aliases, each, strict=True):
            own = {} if one is None else _measured(one, plan)[0]
            metrics |= {f"{alias}/{name}": value for name, value in own.items()}
    return metrics


def _by_source(task: Task, dataset: Dataset, plan: Plan) -> list[Evaluator | None]:
    """Return an evaluator for each of several sources; None if a source's metrics are computed anyway."""
    if not isinstance(dataset, MixedDataset) or plan.data.evaluation is None:
        return []
    named = zip(plan.data.evaluation.parts, dataset.aliases, strict=True)
    return [task.evaluator_of(source, alias) for source, alias in named]


def batches_by_source(dataset: Dataset, plan: Plan) -> list[Batches]:
    """Return a rank's evaluation batches in row order. Each source has its own, so that no batch mixes
    sources."""
    size, micro = plan.batch.data_parallel_size, plan.batch.micro_batch_size
    cut = BatchPlan(
        global_batch_size=micro * size,
        micro_batch_size=micro,
        accumulation_steps=1,
        data_parallel_size=size,
        balanced=plan.batch.balanced,
    )
    data_rank = plan.mesh.data_rank(distributed.get_rank())
    return [
        Batches(dataset, Stretch(dataset.num_items, begin), cut, data_rank, end - begin)
        for begin, end in dataset.stretches
    ]


def _measured(evaluator: Evaluator, plan: Plan) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the metrics and details over all ranks' evaluators, equal on all ranks."""
    states = exchange.all_gather_arrays(evaluator.state())
    # Ranks that share their samples have equal states: only the first of them counts.
    seen = [state for rank, state in enumerate(states) if plan.mesh.counts(rank, DATA_AXES)]
    leads = distributed.get_rank() == 0
    metrics = evaluator.compute(seen) if leads else {}
    told = evaluator.details() if leads else {}
    metrics, told = exchange.from_first([{name: float(value) for name, value in metrics.items()}, told])
    return dict(metrics), dict(told)


def written(
    engine: Engine,
    task: Task,
    items: Sequence[Sequence[Sample]],
    device: str,
    leaving: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Return the tokens generated for a micro-batch's samples, int64 [samples, n], in the order of `collate`.
    Each sample gets the answer that it gets alone.

    Called by all ranks together. `leaving` is called before every token, on each rank by itself; True cuts
    this rank's texts short.
    """

    def each_token() -> bool:
        here.moved(done)
        return leaving()

    def texts_of(some: Sequence[Sample]) -> torch.Tensor:
        prompts = to_device(task.prompts(some), device)
        # Behind them may be a prompt that keeps all ranks in the same layers.
        return engine.generate(prompts, task.generation, each_token)[: len(some)]

    done = here.done
    samples = [sample for item in items for sample in item]
    if not writes_alone(engine.model, task):
        return texts_of(samples)
    # Ranks that gather parameters in every forward pass must make the same number of them.
    most = max(exchange.all_gather(len(samples)))
    padded = [*samples, *samples[-1:] * (most - len(samples))]
    texts = [texts_of([sample])[0] for sample in padded][: len(samples)]
    return pad_sequence(texts, batch_first=True, padding_value=task.generation.arguments["pad_token_id"])


def writes_alone(model: PreTrainedModel, task: Task) -> bool:
    """Return whether a model generates one row at a time, because padding would change its answers. A class that
    came with its model is assumed to need it."""
    if not task.traits.causal:
        return False  # an encoder's mask hides all padding
    longest = task.data.max_length + task.generation.arguments.get("max_new_tokens", 0)
    is_own = not model_class_of(model).__module__.startswith("transformers.")
    return is_own or continues_alone(model.config.to_dict(), longest)
