"""Check of the engine's loss on two short rows against the model's own class, after loading.

The planner's table says how each architecture can process several samples in a pass. This check finds what no
table has: a model's own code, a config value that no test model had, a newer transformers, a bug in launcher.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem, first_line
from launcher.planner.model.model_support import Way
from launcher.planner.plan import Plan
from launcher.tasks.task import IGNORE, Output, Sample, Task
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import MixedDataset
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine
from launcher.training.model import attention
from launcher.training.model.few_layers import shortened
from launcher.training.model.own_class import by_own_class

LENGTHS = (11, 7)
"""Tokens of the two rows: the longer one first, so that its traces would show in the other."""
_LOOKED_AT = 16
"""The number of items that are searched for one with a file."""
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 1.5e-2}
"""The largest relative difference that rounding explains."""
_FALLBACKS = (
    Way("padded", "sdpa", "chunked"), Way("padded", "eager", "chunked"),
    Way("padded", "sdpa", "model"), Way("padded", "eager", "model"), Way("padded", "eager", "forward"),
)  # fmt: skip
Event = Callable[..., None]


def check_loss(engine: Engine, task: Task, dataset: Dataset, plan: Plan, event: Event) -> None:
    """Compare the plan's way of computing the loss with the model's own class; if they differ, switch all
    ranks to a correct way.

    Raises ConfigurationError, with both numbers, if no way is correct; DataError if a sample's targets are
    not its next tokens.
    """
    _all(True, torch.device(plan.mesh.device))  # ranks that still load do not count as time of the check
    began = time.monotonic()
    ends = getattr(engine.model.config.get_text_config(), "eos_token_id", None)
    heads = _heads(task, dataset, [ends] if isinstance(ends, int) else ends or [])
    rows = [row for head in heads for row in head.rows]
    # The parameters of both passes are gathered once.
    with shortened(engine.model), engine.gathered_if_it_fits(_tokens(engine.model, rows)):
        _check_loss(engine, task, heads, plan, event, began)


@dataclass(frozen=True)
class _Head:
    """A head that is compared with its own class: one of several, or the only one."""

    task: Task
    """The task of that head."""
    rows: Sequence[Sample]
    """Two samples; the second is compared."""
    name: str | None = None
    """The name of this head's task; None for an only head."""

    def output(self, output: Output) -> Output:
        """Return this head's part of an engine's output."""
        return output if self.name is None or output.parts is None else output.parts[self.name]


def _check_loss(
    engine: Engine, task: Task, heads: Sequence[_Head], plan: Plan, event: Event, began: float
) -> None:
    planned = way = Way(task.layout, plan.attention, task.head)
    owns = [_own(engine, task, head, plan) for head in heads]
    own, size = _joined([own for own, _ in owns]), torch.cat([size.expand(len(own)) for own, size in owns])
    first = ours = _ours(engine, task, heads, plan, planned)
    others = iter(
        way
        for way in _FALLBACKS
        if way != planned and (task.traits.head == "every-position" or way.head == "chunked")
    )
    while ours is None or _differ(ours, own, size) > TOLERANCE[plan.precision]:
        if (other := next(others, None)) is None:
            reason = (
                f"a row behind another in one pass has {_number(first)}, and alone by the model's own "
                f"class {_number(own)}"
            )
            cure = "launcher cannot train it truly; write batch.micro_batch_size: 1, or another model"
            if task.virtual_tokens:
                cure = "it does not read virtual tokens as peft does; write model.adapter.method: lora"
            raise ConfigurationError(Problem("model.name", plan.model.name, f"{reason}: {cure}"))
        way, ours = other, _ours(engine, task, heads, plan, other)
    numbers = {"ours": _number(first), "own": _number(own), "seconds": round(time.monotonic() - began, 2)}
    if way == planned:
        event("checked", **numbers)
    else:
        event("layout", planned=" ".join(planned), taken=" ".join(way), **numbers)


def _heads(task: Task, dataset: Dataset, ends: Sequence[int]) -> list[_Head]:
    """Return the heads to compare: one for each of several tasks."""
    if not task.parts:
        return [_Head(task, _rows(task, dataset, ends))]
    assert isinstance(dataset, MixedDataset)
    stretches = dict(zip(reversed(dataset.tasks), reversed(dataset.stretches), strict=True))
    parts = task.parts.items()
    return [_Head(part, _rows(task, dataset, ends, *stretches[name]), name) for name, part in parts]


def _rows(
    task: Task, dataset: Dataset, ends: Sequence[int], begin: int = 0, end: int | None = None
) -> list[Sample]:
    """Return two shortened samples of the items from `begin` to `end`. The second one is compared: it has a
    file if one of the first items has.

    Raises DataError for a sample that the task did not make.
    """
    most = _LOOKED_AT if task.traits.reads_files else 2
    stop = min(begin + most, dataset.num_items if end is None else end)
    samples = [sample for index in range(begin, stop) for sample in dataset.item(index)]
    counts = next(
        (one for one in samples[1:] + samples[:1] if len(one.get("media", ()))), samples[1 % len(samples)]
    )
    other = next((one for one in samples if one is not counts), counts)
    first, second = (
        task.shortened(sample, length + task.virtual_tokens, ends)
        for length, sample in zip(LENGTHS, (other, counts), strict=True)
    )
    return [first.as_filler(), second]


def _tokens(model: PreTrainedModel, rows: Sequence[Sample]) -> list[int]:
    """Return the tokens of the rows, and those that a model may add. All other tokens have the same row of
    zeros in both passes."""
    config = model.config.get_text_config()
    num_tokens = getattr(config, "vocab_size", None) or 0
    special = [value for key, value in config.to_dict().items() if key.endswith("_token_id")]
    numbers = [np.ravel(array) for row in rows for array in row.values() if array.dtype.kind in "iu"]
    numbers += [np.ravel(value) for value in special if isinstance(value, (int, list))]
    every = np.unique(np.concatenate(numbers)) if numbers else np.empty(0, int)
    return [int(token) for token in every if 0 <= token < num_tokens]


def _ours(engine: Engine, task: Task, heads: Sequence[_Head], plan: Plan, way: Way) -> torch.Tensor | None:
    """Return the engine's values for each head's second row, in a pass with the first (alone if the run has
    one sample a pass); None if the model's code cannot compute it that way, then on all ranks."""
    task.layout, task.head = way.layout, way.head
    _attend(engine.model, way.attention)
    values = []
    for head in heads:
        shared = head.rows[1:] if plan.batch.micro_batch_size == 1 and not plan.data.packing else head.rows
        try:
            output = engine.evaluate(to_device(task.collate([[row] for row in shared]), plan.mesh.device))
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
            return None
        values.append(_values(head.task, head.output(output), head.rows[1]))
    return _joined(values)


def _own(engine: Engine, task: Task, head: _Head, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the model's own class for the second row alone, and their scale for judging
    rounding.

    Raises ConfigurationError if the class refuses the row, or returns no finite numbers.
    """
    name = engine.model.config._attn_implementation
    _attend(engine.model, "eager")
    row = head.rows[1]
    try:
        plain = head.task.plain_batch(row)
        if plain is None:
            output = head.output(engine.evaluate(to_device(task.collate([[row]]), plan.mesh.device)))
        else:
            with by_own_class(engine.model, head.name), torch.compiler.set_stance("force_eager"):
                output = engine.evaluate(to_device(plain, plan.mesh.device))
    except ValueError as error:
        reason = f"its own class refuses a row of the data: {first_line(error)}"
        raise ConfigurationError(Problem("model.name", plan.model.name, reason)) from None
    _attend(engine.model, name)
    own = _values(head.task, output, row)
    if not _all(bool(own.isfinite().all()), own.device):
        reason = f"its own class makes {_number(own)} of a row of the data in {plan.precision}"
        raise ConfigurationError(
            Problem("model.name", plan.model.name, f"{reason}: weights are not finite, or too large for it")
        )
    return own.flatten(), torch.maximum(own.float().abs().max(), output.num_correct.float())


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values of all heads, concatenated, [n]."""
    return torch.cat([one.flatten() for one in values])


def _values(task: Task, output: Output, row: Sample) -> torch.Tensor:
    """Return the values to compare: the loss of a token, or a classifier's outputs, without padding."""
    if output.predictions is None:
        targets = row.get("targets")
        # Tokens of images are not supervised.
        num_learned = row.length - 1 if targets is None else int((targets != IGNORE).sum())
        return output.loss_sum.reshape(1) / max(1, num_learned)
    predictions = output.predictions[-1]
    return predictions[: row.length] if task.traits.head == "every-position" else predictions


def _attend(model: PreTrainedModel, name: str) -> None:
    """Switch the model's attention. A class with its own attention is unchanged."""
    wanted = attention.register(name)
    if model.config._attn_implementation != wanted:
        with contextlib.suppress(ValueError):
            model.set_attn_implementation(wanted)


def _differ(ours: torch.Tensor, own: torch.Tensor, size: torch.Tensor) -> float:
    """Return the largest difference on any rank, relative to the scale."""
    relative = ((ours.float() - own.float()).abs() / size.clamp_min(1e-6)).max()
    relative = torch.nan_to_num(relative, nan=torch.inf)
    if distributed.get_world_size() > 1:
        distributed.all_reduce(relative, distributed.ReduceOp.MAX)
    return float(relative)


def _all(here: bool, device: torch.device) -> bool:
    """Return whether `here` is true on all ranks."""
    holds = torch.tensor(float(here), device=device)
    if distributed.get_world_size() > 1:
        distributed.all_reduce(holds, distributed.ReduceOp.MIN)
    return bool(holds)


def _number(values: torch.Tensor | None) -> str:
    """Return the number for people: a loss, or the first of a classifier's logits."""
    return "none" if values is None else " ".join(f"{value:.4f}" for value in values.flatten()[:4].tolist())
