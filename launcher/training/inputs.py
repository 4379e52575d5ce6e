"""Inputs of training that need no peers: config, tokenizer, task, data."""

from __future__ import annotations

import copy
import dataclasses
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.runs import cache, events, prepared
from launcher.runs.layout import RunDirectory
from launcher.runs.phases import PhaseReport
from launcher.tasks.task import Task
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import learn_from, prepare_sources
from launcher.training.data.prepare import refuse_mostly_dropped
from launcher.training.data.sources import refuse_change
from launcher.training.data.spread import shape
from launcher.training.data.stream import Stream
from launcher.training.data.written_logits import WrittenLogits
from launcher.training.model import model_files, pretrained
from launcher.training.model.forward import model_class_of
from launcher.training.model.teacher import check_teacher
from launcher.training.signals import StopRequest


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of training that exist before the process group: config, tokenizer, task and data."""

    config: Any
    tokenizer: Any
    """The tokenizer, or the task's processor in its place."""
    task: Task
    stored: Dataset | None
    """The training data, unless it is streamed."""
    evaluation: Dataset | None
    stream: Stream | None = None
    """All training rows, if they are streamed."""
    logits: WrittenLogits | None = None
    """A teacher's logits of the rows, if they were written ahead of training."""

    @classmethod
    def prepare(cls, run: RunDirectory, plan: Plan, stop: StopRequest | None = None) -> TrainingInputs:
        """Return a run's inputs and write a data report to its events. Raises DataError if the data has changed
        since the run began, or if most rows would be dropped; StoppedEarly as `of`."""
        material, leads = cls.of(run, plan, stop), os.environ.get("RANK", "0") == "0"
        for dataset in material.datasets:
            if material.stream is not None and dataset is material.train:
                material.stream.refuses = True  # from now on, as rows arrive
                material.stream.judge(material.stream.first())
                continue
            for one in dataset.reports:
                refuse_mostly_dropped(one, plan)
            refuse_change(run.path / f"data-{dataset.report.role}.json", dataset.report)
        if material.logits is not None:
            material.logits.hold(run.path / "data-logits.json")
        if leads:
            for dataset in material.datasets:
                streamed = material.stream if dataset is material.train else None
                report = dataset.report.to_dict() if streamed is None else streamed.to_dict()
                events.event(run.events_file, "prepared", **report, **shape(dataset))
                print(*prepared.lines({"event": "prepared", **report}), sep="\n", file=sys.stderr)
                for text in dataset.report.remarks:
                    events.event(run.events_file, "noted", text=text)
        return material

    @classmethod
    def of(
        cls, run: RunDirectory, plan: Plan, stop: StopRequest | None = None, *, streams: bool = True
    ) -> TrainingInputs:
        """Return the inputs, with tokenised and packed data from the cache. If the cache lacks them, one process
        of a machine prepares them while the others wait. If rows are streamed and `streams` is false, the
        held-out rows replace the training rows. Raises StoppedEarly if a stop is requested while rows are
        tokenised."""
        cache.hold_until_the_end(Path(plan.model.name))
        config = pretrained.read_config(plan)
        tokenizer = pretrained.read_processor(plan)
        task = tasks.build(plan, tokenizer)
        task.adopt(config)
        train = evaluation = stream = None
        if plan.data.streaming and streams:
            stream = Stream.open(run, plan, task, tokenizer)
        try:
            if not plan.data.streaming:
                report = preparation_report(run, stop)
                train = prepare_sources(plan.data.train, "train", plan, task, tokenizer, report)
            if (held_out := plan.data.evaluation) is not None:
                report = preparation_report(run, stop)
                evaluation = prepare_sources(held_out, "evaluation", plan, task, tokenizer, report)
            stored = evaluation if plan.data.streaming and not streams else train
            material = cls(config, tokenizer, task, stored, evaluation, stream)
            learn_from(task, material.train)
            task.configure(config)
            check_teacher(plan, task, tokenizer, material.train)
            if plan.distillation is not None and plan.distillation.logits is not None:
                logits = WrittenLogits.open(Path(plan.distillation.logits))
                logits.suit(task, tokenizer)
                logits.check(material.train, task)
                material = dataclasses.replace(material, logits=logits)
            texts = getattr(tokenizer, "tokenizer", None) if task.has_processor else tokenizer
            if texts is not None:
                refuse_tokens(material.train, "data.train", texts, config)
                refuse_tokens(evaluation, "data.evaluation", texts, config)
            if stream is not None and texts is not None:
                stream.check = lambda window: refuse_tokens(window, "data.train", texts, config)
            return material
        except BaseException:
            # With other ranks on the node, removing the files would make those fail with a misleading error.
            if stream is not None and stream.worker.num_local_ranks == 1:
                stream.close()
            raise

    @property
    def train(self) -> Dataset:
        """Return the training data. For streamed rows it is the first window with samples, which exists until
        the steps have passed it."""
        train = self.stored if self.stream is None else self.stream.first().dataset
        assert train is not None
        return train

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """Return the training data, and the evaluation data if there is any."""
        if self.evaluation is None or self.evaluation is self.stored:
            return (self.train,)
        return (self.train, self.evaluation)

    def save_model_files(self, run: RunDirectory, plan: Plan, model: PreTrainedModel) -> None:
        """Write RUN/model once: the files of the model's directory except weights, with this run's config,
        tokenizer and generation config.

        Called by one rank.
        """
        target = run.path / "model"
        if target.exists():
            return
        # Under a temporary name first; after a kill half-way, the next attempt would take it for complete.
        directory = target.with_name(f".model-{secrets.token_hex(4)}")
        if (source := model_files.directory_of(plan)) is not None:
            model_files.copy(source, directory)
        pretrained.drop_limits(getattr(self.tokenizer, "tokenizer", self.tokenizer))
        self.tokenizer.save_pretrained(directory)
        replaced = self.task.has_processor and not self.task.keeps_processor
        if replaced and (directory / "preprocessor_config.json").is_file():
            # It may describe the image or sound processor before the job set a size or length, and transformers
            # reads it first.
            (directory / "processor_config.json").unlink(missing_ok=True)
        generation: GenerationConfig | None = getattr(model, "generation_config", None)
        if generation is not None:
            generation = copy.deepcopy(generation)
            self.task.configure_generation(generation)
            # Unvalidated: transformers refuses to save a config that it would warn about, yet loads it.
            generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
        self.config.architectures = [model_class_of(model).__name__]
        self.config.save_pretrained(directory)
        model_files.name_own_code(directory, plan)
        directory.rename(target)


def refuse_tokens(dataset: Dataset | None, key: str, tokenizer: Any, config: Any) -> None:
    """Raise ConfigurationError if the data has a token for which the model's embedding has no row."""
    num_rows = getattr(config.get_text_config(), "vocab_size", None)
    # Reading every sample takes a while, so only if the tokenizer has such tokens. Models of characters have no
    # embedding table.
    if (
        dataset is None
        or num_rows is None
        or pretrained.num_ids(tokenizer) <= num_rows
        or (highest := dataset.highest_token()) < num_rows
    ):
        return
    token = tokenizer.convert_ids_to_tokens(highest)
    reason = (
        f"has the token {token!r} ({highest}), and the embedding has {num_rows:,} rows; write "
        "model.resize_embeddings: true"
    )
    raise ConfigurationError(Problem(key, None, reason))


def phase_report(run: RunDirectory, phase: str, unit: str) -> PhaseReport:
    """Return a report function for a phase of this run."""
    return PhaseReport(run, phase, unit)


def preparation_report(run: RunDirectory, stop: StopRequest | None) -> Callable[[int, int], None]:
    """Return a report function for the preparation of a data set, which raises StoppedEarly once a stop is
    requested. What was tokenised so far is removed then, so no peer has the data set either."""
    report = phase_report(run, "preparing", "rows")

    def report_or_leave(done: int, total: int) -> None:
        if total and stop is not None:
            stop.leave_early()
        report(done, total)

    return report_or_leave
