"""Several tasks at once over one encoder: a head for each, and one pass for samples of all of them.

A micro-batch goes through the body once, and the output through every head, by the code of transformers' own
class with that head. For each head, samples of other tasks are padding samples without supervision. So every
rank computes the same in every pass, whatever the tasks of its samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from launcher.data.rows import RowProblem
from launcher.data.section import MixedSource
from launcher.errors import ConfigurationError
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks.multi_task_columns import MultiTaskColumns, contradictions, entry_of
from launcher.tasks.multi_task_scores import MultiTaskScores, OneTaskScores
from launcher.tasks.padding import padded, weights
from launcher.tasks.task import (
    KEEPS_LOSSES,
    AnswerOptions,
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Output,
    Sample,
    Task,
    Traits,
)
from launcher.tasks.traits import HEADS

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_OF_A_HEAD = ("problem_type", "id2label", "label2id", "head_bias")
SCALES = "scales"
"""A key of a training batch: the factor of each task's summed loss. With it, the step's loss divided by the
global batch's supervised count is the sum over the tasks of weight x mean."""
_READ = ("input_ids", "attention_mask", "token_type_ids")
"""The inputs that all tasks share, in a batch under these names; the rest of each task's batch is under
`TASK/name`."""


class MultiTask(Task):
    """Several tasks over one encoder: classes, numbers and tags at once."""

    name = "multi-task"
    traits = Traits("padded", causal=False, head="few-per-position", windows=True)
    Columns = MultiTaskColumns
    column_ways = ()
    data: MultiTaskColumns

    def __init__(self, data: MultiTaskColumns, labels: list[str] | None = None) -> None:
        self._parts: dict[str, Task] = {}
        self.loss_weights: dict[str, float] = {}
        super().__init__(data)
        for name in data.tasks:
            try:
                entry = entry_of(data, name)
            except (ConfigurationError, ValueError):
                continue  # `checks` says why
            self._parts[name] = entry.kind(entry.data)
            self.loss_weights[name] = entry.loss_weight
        self._names = tuple(self._parts)
        self.keeps_losses = all(part.keeps_losses for part in self._parts.values())  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; those for prediction and evaluation are set on each task too."""
        super().__setattr__(name, value)
        if name in ("for_prediction", "keeps_fitted"):
            for part in self._parts.values():
                setattr(part, name, value)

    @property
    def parts(self) -> Mapping[str, Task]:
        return self._parts

    @property
    def streams(self) -> bool:
        """Return False: each task has its own source, and several sources cannot be streamed."""
        return False

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from contradictions(self.data)

    @property
    def metrics(self) -> Mapping[str, Better]:
        own = {
            f"{name}/{metric}": better
            for name, part in self.parts.items()
            for metric, better in part.metrics.items()
        }
        metrics: dict[str, Better] = {"loss": "lower"}
        return metrics | own

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for part in self.parts.values() for column in part.columns))

    def texts(self, row: dict[str, Any]) -> list[str]:
        return [text for part in self.parts.values() for text in part.texts(row)]

    @property
    def auto_class(self) -> Any:
        from launcher.training.heads import AutoModelWithHeads

        return AutoModelWithHeads

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a run's model. The heads of any other model are not used.

        Raises ConfigurationError if a model without heads for these tasks is not trained.
        """
        heads = getattr(config, HEADS, None) or {}
        if (
            as_it_stands
            and (lacks := next((name for name in self.parts if name not in heads), None)) is not None
        ):
            raise classes.without_head(config, f"the model has no head of the task {lacks}")
        for name, part in self.parts.items():
            own = copy.deepcopy(config)
            kind = part.auto_class.__name__.removeprefix("AutoModelFor")
            own.architectures = [f"For{kind}" if name in heads else "Body"]
            for key, value in heads.get(name, {}).items():
                setattr(own, key, value)
            part.adopt(own, as_it_stands)

    def configure(self, config: Any) -> None:
        """Write each task's Auto class and the head's own settings into the config."""
        heads = {}
        for name, part in self.parts.items():
            own = copy.deepcopy(config)
            part.configure(own)
            settings = {key: getattr(own, key) for key in _OF_A_HEAD if getattr(own, key, None) is not None}
            heads[name] = {"auto_class": part.auto_class.__name__} | settings
            for one, other in ((config, own), (config.get_text_config(), own.get_text_config())):
                one.pad_token_id = other.pad_token_id
        self._pad = config.pad_token_id or 0
        setattr(config, HEADS, heads)

    def chance_loss(self, config: Any) -> float | None:
        own = {
            name: part.chance_loss(SimpleNamespace(num_labels=len(getattr(config, HEADS)[name]["id2label"])))
            for name, part in self.parts.items()
        }
        known = [self.loss_weights[name] * loss for name, loss in own.items() if loss is not None]
        return sum(known) if len(known) == len(own) else None

    def other_head(self, stored: Any, config: Any) -> str | None:
        """Return None: the heads are new, whatever head the model's files have."""
        return None

    def prepare(self, processor: Any) -> None:
        self._pad = processor.pad_token_id or 0
        for part in self.parts.values():
            part.prepare(processor)

    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> list[tuple[Encoded, ...] | RowProblem]:
        """Return the samples of each row for every task that can read it, for prediction; training rows are
        encoded by their own task."""
        by_task = [part.encode(rows, processor) for part in self.parts.values()]
        results: list[tuple[Encoded, ...] | RowProblem] = []
        for every in zip(*by_task, strict=True):
            samples: list[Encoded] = []
            for number, one in enumerate(every):
                if not isinstance(one, RowProblem):
                    windows = (one,) if isinstance(one, Encoded) else one
                    samples += [window._replace(arrays=window.arrays | _mark(number)) for window in windows]
            problems = [one for one in every if isinstance(one, RowProblem)]
            results.append(tuple(samples) if samples or not problems else problems[0])
        return results

    def marked(self, sample: Sample, name: str | None) -> Sample:
        sample.update(_mark(self._names.index(str(name))))
        return sample

    def part_of(self, sample: Sample) -> str:
        """Return the name of a sample's task."""
        return self._names[int(sample["task"][0])]

    def example(self, length: int) -> Sample:
        name, part = next(iter(self.parts.items()))
        return self.marked(part.example(length), name)

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        name = self.part_of(sample)
        return self.marked(self.parts[name].shortened(sample, length, ends), name)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the shared inputs, int64 [B, L] each; `weights` float32 [B], 0 for padding samples; and
        under `TASK/name` the other results of each task's own `collate`, with samples of other tasks as
        padding samples."""
        samples = [sample for item in items for sample in item]
        if any("token_type_ids" in sample for sample in samples):
            samples = [_typed(sample) for sample in samples]
        batch: dict[str, Any] = padded(samples, {"input_ids": self._pad, "token_type_ids": 0})
        batch["weights"], batch["aside"] = weights(samples), {}
        for name, part in self.parts.items():
            seen = self._for(name, samples)
            own = part.collate([[sample] for sample in seen], draws)
            if any(sample.weight for sample in seen):
                batch["aside"][name] = own.pop("aside", None)
            batch |= {f"{name}/{key}": value for key, value in own.items() if key not in (*_READ, "aside")}
        return batch

    def _for(self, name: str, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples for one of the tasks: those of other tasks become padding samples of its own
        kind."""
        return [sample if self.part_of(sample) == name else self._filler(name, sample) for sample in samples]

    def _filler(self, name: str, sample: Sample) -> Sample:
        example = self.parts[name].example(sample.length)
        read = {key: sample[key] for key in _READ if key in sample}
        return Sample(example | read, sample.id, sample.length, weight=0, window=sample.window)

    def _batch_of(self, batch: dict[str, Any], name: str) -> dict[str, Any]:
        """Return the part of a batch for one of the tasks, as its own batch."""
        read = {key: batch[key] for key in (*_READ, KEEPS_LOSSES) if key in batch}
        begins = f"{name}/"
        return read | {
            key.removeprefix(begins): value for key, value in batch.items() if key.startswith(begins)
        }

    def _measured_batch(self, batch: dict[str, Any], name: str) -> dict[str, Any] | None:
        """Return the same with `aside`, for an evaluator; None if the batch has no sample of the task."""
        if name not in batch["aside"]:
            return None
        return self._batch_of(batch, name) | {"aside": batch["aside"][name]}

    def in_a_step(self, num_supervised: Sequence[int]) -> dict[str, Any]:
        """Return the factor of each task's loss, `SCALES`. A task without a sample in the global batch has no
        loss."""
        of_task = dict.fromkeys(self.parts, 0)
        for source, number in zip(
            cast(Sequence[MixedSource], self.data.train.parts), num_supervised, strict=True
        ):
            of_task[str(source.task)] += number
        total = sum(of_task.values())
        scales = {name: self.loss_weights[name] * total / max(1, number) for name, number in of_task.items()}
        return {SCALES: scales}

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the sum over the tasks of weight x summed loss (in training, `SCALES` are the weights), and
        each task's own output."""
        from launcher.training.heads import body_computed, head_of

        scales = batch.get(SCALES, self.loss_weights)
        with body_computed(model, {key: batch[key] for key in _READ if key in batch}):
            outputs = {
                name: part.loss(head_of(model, name), self._batch_of(batch, name))
                for name, part in self.parts.items()
            }
        kept = None
        if KEEPS_LOSSES in batch:
            size = len(batch["input_ids"])
            losses = [
                one.losses.view(size, -1).sum(dim=1) for one in outputs.values() if one.losses is not None
            ]
            kept = torch.stack(losses).sum(dim=0)
        sums = [scales[name] * output.loss_sum for name, output in outputs.items()]
        return Output(
            torch.stack(sums).sum(),
            torch.stack([output.num_correct for output in outputs.values()]).sum(),
            losses=kept,
            parts={
                name: one._replace(loss_sum=one.loss_sum.detach(), losses=None)
                for name, one in outputs.items()
            },
        )

    def evaluator(self) -> Evaluator:
        evaluators = {name: part.evaluator() for name, part in self.parts.items()}
        return MultiTaskScores(evaluators, self.loss_weights, self._measured_batch)

    def evaluator_of(self, source: Any, alias: str) -> Evaluator | None:
        """Return the evaluator of one of several sources of a task; None for a task's only source."""
        name = str(source.task)
        if alias == name:
            return None
        return OneTaskScores(name, self.parts[name].evaluator(), self._measured_batch)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.adopt_evaluation(details.get(name, {}))

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the name of each sample's task, and that task's answer."""
        assert output.parts is not None
        names, results = [self.part_of(sample) for sample in samples], {}
        for name in set(names):
            own = self._batch_of(batch, name) | {"aside": batch["aside"].get(name)}
            results[name] = self.parts[name].answers(
                output.parts[name], own, self._for(name, samples), options
            )
        return [[name, results[name][number]] for number, name in enumerate(names)]

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer of each task, by its name."""
        names = dict.fromkeys(name for name, _ in parts)
        return {
            name: self.parts[name].answer(row, [answer for other, answer in parts if other == name])
            for name in names
        }


def _mark(number: int) -> dict[str, np.ndarray]:
    """Return the array with the number of a sample's task: int64 [1]."""
    return {"task": np.array([number])}


def _typed(sample: Sample) -> Sample:
    """Return a sample with token types: those of a single text if its task gives none."""
    if "token_type_ids" in sample:
        return sample
    arrays = sample | {"token_type_ids": np.zeros_like(sample["input_ids"])}
    return Sample(arrays, sample.id, sample.length, sample.weight, sample.window)
