"""Rank 0's records of each step and each evaluation."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any, NamedTuple

import torch

from launcher.metrics import classes_of, named
from launcher.planner.plan import Plan
from launcher.runs import samples
from launcher.runs.curve import Curve
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.totals import Totals
from launcher.training import operations
from launcher.training.data.batches import StepBatch
from launcher.training.devices import peak_memory_bytes
from launcher.training.engines.engine import Engine
from launcher.training.model import loading as models
from launcher.training.reporting.forecast_check import ForecastCheck
from launcher.training.reporting.journal import Journal
from launcher.training.reporting.trackers import Trackers
from launcher.training.state import State

_SECONDS_BETWEEN_KEEPING = 30.0
"""Readers parse later lines one by one: some thousands at most, in milliseconds."""
_SECONDS_BETWEEN_LINES = 10.0
"""For a rank's log."""

_TOLD = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "tokens_so_far": "num_input_tokens_seen",
    "tokens_per_second": "tokens_per_second",
}
"""The fields of a step's record and their names in trackers: the Trainer's, where it has one."""


class StepSeconds(NamedTuple):
    """The duration of a step on rank 0."""

    whole: float
    data: float
    """The part of it spent waiting for data."""


class Recorder:
    """The files and trackers of one run. It is created before the model is loaded, to know the bare
    process."""

    def __init__(self, run: RunDirectory, plan: Plan, device: torch.device, journal: Journal) -> None:
        self._run, self._plan, self._device, self._journal = run, plan, device, journal
        self._foreseen = ForecastCheck(run, device)
        self._folds = (Totals(run), Curve(run))
        self._kept_at, self._printed_at = time.monotonic(), -_SECONDS_BETWEEN_LINES
        self._seconds: StepSeconds | None = None

    @property
    def data_share(self) -> float | None:
        """Return the share of this attempt's step time that was waiting for data, without the first step, in
        which workers start; None before the second."""
        return (
            round(self._seconds.data / self._seconds.whole, 4)
            if self._seconds and self._seconds.whole
            else None
        )

    def loaded(self, step: int, num_items_of_epoch: int | None) -> None:
        """Start or resume trackers, once the model and its state after `step` steps are loaded.

        The files of earlier attempts are read now, not between two steps. `num_items_of_epoch`: the items in
        an epoch, if known.
        """
        self._foreseen.ended("loading")
        self._num_items_of_epoch = num_items_of_epoch
        self._trackers = Trackers(self._run, self._plan, step)
        self._keep()

    def step(
        self,
        state: State,
        batch: StepBatch,
        loss: float,
        gradient_norm: float,
        learning_rate: float,
        seconds: StepSeconds,
        by_source: dict[str, float],
    ) -> None:
        """Record one optimizer step of all ranks, after which the run stands at `state`; it took `seconds`.

        `by_source`: the loss of each of several sources.
        """
        before = self._seconds
        self._seconds = (
            StepSeconds(*map(sum, zip(before, seconds, strict=True))) if before else StepSeconds(0, 0)
        )
        step, peak_memory = state.step, peak_memory_bytes(self._device)
        record = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "num_samples": batch.num_samples,
            "num_tokens": batch.num_tokens,
            "tokens_so_far": state.num_tokens,
            "tokens_per_second": round(batch.num_tokens / seconds.whole, 1),
            "peak_memory_bytes": peak_memory,
            "data_seconds": round(seconds.data, 4),
            "sample_ids": batch.sample_ids,
            "time": round(time.time(), 3),
        }
        record |= {"loss_by_source": by_source} if by_source else {}
        self._journal.append(self._run.metrics_file, record)
        if compared := self._foreseen.note(batch.num_tokens, seconds.whole):
            self._journal.event(self._run.events_file, "compared", **compared)
        told: dict[str, Any] = {f"train/{name}": record[key] for key, name in _TOLD.items()}
        told |= {"train/step_seconds": seconds.whole, "train/data_seconds": seconds.data}
        told["train/peak_memory_gib"] = peak_memory / (1 << 30)
        if self._num_items_of_epoch:
            told["train/epoch"] = state.num_items / self._num_items_of_epoch
        told |= {f"train/loss/{alias}": value for alias, value in by_source.items()}
        self._trackers.log(told, step)
        self._print_step(record)
        if time.monotonic() - self._kept_at > _SECONDS_BETWEEN_KEEPING:
            self._keep()

    def _print_step(self, record: dict[str, Any]) -> None:
        """Print a step into the rank's log: the first one, later one every few seconds."""
        if (now := time.monotonic()) - self._printed_at < _SECONDS_BETWEEN_LINES:
            return
        self._printed_at = now
        loss, rate = f"loss {record['loss']:.4f}", f"learning rate {record['learning_rate']:.2e}"
        _print(f"step {record['step']}  {loss}  {rate}  {record['tokens_per_second']:,.0f} tokens/s")

    def evaluation(
        self, step: int, metrics: dict[str, float], details: dict[str, Any], answers: list[dict[str, Any]]
    ) -> None:
        """Record one evaluation; its details, and the model's answers to some rows, get separate files."""
        self._foreseen.ended("evaluating")
        if details:
            file = self._run.evaluation(step)
            with contextlib.suppress(OSError):  # a full disk must not stop training
                file.parent.mkdir(exist_ok=True)
                write_atomically(
                    file, json.dumps({"step": step, "metrics": metrics, "details": details}) + "\n"
                )
        self._journal.append(self._run.metrics_file, {"kind": "evaluation", "step": step, "metrics": metrics})
        event: dict[str, Any] = {"step": step, "metrics": metrics}
        event |= {"positive_classes": classes} if (classes := classes_of(metrics, details)) else {}
        self._journal.event(self._run.events_file, "evaluated", **event)
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in named(event).items())
        _print(f"measured after step {step}: {numbers}")
        self._trackers.log({f"eval/{key}": value for key, value in metrics.items()}, step)
        if answers:
            with contextlib.suppress(OSError):  # as above
                samples.write(self._run, step, answers)
            self._trackers.log({"samples": "\n\n".join(samples.lines(answers))}, step)

    def finish(self) -> None:
        """Flush every tracker and the files."""
        self._trackers.finish()
        self._keep()

    def _keep(self) -> None:
        """Write a summary of the files, so that readers need not start from their beginning. A full disk
        loses nothing."""
        for fold in self._folds:
            with contextlib.suppress(OSError):
                fold.refresh().keep()
        self._kept_at = time.monotonic()


def _print(line: str) -> None:
    """Print a line into the rank's log. A full disk stops no training."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def description(engine: Engine, config: Any, length: int, unit: str) -> dict[str, Any]:
    """Return the fields of the event `training` about a model: its size, its trained and new parameters, and
    the cost of a token in samples of that length. `unit`: the unit of a length."""
    sizes = [
        (models.whole_shape(parameter).numel(), parameter.requires_grad)
        for parameter in engine.model.parameters()
    ]
    about: dict[str, Any] = {
        "num_parameters": sum(size for size, _ in sizes),
        "num_trainable": sum(size for size, trains in sizes if trains),
    }
    # It counts how often parameters are used: once per token, but more often for pixels.
    cost = {"flops_per_token": operations.flops_per_token(engine.model, config, length)}
    about |= cost if unit == "token" else {}
    about["new_parameters"] = list(engine.new_parameters)
    return about if unit == "token" else {**about, "unit": unit}
