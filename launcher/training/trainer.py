"""The training loop on one rank: steps, with evaluations, saves, rewinds and stops between them."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher.errors import StorageError
from launcher.plain_files import read_json
from launcher.planner.axes import LOSS_AXES
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.places import here
from launcher.runs.status import newest_checkpoint
from launcher.runs.versions import PACKAGES, versions
from launcher.tasks.task import Draws
from launcher.training import engines, step_totals, stopping
from launcher.training.averaging import AveragedEngine
from launcher.training.by_source import LossBySource
from launcher.training.cadence import Cadence
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.data.batches import StepBatch
from launcher.training.data.feed import Feed
from launcher.training.data.stream_batches import batches_of
from launcher.training.devices import name_of, peak_memory_bytes
from launcher.training.early_stopping import EarlyEnd
from launcher.training.held_out import HeldOut
from launcher.training.inputs import TrainingInputs
from launcher.training.model import loading as models
from launcher.training.model.loss_check import check_loss
from launcher.training.model.teacher import written_out
from launcher.training.noise import EmbeddingNoise
from launcher.training.precision import LossScale
from launcher.training.reporting.divergence import Divergence
from launcher.training.reporting.journal import Journal
from launcher.training.reporting.pace import Own, Pace, straggler
from launcher.training.reporting.recording import Recorder, StepSeconds, description
from launcher.training.reporting.symptoms import Sample, Symptoms
from launcher.training.rescue import Rescue
from launcher.training.schedule import Schedule, stage_at
from launcher.training.signals import StopRequest
from launcher.training.state import Counters, State
from launcher.training.state_keeper import StateKeeper
from launcher.training.staying_near import NearTheStart
from launcher.training.step_totals import Due, StepTotals


class Trainer:
    """One attempt of a run on one rank: `load()` the model and the newest checkpoint, then
    `run_to_the_end()`."""

    def __init__(
        self,
        run: RunDirectory,
        plan: Plan,
        material: TrainingInputs,
        device: torch.device,
        stop: StopRequest,
        stop_at: int | None,
        attempt: Path,
    ) -> None:
        """Prepare the attempt in the directory `attempt`, to stop after step `stop_at`. Needs the process
        group."""
        self.run, self.plan, self.material, self.device = run, plan, material, device
        self.stop, self.stop_at, self.attempt = stop, stop_at, attempt
        self.rank = distributed.get_rank()
        self.data_rank = plan.mesh.data_rank(self.rank)
        self.task, self.journal = material.task, Journal()
        self.batches = batches_of(material.train, material.stream, plan, self.data_rank, self.task.mixes)
        self.num_steps = self.batches.num_steps
        draws = functools.partial(Draws, plan.training.seed, training=True)
        self.feed = Feed(self.task, self.batches, plan, draws, device, material.logits)
        self.by_source = LossBySource(material.task, material.train, device)
        self.schedule = Schedule.of(plan.training, self.num_steps)
        self.state = State()
        self.saves = not plan.training.is_range_test  # the weights of a range test are of no use
        self.noise: EmbeddingNoise | None = None
        self.average: AveragedEngine | None = None
        self.loss_scale = LossScale(plan.precision == "fp16")
        self.divergence = Divergence(plan.training, self.event)
        self.early_end = EarlyEnd(run, plan, self.rank == 0, self._agree, self.event)
        self.counters = Counters(self.state, self.loss_scale, self.divergence, self.early_end, self.batches)

    def load(self) -> None:
        """Load the model and the newest complete checkpoint. Called by all ranks together."""
        here.at("loading")
        self.event("phase", phase="loading")
        self.recorder = Recorder(self.run, self.plan, self.device, self.journal) if self.rank == 0 else None
        ds_config = read_json(self.run.rendered / "ds_config.json") if self.plan.engine == "deepspeed" else {}
        self.task.distillation = written_out(self.run, self.plan)
        self.engine = engines.build(self.plan, self.task, self.material.config, ds_config)
        if (near := self.plan.training.l2_sp) is not None:
            self.engine = NearTheStart(self.engine, near, self.plan)
        if (ema := self.plan.training.ema) is not None:
            self.engine = self.average = AveragedEngine(self.engine, ema.decay)
        if (alpha := self.plan.training.neftune_noise_alpha) is not None:
            self.noise = EmbeddingNoise(self.engine.model, alpha, self.plan.training.seed)
        if self.rank == 0:
            self.material.save_model_files(self.run, self.plan, self.engine.model)
        here.at("checking the loss")
        self.event("phase", phase="checking the loss")
        check_loss(self.engine, self.task, self.material.train, self.plan, self.event)
        self.held_out = HeldOut(self.run, self.plan, self.material, self.engine, self.stop, self._agree)
        world_size = self.plan.mesh.world_size
        self.checkpointer = Checkpointer(
            self.run, self.plan, self.rank, world_size, write_event=self.journal.event
        )
        self.checkpointer.open()
        here.at("restoring")
        self.keeper = StateKeeper(self.run, self.engine, self.checkpointer, self.counters, self.event)
        tensors = self.keeper.restore()
        self._watch(tensors)

    def _watch(self, tensors: dict[str, torch.Tensor]) -> None:
        """Create the monitors of the steps: symptoms, out of memory, pace, save and evaluation intervals."""
        plan, step, world_size = self.plan, self.state.step, self.plan.mesh.world_size
        chance = self.task.chance_loss(self.material.config)
        in_memory = plan.offload == "none" or plan.offload_to == "cpu"
        sample = Sample(self.engine, tensors if in_memory else {})
        self.symptoms = Symptoms(
            plan.training, self.schedule, chance, sample, self.event, step, self.counters.told
        )
        self.first_step = step
        save = functools.partial(self.keeper.save, tensors, wait=True) if in_memory and self.saves else None
        self.rescue = Rescue(self.attempt, self.device, world_size, save, self.checkpointer.finish_here)
        here.steps_begin(step)
        self.own = Own(models.repeated_layers(self.engine.model), self.device)
        say_slow = functools.partial(straggler, self.journal, self.run.events_file)
        self.pace = Pace(self.rank, world_size, say_slow)
        # Streamed rows have no epochs.
        steps_per_epoch = (self.batches.items_per_epoch or math.inf) / plan.batch.global_batch_size
        now = time.monotonic()
        self.saving = Cadence(plan.checkpoint.every, steps_per_epoch, now, step)
        self.evaluating = Cadence(
            plan.evaluate_every, steps_per_epoch, now, max(0, self.state.evaluated_step)
        )

    def run_to_the_end(self) -> None:
        """Evaluate, train, evaluate and save; or stop on request."""
        self._announce()
        due = self._due_at_the_start()
        if self.divergence.rewinds and self.state.step == 0:
            self._save()  # so that the first spike can already rewind
        while True:
            if due.stop or (due.evaluate and not self._evaluate()):
                self._leave()
                return
            if self.state.step >= self.num_steps or self.early_end.reached:
                break
            if (due.save or (due.evaluate and self._keeps_best)) and not self.divergence.suspicious:
                self._save()
            due = self._step()
        if self.state.evaluated_step != self.state.step and not self._evaluate():
            self._leave()
        else:
            self._finish()

    def _due_at_the_start(self) -> Due:
        """Return the actions due before the first step, including an evaluation that a stop or crash
        prevented."""
        due_now = self.rank == 0 and self.evaluating.due(self.state.step, time.monotonic())
        evaluates = self.state.evaluated_step < 0 or self._agree(due_now)
        return Due(stop=self._agree(self.stop.requested), evaluate=evaluates)

    @property
    def _keeps_best(self) -> bool:
        """Return whether every evaluated state must be saved too, so that the best can be kept."""
        evaluates = self.material.evaluation is not None
        return self.plan.checkpoint.keep_best > 0 and evaluates and self.state.step > self.first_step

    def _step(self) -> Due:
        """Take one optimizer step over one global batch; return the actions due after it, the same on all
        ranks."""
        started = time.monotonic()
        self.own.begin(self.pace.measures)
        here.at("data", detail=str(self.batches.directory))
        step_batch = self.feed.step(self.state.step)
        self.data_seconds = 0.0
        self._loaded_since(started)
        self._thaw()
        with self.rescue.passes(self.state.step, self.state.step == self.keeper.saved_step):
            loss_sum = self._accumulate(step_batch)
            here.peak_memory(functools.partial(peak_memory_bytes, self.device))
            totals = self._add_up(loss_sum)
        loss = totals.loss_sum / max(1, step_batch.num_supervised)
        scale = self.loss_scale.value
        gradient_norm = math.sqrt(totals.squared_norm) / scale if totals.squared_norm >= 0 else math.nan
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
        self.state.took(step_batch)
        seen = math.nan if self.divergence.skipping else loss
        self.early_end.judge_loss(self.state.step, seen, learning_rate)
        seconds = time.monotonic() - started
        here.step_done(self.state.step, seconds)
        if self.recorder:
            here.at("recording")
            times = StepSeconds(seconds, self.data_seconds)
            by_source = self.by_source.losses(step_batch.items, totals.by_source)
            self.recorder.step(self.state, step_batch, loss, gradient_norm, learning_rate, times, by_source)
        if verdict == "rewind":
            self._rewind()
        return totals.due

    def _thaw(self) -> None:
        """Set the stage of `model.unfreeze` for this step, and note a new stage once."""
        unfreeze, step = self.plan.model.unfreeze, self.state.step
        stage = stage_at(unfreeze, step, self.num_steps)
        if stage > stage_at(unfreeze, step - 1, self.num_steps):
            lowest = unfreeze[stage - 1].from_
            what = "all layers" if lowest == "embeddings" else f"layer {lowest} and all above it"
            self.event("noted", text=f"from step {step + 1} on {what} train (model.unfreeze)")
        self.engine.stage = stage

    def _accumulate(self, step_batch: StepBatch) -> torch.Tensor:
        """Run forward and backward over this rank's micro-batches; return the sum of their losses, fp64
        scalar."""
        factor = self.loss_scale.value / max(1, step_batch.num_supervised)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(step_batch.micro_batches) - 1
        self.by_source.begin()
        seed, step = self.plan.training.seed, self.state.step
        more = self.task.in_a_step(step_batch.supervised_by_source)
        for index, items in enumerate(step_batch.micro_batches):
            here.at("data", done=index, total=last + 1, detail=str(self.batches.directory))
            began = time.monotonic()
            batch = self.feed.batch(step, index, step_batch) | more
            self._loaded_since(began)
            here.at("forward", done=index, total=last + 1)
            torch.manual_seed(dropout_seed(seed, step, self.data_rank, index))
            if self.noise is not None:
                self.noise.expect(step, items)
            output = self.engine.micro_step(self.by_source.asked(batch), factor, index == last)
            loss_sum += output.loss_sum.detach()
            self.by_source.add(output, batch, items)
        return loss_sum

    def _loaded_since(self, began: float) -> None:
        """Count the time since `began` as waiting for data."""
        seconds = time.monotonic() - began
        self.data_seconds += seconds
        self.own.loaded(seconds)

    def _add_up(self, loss_sum: torch.Tensor) -> StepTotals:
        """Do the step's one all-reduce other than the gradients'. Rank 0's clock and any rank's stop signal
        decide what is due."""
        next_step, now = self.state.step + 1, time.monotonic()
        leads = self.rank == 0
        wishes = Due(
            self.stop.requested or next_step == self.stop_at,
            leads and self.saving.due(next_step, now),
            leads and self.evaluating.due(next_step, now),
        )
        squared_norm = self.engine.squared_gradient_norm().double().to(self.device)
        self.pace.worked(self.own.end())
        if not self.plan.mesh.counts(self.rank, LOSS_AXES):
            loss_sum = torch.zeros_like(loss_sum)  # another rank counts the same loss
            self.by_source.begin()
        share = self.pace.share()
        vector = step_totals.vector_of(loss_sum, squared_norm, wishes, share, self.by_source.sums)
        here.at("exchange")
        self.rescue.over()
        totals = step_totals.add_up(vector, len(share))
        self.pace.take(totals.own_seconds)
        return totals

    def _evaluate(self) -> bool:
        """Evaluate on the held-out rows. Return False after a stop request; the next attempt then evaluates."""
        self.feed.rest()
        ema = self.plan.training.ema
        measured = self.average if ema is not None and ema.evaluate else None
        with measured.averaged() if measured else contextlib.nullcontext():
            results = self.held_out.evaluate()
            if results is None:
                return False
            metrics, details = results
            self.state.metrics, self.state.evaluated_step = metrics, self.state.step
            self.evaluating.done(self.state.step, time.monotonic())
            if self.material.evaluation is None:
                return True
            answers = self.held_out.answers()
        if self.recorder:
            self.recorder.evaluation(self.state.step, metrics, details, answers)
        self.early_end.judge(self.state.step, self.state.step >= self.num_steps, metrics)
        return True

    def _save(self, wait: bool = False, must: bool = True) -> bool:
        """Save; with `wait`, until the checkpoint is committed. Return False if it is known to have failed.

        Raises StorageError if it `must` be committed and cannot.
        """
        self.saving.done(self.state.step, time.monotonic())
        if not self.saves:
            return True
        if self.material.stream is not None:
            self.event("prepared", **self.material.stream.to_dict())
        here.at("staging")
        saved = self.keeper.save(self.engine.state_dict(), wait)
        if wait and must and not saved:
            reason = f"step {self.state.step} could not be saved before leaving: {self.checkpointer.problem}"
            raise StorageError(reason)
        return saved

    def _rewind(self) -> None:
        """Restore the weights of an earlier checkpoint, and continue after the samples since."""
        step = self.keeper.rewind()
        if self._save(wait=True, must=False):
            self.checkpointer.remove(range(step + 1, self.state.step))

    def _leave(self) -> None:
        """Leave on request, with a save if the grace allows one; the next attempt resumes from there."""
        farewell = stopping.agree(self.run, self.stop, self.rank == 0)
        self.event("stopping", signal=farewell.signal)
        changed = self.state.step > self.first_step
        if changed and not (farewell.has_time_to_save and self.saves):
            self.checkpointer.finish()
            newest = newest_checkpoint(self.run)
            step = int(newest.name.removeprefix("step-")) if newest else 0
            reason = farewell.why_unsaved if self.saves else "a range test saves nothing, and begins anew"
            self.event("stopped", step=step, reason=reason, num_steps_lost=self.state.step - step)
        else:
            if changed:
                self._save(wait=True)
            self.checkpointer.finish()
            self.event("stopped", step=self.state.step)
        self._close()

    def _finish(self) -> None:
        """Save, and record that the run has finished."""
        stopping.patiently(lambda must: self._save(wait=True, must=must), self.stop, self._agree)
        self.checkpointer.finish()
        stopping.patiently(self._write_finished, self.stop, self._agree)
        share = self.recorder.data_share if self.recorder else None
        self.event("finished", step=self.state.step, metrics=self.state.metrics, data_share=share)
        self._close()

    def _write_finished(self, must: bool) -> bool:
        """Mark the run as finished; return whether that succeeded. Raises OSError if it `must` and cannot."""
        failed = False
        if self.rank == 0:
            try:
                write_atomically(self.run.finished_file, f"step {self.state.step}\n")
            except OSError:
                failed = True
                if must:
                    raise
        return not self._agree(failed)

    def _close(self) -> None:
        if self.recorder:
            self.recorder.finish()
        here.at("leaving")
        self.batches.close(distributed.barrier)

    def _announce(self) -> None:
        if self.recorder:
            self.recorder.loaded(self.state.step, self.batches.items_per_epoch)
        length = int(self.material.train.num_tokens / max(1, self.material.train.num_samples))
        about = description(self.engine, self.material.config, length, self.task.traits.unit)
        if self.plan.model.adapter is not None:
            about["adapter"] = self.plan.model.adapter.title
        about["device"], about["versions"] = name_of(self.device), versions(PACKAGES)
        self.event("training", first_step=self.state.step, total_steps=self.num_steps, **about)

    def _agree(self, wish: bool) -> bool:
        """Return whether any rank's `wish` is True. Called by all ranks together."""
        vote = torch.tensor(float(wish), device=self.device)
        distributed.all_reduce(vote)
        return bool(vote > 0)

    def event(self, name: str, **fields: Any) -> None:
        """Write an event, once for all ranks."""
        if self.rank == 0:
            self.journal.event(self.run.events_file, name, **fields)


def dropout_seed(seed: int, step: int, data_rank: int, micro_batch: int) -> int:
    """Return the seed of a forward pass, which depends only on its position in the run.

    Ranks that share their samples draw the same random numbers.
    """
    return ((seed * 1_000_003 + step) * 1_000_003 + data_rank) * 1_003 + micro_batch & (1 << 63) - 1
