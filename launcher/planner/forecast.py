"""Forecast a plan's memory and speed: the verdict before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from launcher.planner.dataset.dataset_size import DatasetSizes, Items
from launcher.planner.memory.estimate import Estimator, batch_of
from launcher.planner.memory.footprint import Footprint
from launcher.planner.memory.formulas import Formulas
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.memory.teacher import Taught, Teacher
from launcher.planner.memory.written_states import TaughtAhead
from launcher.planner.plan import Plan
from launcher.planner.speed.duration import Duration, duration
from launcher.planner.speed.step_time import Speed, speed
from launcher.planner.target import USABLE, Target
from launcher.runs import wording
from launcher.runs.wording import gib


@dataclass(frozen=True)
class Forecast:
    """Memory, speed and verdict of a plan on its target."""

    plan: Plan
    footprint: Footprint
    target: Target
    """The device for which it is made."""
    checkpoint_bytes: int
    """Bytes of one checkpoint on disk; 0 if the plan writes none."""
    program: Program
    """The source of the model's sizes: formulas, or a profile of the model's own class."""
    sizes: DatasetSizes
    """The samples of the data; nothing if the device's rates are unknown."""
    speed: Speed | None = None
    """None if the device's rates are unknown."""
    duration: Duration | None = None
    """Duration of the whole job; None if its number of steps or the speed is unknown."""
    padded: float | None = None
    """Tokens per sample with padding, for which the speed is forecast; None: the maximum length."""

    @property
    def items(self) -> Items | None:
        """Return the samples of an epoch; None if they or the speed are unknown."""
        return self.sizes.training

    @property
    def traced(self) -> bool:
        """Return whether it uses a profile of the model's own class."""
        of = [self.program]
        if isinstance(self.program, Taught):
            of = [self.program.student, self.program.teacher]
        elif isinstance(self.program, TaughtAhead):
            of = [self.program.student]
        return not all(isinstance(program, Formulas) for program in of)

    @property
    def step(self) -> float:
        """Return the seconds per step; 0 if the speed is unknown."""
        return self.speed.step if self.speed else 0.0

    @property
    def fits(self) -> bool:
        """Return whether every phase fits device and host memory; True if their size is unknown."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Return whether the highest phase fits a rank's device; True if its memory is unknown."""
        return not self.target.memory_bytes or self.footprint.highest.total <= self._usable_bytes

    @property
    def fits_host(self) -> bool:
        """Return whether offloaded state fits a node's host memory; True if that is unknown."""
        if not self.target.host_memory_bytes or self.plan.offload == "none":
            return True
        return self.host_bytes <= self.target.host_memory_bytes * USABLE["cpu"]

    @property
    def _usable_bytes(self) -> int:
        return self.target.usable_bytes(self.plan.mesh.device)

    @property
    def host_bytes(self) -> int:
        """Return the host memory that all ranks of a node need together."""
        return max(phase.host for phase in self.footprint.phases) * self.plan.mesh.ranks_per_node

    @property
    def lack(self) -> str:
        """Return the needed and usable memory in words, for a plan that does not fit."""
        if not self.fits_device:
            return f"{gib(self.footprint.highest.total)} of the {gib(self._usable_bytes)} of a rank"
        usable = int(self.target.host_memory_bytes * USABLE["cpu"])
        return f"{gib(self.host_bytes)} of the {gib(usable)} of the host's memory"

    def line(self) -> str:
        """Return the one-line summary that `run` and `submit` print."""
        highest, speed, there = self.footprint.highest, self.speed, self.target.memory_bytes
        # A CPU's process has Python and its libraries as well, which nobody plans.
        tensors = " of tensors" if self.plan.mesh.device == "cpu" else ""
        memory = f"{gib(highest.total)}{tensors} at most ({wording.in_phase(highest.name)}"
        if "step" not in highest.name:
            steps = (phase for phase in self.footprint.phases if phase.name == "steady step")
            memory += "".join(f", {gib(phase.total)} in a step" for phase in steps)
        memory += ")"
        if there:
            part = USABLE[self.plan.mesh.device]
            memory += (
                f" of the {gib(self._usable_bytes)} that a rank may use ({part:.0%} of its {gib(there)})"
            )
        rate = ""
        if speed:
            share = "MFU" if self.plan.mesh.device == "cuda" else "of the measured rate"
            share = f"{speed.utilisation:.0%} {share}"
            rate = f", about {speed.tokens_per_second:,.0f} tokens/s ({share})"
        end = f", {wording.duration(self.duration.total)} to the end" if self.duration else ""
        return f"{memory}{rate}{end}"

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast for JSON; sizes in bytes, times in seconds."""
        phases = {
            phase.name: {
                "bytes": phase.total,
                "live": phase.peak,
                "host_bytes": phase.host,
                "at": phase.where,
                "parts": phase.parts,
            }
            for phase in self.footprint.phases
        }
        memory_bytes = self.target.memory_bytes
        content: dict[str, Any] = {"fits": self.fits, "memory_bytes": memory_bytes, "phases": phases}
        content |= {"checkpoint_bytes": self.checkpoint_bytes, "traced": self.traced}
        if self.speed:
            s = self.speed
            content["speed"] = {
                "step_seconds": s.step, "tokens_per_second": s.tokens_per_second,
                "mfu": s.utilisation, "compute_seconds": s.compute,
                "communication_seconds": s.communication, "exposed_seconds": s.exposed,
                "optimizer_seconds": s.optimizer,
            }  # fmt: skip
        if d := self.duration:
            content["duration"] = {
                "seconds": d.total, "steps": d.num_steps, "data_seconds": d.data * d.num_steps,
                "saves": d.num_saves, "saving_seconds": d.saving,
                "evaluations": d.num_evaluations, "evaluating_seconds": d.evaluating,
                "gpu_hours": d.total * self.plan.mesh.world_size / 3600,
            }  # fmt: skip
        if self.items:
            content["epoch"] = {
                "items": self.items.num_items,
                "rows": self.items.num_rows,
                "mean_tokens": self.items.mean,
            }
        return content


def forecast_of(plan: Plan, target: Target, profiles: Profiles = CACHED) -> Forecast | Unknown:
    """Return the forecast of a plan, with its model and data looked up, or why its model's memory cannot be
    forecast.

    profiles: the source of the model's program.
    """
    program = profiles.find(plan)
    if isinstance(program, Unknown):
        return program
    return forecast(plan, target, program, sizes_for(plan, target))


def sizes_for(plan: Plan, target: Target) -> DatasetSizes:
    """Return the samples of a plan's data; they are not looked at if the target's speed is unknown anyway."""
    return DatasetSizes() if target.gpu is None else DatasetSizes.of(plan)


def forecast(plan: Plan, target: Target, program: Program, sizes: DatasetSizes) -> Forecast:
    """Return the forecast of a plan.

    program: its model. sizes: its data, as `sizes_for` has them.
    """
    estimator, gpu = Estimator(plan, program), target.gpu
    num_bytes = estimator.checkpoint_bytes
    foreseen = Forecast(plan, estimator.footprint(), target, num_bytes, program, sizes)
    if gpu is None:
        return foreseen
    items, held_out = sizes.training, sizes.held_out
    typical, share, padded = plan, 1.0, None
    if items is not None and not items.packed:
        # The samples' lengths are known: the speed is forecast for their mean length, with padding.
        padded = items.mean if plan.layout == "packed" else items.padded(plan.batch)
        length = max(1, round(padded))
        typical = plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})
        share = items.mean / length
    setting = replace(estimator.setting, batch=batch_of(typical))
    rate = speed(typical, estimator.units, program.blocks(setting), gpu)
    rate = replace(rate, tokens=round(rate.tokens * share), model_flops=rate.model_flops * share)
    if (teacher := estimator.teacher) is not None:
        of_teacher = typical.of_teacher() if isinstance(teacher, Teacher) else typical.as_frozen()
        beside = speed(of_teacher, teacher.units, teacher.blocks(setting.batch), gpu)
        rate = replace(rate, compute=rate.compute + beside.evaluation)
    lasts = duration(plan, rate, num_bytes, gpu, target.disk_rate, items, held_out)
    return replace(foreseen, speed=rate, duration=lasts, padded=padded)
