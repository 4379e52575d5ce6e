"""One rank's part in writing logits ahead: forward passes over its samples, and their values to the files."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from launcher.runs.phases import PhaseReport
from launcher.runs.places import here
from launcher.tasks.task import Task
from launcher.training.data.dataset import Dataset
from launcher.training.data.logits_writer import Writer
from launcher.training.data.written_logits import as_stored, key_of, num_supervised, samples_of
from launcher.training.devices import to_device
from launcher.training.engines.engine import Engine
from launcher.training.precision import DTYPES
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject
from launcher.training.written_states import giving_states

_SECONDS_BETWEEN = 30.0
"""Seconds between flushes, and so the most work that a crash loses."""


class Place(NamedTuple):
    """A sample's place among the items, and its sizes."""

    item: int
    length: int
    num_supervised: int
    """Supervised tokens of a language model's sample; else 1."""


@dataclass
class Writing:
    """One rank's part in writing logits, or a language model's hidden states."""

    subject: Subject
    engine: Engine
    stop: StopRequest
    dataset: Dataset
    writer: Writer | None = None
    """The output, set before `write`."""

    @functools.cached_property
    def places(self) -> dict[int, Place]:
        """Return the place of the first sample with each key. This reads all samples."""
        places: dict[int, Place] = {}
        counts = num_supervised if speaks(self.subject.task) else lambda sample: 1
        for number, sample in enumerate(samples_of(self.dataset)):
            if (key := key_of(sample)) not in places:
                places[key] = Place(number, sample.length, counts(sample))
        return places

    def write(self, order: Sequence[int], done: int, report: PhaseReport) -> int:
        """Write the values of these keys, skipping the first `done`. Return how many are written in total: fewer
        than all after a stop. Called by all ranks together; each writes those of its own samples."""
        if not speaks(self.subject.task):
            return self._write(order, done, report)
        assert self.writer is not None
        take = self.writer.put_matrix if distributed.get_rank() == 0 else None
        with giving_states(self.engine.model, DTYPES[self.subject.plan.precision], take):
            return self._write(order, done, report)

    def _write(self, order: Sequence[int], done: int, report: PhaseReport) -> int:
        assert self.writer is not None
        plan, leads = self.subject.plan, distributed.get_rank() == 0
        micro, own = plan.batch.micro_batch_size, plan.mesh.data_rank(distributed.get_rank())
        here.at("evaluating", total=len(order))
        kept = time.monotonic()
        while done < len(order):
            stops, keeps = self._agree(
                self.stop.requested, leads and time.monotonic() - kept > _SECONDS_BETWEEN
            )
            if keeps:
                self.keep(done)
                kept = time.monotonic()
            if stops:
                break
            stretch = order[done : done + micro * plan.batch.data_parallel_size]
            keys = stretch[own * micro : (own + 1) * micro]
            for key, values in zip(keys, self.values(keys or stretch[:1]), strict=False):
                self.writer.put(key, values)
            done += len(stretch)
            if leads:
                report(done, len(order))
                here.moved(done)
        self.keep(done)
        return done

    def keep(self, done: int) -> None:
        """Record durably that `done` samples are written, after every rank's. Called by all ranks together."""
        assert self.writer is not None
        self.writer.flush()
        distributed.barrier()
        if distributed.get_rank() == 0:
            self.writer.keep(done)

    def values(self, keys: Sequence[int]) -> Sequence[np.ndarray]:
        """Return the logits of each of these samples, fp32 [outputs], or its hidden states as they are stored.
        Called by all ranks together."""
        subject, samples = self.subject, [self.dataset.item(self.places[key].item)[0] for key in keys]
        batch = subject.task.collate([[sample] for sample in samples])
        output = self.engine.evaluate(to_device(batch, subject.plan.mesh.device))
        assert output.predictions is not None
        if not speaks(subject.task):
            return list(output.predictions.float().cpu().numpy())
        ends = np.cumsum([self.places[key].num_supervised for key in keys])
        return np.split(as_stored(output.predictions), ends[:-1])

    def _agree(self, *wishes: bool) -> list[bool]:
        votes = torch.tensor(wishes, dtype=torch.float32, device=self.subject.plan.mesh.device)
        distributed.all_reduce(votes)
        return (votes > 0).tolist()


def speaks(task: Task) -> bool:
    """Return whether a task has logits at every token, so that hidden states are written in their place."""
    return task.traits.head == "every-position"
