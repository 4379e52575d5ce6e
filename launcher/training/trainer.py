"""The training loop: from a run directory with a plan to a trained, saved, evaluated model."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher.errors import CheckpointError, StorageError
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.places import here
from launcher.runs.status import newest_checkpoint
from launcher.runs.tail import last_record
from launcher.tasks.task import Draws
from launcher.training import engines, exchange
from launcher.training.cadence import Cadence
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.data.batches import Batches, StepBatch, total_items
from launcher.training.data.order import Order
from launcher.training.devices import name_of, peak_memory_bytes, start_process_group, to_device
from launcher.training.early_stopping import EarlyEnd
from launcher.training.engines.operators import build_operators
from launcher.training.evaluation import Interrupted, evaluate
from launcher.training.inputs import TrainingInputs, phase_report
from launcher.training.model import loading as models
from launcher.training.model import pretrained
from launcher.training.model.loss_check import check_loss
from launcher.training.precision import LossScale
from launcher.training.reporting.divergence import Divergence
from launcher.training.reporting.pace import SLOW_FACTOR, Own, Pace
from launcher.training.reporting.recording import Recorder, description
from launcher.training.reporting.symptoms import Sample, Symptoms
from launcher.training.reporting.tracking import Journal
from launcher.training.reporting.whereabouts import say_compiling, waited
from launcher.training.rescue import Rescue
from launcher.training.samples import Shown
from launcher.training.schedule import Schedule
from launcher.training.signals import StopRequest
from launcher.training.state import State, TrainerState


def train(
    run: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Run the plan to its end, or to a stop, going on from the newest whole checkpoint. Called by every rank."""
    here.at("preparing")
    planned, plan = plan, pretrained.settled(plan)
    material = TrainingInputs.prepare(run, plan)
    here.at("building operators")
    build_operators(plan, phase_report(run, "building operators", "operators"))
    here.at("loading")
    device = start_process_group(plan)
    waited.watch()
    if plan.model.compile:
        say_compiling()
    trainer = Trainer(run, plan, material, device, stop, stop_at, run.attempt(attempt))
    if plan != planned:
        now, then = (
            f"{one.layout} samples with {one.attention} attention and the {one.head} head"
            for one in (plan, planned)
        )
        trainer.event(
            "noted",
            text=f"the model's config was not here when this was planned: it takes {now}, where {then} had "
            "been planned",
        )
    trainer.run_to_the_end()


class Trainer:
    """One attempt of a run on one rank. Constructing it loads the model and the checkpoint; `run_to_the_end`
    trains."""

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        material: TrainingInputs,
        device: torch.device,
        stop: StopRequest,
        stop_at: int | None,
        directory: Path,
    ) -> None:
        self.run, self.plan, self.material, self.device, self.stop, self.stop_at = (
            run,
            plan,
            material,
            device,
            stop,
            stop_at,
        )
        self.rank = distributed.get_rank()
        self.journal = Journal()
        self.task = material.task
        num_items = total_items(plan, material.train.num_items)
        order = Order(plan.training.seed, material.train.num_items, shuffle=True)
        self.batches = Batches(material.train, order, plan.batch, self.rank, num_items)
        self.num_steps = self.batches.num_steps
        self.schedule = Schedule.of(plan.training, self.num_steps)
        here.at("loading")
        self.event("phase", phase="loading")
        self.recorder = Recorder(run, plan, device, self.journal) if self.rank == 0 else None
        self.engine = engines.build(
            plan, self.task, material.config, _deepspeed_config(run) if plan.engine == "deepspeed" else {}
        )
        if self.rank == 0:
            material.save_model_files(run, plan, self.engine.model)
        here.at("checking the loss")
        self.event("phase", phase="checking the loss")
        check_loss(self.engine, self.task, material.train, plan, self.event)
        self.shown = Shown.of(self.task, material.evaluation, plan, self.rank)
        self.state = State()
        self.loss_scale = LossScale(plan.precision == "fp16")
        self.divergence = Divergence(plan.training, self.event)
        self.early_end = EarlyEnd(run, plan, self.rank == 0, self._agree, self.event)
        self.checkpointer = Checkpointer(
            run, plan, self.rank, plan.mesh.world_size, write_event=self.journal.event
        )
        here.at("restoring")
        tensors = self.engine.state_dict()
        chance, said = self.task.chance_loss(material.config), self._restore(tensors)
        in_memory = plan.offload == "none" or plan.offload_to == "cpu"
        sample = Sample(self.engine, tensors if in_memory else {})
        self.symptoms = Symptoms(
            plan.training, self.schedule, chance, sample, self.event, self.state.step, said
        )
        self.first_step = self.saved_step = self.state.step
        save = functools.partial(self._save_tensors, tensors, wait=True)
        self.rescue = Rescue(
            directory,
            device,
            plan.mesh.world_size,
            save if in_memory else None,
            self.checkpointer.finish_here,
        )
        here.step_done(self.state.step, 0.0)
        self.own = Own(models.repeated_layers(self.engine.model), device)
        self.pace = Pace(self.rank, plan.mesh.world_size, self._say_slow)
        steps_per_epoch = material.train.num_items / plan.batch.global_batch_size
        now = time.monotonic()
        self.saving = Cadence(plan.checkpoint.every, steps_per_epoch, now, self.state.step)
        self.evaluating = Cadence(
            plan.evaluate_every, steps_per_epoch, now, max(0, self.state.evaluated_step)
        )

    def run_to_the_end(self) -> None:
        """Evaluate, train, evaluate, save; or stop where told to."""
        self._announce()
        due = self._due_at_the_start()
        if self.divergence.rewinds and self.state.step == 0:
            self._save()  # so that there is something to go back to from the first spike on
        while True:
            if due["stop"] or (due["evaluate"] and not self._evaluate()):
                self._leave()
                return
            if self._over:
                break
            if (due["save"] or (due["evaluate"] and self._keeps_best)) and not self.divergence.suspicious:
                self._save()
            due = self._step()
        if self.state.evaluated_step != self.state.step and not self._evaluate():
            self._leave()
        else:
            self._finish()

    def _due_at_the_start(self) -> dict[str, bool]:
        """The first evaluation, or the one that a stop or a crash came before."""
        evaluates = self.state.evaluated_step < 0 or self._agree(
            self.rank == 0 and self.evaluating.due(self.state.step, time.monotonic())
        )
        return {"stop": self._agree(self.stop.requested), "evaluate": evaluates, "save": False}

    @property
    def _over(self) -> bool:
        return self.state.step >= self.num_steps or self.early_end.reached

    @property
    def _keeps_best(self) -> bool:
        """Whether what was just evaluated must be saved too, so that the best can be kept."""
        return (
            self.plan.checkpoint.keep_best > 0
            and self.material.evaluation is not None
            and self.state.step > self.first_step
        )

    def _step(self) -> dict[str, bool]:
        """One optimizer step over one global batch; what is due after it, agreed over all ranks."""
        started = time.monotonic()
        self.own.begin(self.pace.measures)
        here.at("data", detail=str(self.material.train.directory))
        step_batch = self.batches.step(self.state.step)
        self.own.loaded(time.monotonic() - started)
        with self.rescue.passes(self.state.step, self.state.step == self.saved_step):
            loss_sum = self._accumulate(step_batch)
            here.peak_memory(functools.partial(peak_memory_bytes, self.device))
            totals = self._add_up(loss_sum)
        loss = totals["loss"] / max(1, step_batch.num_supervised)
        scale = self.loss_scale.value
        gradient_norm = math.sqrt(totals["squared_norm"]) / scale if totals["squared_norm"] >= 0 else math.nan
        learning_rate = self.schedule.at(self.state.step)
        here.at("optimizer")
        verdict = self.divergence.judge(self.state.step + 1, loss, gradient_norm, self.loss_scale)
        if verdict == "apply":
            clip = self.plan.training.clip_norm
            coefficient = min(1.0, clip / (gradient_norm + 1e-6)) if clip > 0 else 1.0
            self.engine.optimizer_step(learning_rate, coefficient / scale)
            self.symptoms.note(self.state.step + 1, loss, gradient_norm)
        else:
            self.engine.zero_grad()
        self.state.step += 1
        self.state.num_items += step_batch.num_items
        self.state.num_tokens += step_batch.num_tokens
        here.step_done(self.state.step, time.monotonic() - started)
        if self.recorder:
            here.at("recording")
            seconds = time.monotonic() - started
            self.recorder.step(
                self.state.step,
                step_batch,
                loss,
                gradient_norm,
                learning_rate,
                seconds,
                self.state.num_tokens,
            )
        if verdict == "rewind":
            self._rewind()
        return {key: totals[key] > 0 for key in ("stop", "save", "evaluate")}

    def _rewind(self) -> None:
        """Take the weights of a checkpoint before back, and go on behind the samples since. Raises
        DivergedError where there is none."""
        tensors = self.engine.state_dict()
        progress = None
        for until in self.divergence.checkpoints_before():
            with contextlib.suppress(CheckpointError):
                progress = progress or self.checkpointer.load(tensors, until=until)
        if progress is None:
            raise self.divergence.nowhere_to_go()
        self.engine.after_load()
        self.divergence.rewound(progress.step, self.state.step)
        if self._save(wait=True, must=False):
            self.checkpointer.remove(range(progress.step + 1, self.state.step))

    def _accumulate(self, step_batch: StepBatch) -> torch.Tensor:
        """Forward and backward over this rank's micro-batches; the sum of their losses."""
        factor = self.loss_scale.value / max(1, step_batch.num_supervised)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(step_batch.micro_batches) - 1
        draws = Draws(self.plan.training.seed, self.state.step)
        for index, items in enumerate(step_batch.micro_batches):
            here.at("data", done=index, total=last + 1, detail=str(self.material.train.directory))
            began = time.monotonic()
            batch = to_device(self.task.collate(items, draws), self.device)
            self.own.loaded(time.monotonic() - began)
            here.at("forward", done=index, total=last + 1)
            torch.manual_seed(dropout_seed(self.plan.training.seed, self.state.step, self.rank, index))
            loss_sum += self.engine.micro_step(batch, factor, index == last).loss_sum.detach()
        return loss_sum

    def _add_up(self, loss_sum: torch.Tensor) -> dict[str, float]:
        """The step's one exchange beside the gradients: sums over ranks, and what rank 0's clock or any
        rank's signal asks for."""
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

    def _evaluate(self) -> bool:
        """Measure on the held-out rows. False where a stop was asked for meanwhile; the evaluation is then
        made when the run goes on."""
        if self.material.evaluation is None:
            self._evaluated({})
            return True
        report = (
            phase_report(self.run, "evaluating", "batches") if self.rank == 0 else lambda done, total: None
        )
        details: dict[str, Any] = {}
        try:
            metrics = evaluate(
                self.engine,
                self.task,
                self.material.evaluation,
                self.plan,
                report,
                lambda: self._agree(self.stop.requested),
                lambda: self.stop.requested,
                details.update,
            )
        except Interrupted:
            return False
        self._evaluated(metrics)
        self.task.adopt_evaluation(details)
        answers = self._answers()
        if self.recorder:
            self.recorder.evaluation(self.state.step, metrics, details, answers)
        self.early_end.judge(self.state.step, self.state.step >= self.num_steps, metrics)
        return True

    def _answers(self) -> list[dict[str, Any]]:
        """What the model says of the rows that are shown; nothing where a stop came while it wrote."""
        if self.shown is None:
            return []
        answers = self.shown.answers(self.engine, self.task, self.plan, lambda: self.stop.requested)
        return [] if self.task.generates and self._agree(self.stop.requested) else answers

    def _evaluated(self, metrics: dict[str, float]) -> None:
        self.state.metrics, self.state.evaluated_step = metrics, self.state.step
        self.evaluating.done(self.state.step, time.monotonic())

    def _save(self, wait: bool = False, must: bool = True) -> bool:
        """Save; `wait` until it is committed, and raise where it `must` be and cannot. Whether it is, as far
        as that is known."""
        here.at("staging")
        self.saving.done(self.state.step, time.monotonic())
        if self.recorder:
            self.recorder.saves()
        saved = self._save_tensors(self.engine.state_dict(), wait)
        if wait and must and not saved:
            raise StorageError(
                f"step {self.state.step} could not be saved before leaving: {self.checkpointer.problem}"
            )
        return saved

    def _save_tensors(self, tensors: dict[str, torch.Tensor], wait: bool) -> bool:
        extra: dict[str, Any] = {
            "loss_scale": self.loss_scale.value,
            "good_steps": self.loss_scale.good_steps,
        }
        extra |= self.early_end.state() | self.divergence.state() | {"said": self.symptoms.said}
        # Metrics of an older state would rank this one among the best by what it is not.
        metrics = self.state.metrics if self.state.evaluated_step == self.state.step else {}
        self.saved_step = self.state.step
        return self.checkpointer.save(tensors, self.state.progress(extra), metrics, wait=wait)

    def _restore(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Go on from the newest checkpoint, if there is one; the kinds of symptoms that the run has spoken
        of."""
        progress = self.checkpointer.load(tensors)
        if progress is None:
            return []
        self.engine.after_load()
        kept = TrainerState.of(progress, self.run.checkpoint(progress.step).name)
        self.event("resumed", step=progress.step, checkpoint=self.run.checkpoint(progress.step).name)
        evaluated_step = progress.step if kept.evaluated_step is None else kept.evaluated_step
        self.state = State(progress.step, progress.samples, progress.tokens, kept.metrics, evaluated_step)
        self.loss_scale = LossScale(self.loss_scale.used, kept.loss_scale, kept.good_steps)
        self.early_end.restore(kept.best, kept.num_worse)
        self.divergence.restore(kept.model_dump())
        return kept.said

    def _leave(self) -> None:
        """Stopped on request: what can be saved within the grace is, and the next attempt goes on there."""
        signals, seconds_left = zip(
            *exchange.all_gather((self.stop.asked_by, self.stop.seconds_left())), strict=True
        )
        self.event("stopping", signal=next(filter(None, signals), "stop-at"))
        needed = exchange.all_gather(_seconds_of_last_save(self.run) if self.rank == 0 else 0.0)[0]
        changed = self.state.step > self.first_step
        if changed and min(seconds_left) < needed:
            self.checkpointer.finish()
            newest = newest_checkpoint(self.run)
            step = int(newest.name.removeprefix("step-")) if newest else 0
            reason = (
                f"no save was begun: {min(seconds_left):.0f} s of grace were left, and the last one took "
                f"{needed:.0f} s"
            )
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
        slow = (
            f"rank {self.rank} on {host} is {fields['factor']:.1f} times slower than the others for "
            f"{fields['seconds']:.0f} s"
        )
        own, others = fields["own_seconds"], fields["median_seconds"]
        # One that is stopped again and again may be so while it waits; then its own work tells nothing.
        numbers = (
            f" ({own:.2f} s a step of its own, median {others:.2f} s)" if own > SLOW_FACTOR * others else ""
        )
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
        length = self.material.train.num_tokens / max(1, self.material.train.num_samples)
        about = description(self.engine, self.material.config, int(length))
        about["device"] = name_of(self.device)
        self.event("training", first_step=self.state.step, total_steps=self.num_steps, **about)

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


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """One seed for each forward pass, from where it stands in the run and nothing else."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) * 1_003 + micro_batch & (1 << 63) - 1
