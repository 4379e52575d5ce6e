"""The training loop: from a run directory with a plan to a trained, saved, evaluated model."""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from launcher.errors import DivergedError, StorageError
from launcher.plain_files import read_json
from launcher.planning.plan import Plan
from launcher.runs.checkpoints import Progress
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.places import here
from launcher.runs.status import newest_checkpoint
from launcher.runs.tail import last_record
from launcher.training import engines, exchange, operations, pretrained
from launcher.training import model as models
from launcher.training.cadence import Cadence
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.data.batches import Batches, StepBatch
from launcher.training.data.order import Order
from launcher.training.devices import peak_memory_bytes, start_process_group, to_device
from launcher.training.ending import EarlyEnd
from launcher.training.engines.operators import build_operators
from launcher.training.evaluation import Interrupted, evaluate
from launcher.training.loss_check import check_loss
from launcher.training.material import Material, phase_report
from launcher.training.pace import SLOW_FACTOR, Own, Pace
from launcher.training.precision import LossScale
from launcher.training.recording import Recorder
from launcher.training.resumed import TrainerState
from launcher.training.schedule import Schedule
from launcher.training.signals import StopRequest
from launcher.training.tracking import Journal
from launcher.training.whereabouts import say_compiling, waited


def train(run: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None) -> None:
    """Run the plan to its end, or to a stop, going on from the newest whole checkpoint. Called by every rank."""
    here.at("preparing")
    plan = pretrained.settled(plan)
    material = Material.prepare(run, plan)
    here.at("building operators")
    build_operators(plan, phase_report(run, "building operators", "operators"))
    here.at("loading")
    device = start_process_group(plan)
    waited.watch()
    if plan.model.compile:
        say_compiling()
    trainer = Trainer(run, plan, material, device, stop, stop_at)
    trainer.run_to_the_end()


@dataclass
class State:
    """Where the run is. What a checkpoint carries beside tensors."""

    step: int = 0
    num_items: int = 0
    num_tokens: int = 0
    num_skipped_in_a_row: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    evaluated_step: int = -1
    """The step after which that was; -1 before the first."""

    def progress(self, extra: dict[str, Any]) -> Progress:
        """As a checkpoint stores it."""
        kept = {"num_skipped_in_a_row": self.num_skipped_in_a_row, "metrics": self.metrics, "evaluated_step": self.evaluated_step}
        return Progress(step=self.step, samples=self.num_items, tokens=self.num_tokens, extra=kept | extra)


class Trainer:
    """One attempt of a run on one rank. Constructing it loads the model and the checkpoint; `run_to_the_end` trains."""

    def __init__(
        self, run: RunDirectory, plan: Plan, material: Material, device: torch.device, stop: StopRequest, stop_at: int | None
    ) -> None:
        self.run, self.plan, self.material, self.device, self.stop, self.stop_at = run, plan, material, device, stop, stop_at
        self.rank = distributed.get_rank()
        self.journal = Journal()
        self.task = material.task
        num_items = _total_items(plan, material.train.num_items)
        order = Order(plan.training.seed, material.train.num_items, shuffle=True)
        self.batches = Batches(material.train, order, plan.batch, self.rank, num_items)
        self.num_steps = self.batches.num_steps
        self.schedule = Schedule.of(plan.training, self.num_steps)
        here.at("loading")
        self.event("phase", phase="loading")
        self.recorder = Recorder(run, plan, device, self.journal) if self.rank == 0 else None
        self.engine = engines.build(plan, self.task, material.config, _deepspeed_config(run) if plan.engine == "deepspeed" else {})
        if self.rank == 0:
            material.save_model_files(run, plan, self.engine.model)
        here.at("checking the loss")
        self.event("phase", phase="checking the loss")
        check_loss(self.engine, self.task, material.train, plan, self.event)
        self.state = State()
        self.loss_scale = LossScale(plan.precision == "fp16")
        self.early_end = EarlyEnd(run, plan, self.rank == 0, self._agree, self.event)
        self.checkpointer = Checkpointer(run, plan, self.rank, plan.mesh.world_size, write_event=self.journal.event)
        here.at("restoring")
        self._restore()
        self.first_step = self.state.step
        here.step_done(self.state.step, 0.0)
        self.own = Own(models.repeated_layers(self.engine.model), device)
        self.pace = Pace(self.rank, plan.mesh.world_size, self._say_slow)
        steps_per_epoch = material.train.num_items / plan.batch.global_batch_size
        now = time.monotonic()
        self.saving = Cadence(plan.checkpoint.every, steps_per_epoch, now, self.state.step)
        self.evaluating = Cadence(plan.evaluate_every, steps_per_epoch, now, max(0, self.state.evaluated_step))

    def run_to_the_end(self) -> None:
        """Evaluate, train, evaluate, save; or stop where told to."""
        self._announce()
        due = self._due_at_the_start()
        while True:
            if due["stop"] or (due["evaluate"] and not self._evaluate()):
                self._leave()
                return
            if self._over:
                break
            if due["save"] or (due["evaluate"] and self._keeps_best):
                self._save()
            due = self._step()
        if self.state.evaluated_step != self.state.step and not self._evaluate():
            self._leave()
        else:
            self._finish()

    def _due_at_the_start(self) -> dict[str, bool]:
        """The first evaluation, or the one that a stop or a crash came before."""
        evaluates = self.state.evaluated_step < 0 or self._agree(self.rank == 0 and self.evaluating.due(self.state.step, time.monotonic()))
        return {"stop": self._agree(self.stop.requested), "evaluate": evaluates, "save": False}

    @property
    def _over(self) -> bool:
        return self.state.step >= self.num_steps or self.early_end.reached

    @property
    def _keeps_best(self) -> bool:
        """Whether what was just evaluated must be saved too, so that the best can be kept."""
        return self.plan.checkpoint.keep_best > 0 and self.material.evaluation is not None and self.state.step > self.first_step

    def _step(self) -> dict[str, bool]:
        """One optimizer step over one global batch; what is due after it, agreed over all ranks."""
        started = time.monotonic()
        self.own.begin(self.pace.measures)
        here.at("data", detail=str(self.material.train.directory))
        step_batch = self.batches.step(self.state.step)
        self.own.loaded(time.monotonic() - started)
        loss_sum = self._accumulate(step_batch)
        here.peak_memory(functools.partial(peak_memory_bytes, self.device))
        totals = self._add_up(loss_sum)
        loss = totals["loss"] / max(1, step_batch.num_supervised)
        gradient_norm = math.sqrt(totals["squared_norm"]) / self.loss_scale.value if totals["squared_norm"] >= 0 else math.nan
        learning_rate = self.schedule.at(self.state.step)
        self._apply_or_skip(loss, gradient_norm, learning_rate)
        self.state.step += 1
        self.state.num_items += step_batch.num_items
        self.state.num_tokens += step_batch.num_tokens
        here.step_done(self.state.step, time.monotonic() - started)
        if self.recorder:
            here.at("recording")
            seconds = time.monotonic() - started
            self.recorder.step(self.state.step, step_batch, loss, gradient_norm, learning_rate, seconds, self.state.num_tokens)
        return {key: totals[key] > 0 for key in ("stop", "save", "evaluate")}

    def _accumulate(self, step_batch: StepBatch) -> torch.Tensor:
        """Forward and backward over this rank's micro-batches; the sum of their losses."""
        factor = self.loss_scale.value / max(1, step_batch.num_supervised)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(step_batch.micro_batches) - 1
        for index, items in enumerate(step_batch.micro_batches):
            here.at("data", done=index, total=last + 1, detail=str(self.material.train.directory))
            began = time.monotonic()
            batch = to_device(self.task.collate(items), self.device)
            self.own.loaded(time.monotonic() - began)
            here.at("forward", done=index, total=last + 1)
            torch.manual_seed(dropout_seed(self.plan.training.seed, self.state.step, self.rank, index))
            loss_sum += self.engine.micro_step(batch, factor, index == last).loss_sum.detach()
        return loss_sum

    def _add_up(self, loss_sum: torch.Tensor) -> dict[str, float]:
        """The step's one exchange beside the gradients: sums over ranks, and what rank 0's clock or any rank's signal asks for."""
        next_step, now = self.state.step + 1, time.monotonic()
        leads = self.rank == 0
        wishes = [
            float(self.stop.requested or next_step == self.stop_at),
            float(leads and self.saving.due(next_step, now)),
            float(leads and self.evaluating.due(next_step, now)),
        ]
        squared_norm = self.engine.squared_gradient_norm().double().to(self.device)
        self.pace.worked(self.own.end())
        more = torch.tensor(wishes + self.pace.share(), dtype=torch.float64, device=self.device)
        vector = torch.stack([loss_sum, squared_norm, *more])
        here.at("exchange")
        here.waits(1)  # on a GPU the wait is in the copy of the result, which looks like no collective
        distributed.all_reduce(vector)
        loss, norm, stop, save, evaluation, *own = vector.tolist()
        here.waits(-1)
        self.pace.take(own)
        return {"loss": loss, "squared_norm": norm, "stop": stop, "save": save, "evaluate": evaluation}

    def _apply_or_skip(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Take the optimizer's step, or leave it out on all ranks where a number is not finite."""
        here.at("optimizer")
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            clip = self.plan.training.clip_norm
            coefficient = min(1.0, clip / (gradient_norm + 1e-6)) if clip > 0 else 1.0
            self.engine.apply(learning_rate, coefficient / self.loss_scale.value)
            self.loss_scale.good()
            self.state.num_skipped_in_a_row = 0
            return
        self.engine.discard()
        if math.isfinite(loss) and self.loss_scale.overflow():
            return
        self.state.num_skipped_in_a_row += 1
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        self.event("skipped", step=self.state.step + 1, reason=f"{what} is not finite", in_a_row=self.state.num_skipped_in_a_row)
        if self.state.num_skipped_in_a_row > self.plan.training.skip_nonfinite:
            raise DivergedError(
                f"the {what} was not finite in {self.state.num_skipped_in_a_row} steps in a row up to step {self.state.step + 1}; "
                f"lower training.learning_rate ({self.plan.training.learning_rate:g}) or look at the rows of the last steps"
            )

    def _evaluate(self) -> bool:
        """Measure on the held-out rows. False where a stop was asked for meanwhile; the evaluation is then made when the run goes on."""
        if self.material.evaluation is None:
            self._evaluated({})
            return True
        report = phase_report(self.run, "evaluating", "batches") if self.rank == 0 else lambda done, total: None
        try:
            metrics = evaluate(
                self.engine, self.task, self.material.evaluation, self.plan, report, lambda: self._agree(self.stop.requested)
            )
        except Interrupted:
            return False
        self._evaluated(metrics)
        if self.recorder:
            self.recorder.evaluation(self.state.step, metrics)
        self.early_end.judge(self.state.step, self.state.step >= self.num_steps, metrics)
        return True

    def _evaluated(self, metrics: dict[str, float]) -> None:
        self.state.metrics, self.state.evaluated_step = metrics, self.state.step
        self.evaluating.done(self.state.step, time.monotonic())

    def _save(self, wait: bool = False) -> None:
        """Save; `wait` until it is committed, and raise where it cannot be."""
        here.at("staging")
        self.saving.done(self.state.step, time.monotonic())
        if self.recorder:
            self.recorder.saves()
        extra: dict[str, Any] = {"loss_scale": self.loss_scale.value, "good_steps": self.loss_scale.good_steps, **self.early_end.state()}
        # Metrics of an older state would rank this one among the best by what it is not.
        metrics = self.state.metrics if self.state.evaluated_step == self.state.step else {}
        saved = self.checkpointer.save(self.engine.tensors(), self.state.progress(extra), metrics, wait=wait)
        if wait and not saved:
            raise StorageError(f"step {self.state.step} could not be saved before leaving: {self.checkpointer.problem}")

    def _restore(self) -> None:
        progress = self.checkpointer.load(self.engine.tensors())
        if progress is None:
            return
        self.engine.loaded()
        kept = TrainerState.of(progress, self.run.checkpoint(progress.step).name)
        self.event("resumed", step=progress.step, checkpoint=self.run.checkpoint(progress.step).name)
        evaluated_step = progress.step if kept.evaluated_step is None else kept.evaluated_step
        self.state = State(progress.step, progress.samples, progress.tokens, kept.num_skipped_in_a_row, kept.metrics, evaluated_step)
        self.loss_scale = LossScale(self.loss_scale.used, kept.loss_scale, kept.good_steps)
        self.early_end.restore(kept.best, kept.num_worse)

    def _leave(self) -> None:
        """Stopped on request: what can be saved within the grace is, and the next attempt goes on there."""
        signals, seconds_left = zip(*exchange.all_gather((self.stop.asked_by, self.stop.seconds_left())), strict=True)
        self.event("stopping", signal=next(filter(None, signals), "stop-at"))
        needed = exchange.all_gather(_seconds_of_last_save(self.run) if self.rank == 0 else 0.0)[0]
        changed = self.state.step > self.first_step
        if changed and min(seconds_left) < needed:
            self.checkpointer.finish()
            newest = newest_checkpoint(self.run)
            step = int(newest.name.removeprefix("step-")) if newest else 0
            reason = f"no save was begun: {min(seconds_left):.0f} s of grace were left, and the last one took {needed:.0f} s"
            self.event("stopped", step=step, reason=reason, num_steps_lost=self.state.step - step)
        else:
            if changed:
                self._save(wait=True)
            self.checkpointer.finish()
            self.event("stopped", step=self.state.step)
        self._close()

    def _say_slow(self, **fields: Any) -> None:
        """Said by the slow rank itself, which alone sees why it is."""
        host = os.uname().nodename
        slow = f"rank {self.rank} on {host} is {fields['factor']:.1f} times slower than the others for {fields['seconds']:.0f} s"
        own, others = fields["own_seconds"], fields["median_seconds"]
        # One that is stopped again and again may be so while it waits; then its own work tells nothing.
        numbers = f" ({own:.2f} s a step of its own, median {others:.2f} s)" if own > SLOW_FACTOR * others else ""
        line = f"{slow}{numbers}: {fields['reason']}"
        self.journal.event(self.run.events_file, "straggler", host=host, line=line, **fields)

    def _finish(self) -> None:
        """Everything is done and measured: save, and say so."""
        self._save(wait=True)
        self.checkpointer.finish()
        if self.rank == 0:
            write_atomically(self.run.finished_file, f"step {self.state.step}\n")
        self.event("finished", step=self.state.step, metrics=self.state.metrics)
        self._close()

    def _close(self) -> None:
        if self.recorder:
            self.recorder.finish()
        here.at("leaving")
        distributed.barrier()

    def _announce(self) -> None:
        if self.recorder:
            self.recorder.loaded()
        parameters = list(self.engine.model.parameters())
        length = self.material.train.num_tokens / max(1, self.material.train.num_samples)
        self.event(
            "training",
            first_step=self.state.step,
            total_steps=self.num_steps,
            num_parameters=sum(models.whole_shape(parameter).numel() for parameter in parameters),
            num_trainable=sum(models.whole_shape(parameter).numel() for parameter in parameters if parameter.requires_grad),
            flops_per_token=operations.flops_per_token(self.engine.model, self.material.config, int(length)),
            new_parameters=list(self.engine.new_parameters),
        )

    def _agree(self, wish: bool) -> bool:
        """Whether any rank wishes it."""
        vote = torch.tensor(float(wish), device=self.device)
        distributed.all_reduce(vote)
        return bool(vote > 0)

    def event(self, name: str, **fields: Any) -> None:
        """An event, written once for all ranks."""
        if self.rank == 0:
            self.journal.event(self.run.events_file, name, **fields)


def _deepspeed_config(run: RunDirectory) -> dict[str, Any]:
    """What the run's rendered configuration says: what was shown is what runs."""
    config: dict[str, Any] = read_json(run.rendered / "ds_config.json")
    return config


def _seconds_of_last_save(run: RunDirectory) -> float:
    """What the run's last save took; 0 before the first."""
    record = last_record(run.events_file, lambda event: event.get("event") == "saved")
    return float(record["seconds"]) if record else 0.0


def _total_items(plan: Plan, num_items: int) -> int:
    """Items the whole run consumes: whole steps for max_steps, exactly so many epochs otherwise."""
    if plan.length.unit == "steps":
        return int(plan.length.value) * plan.batch.global_batch_size
    return max(1, round(plan.length.value * num_items))


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """One seed for each forward pass, from where it stands in the run and nothing else."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) * 1_003 + micro_batch & (1 << 63) - 1
