"""Forecast what a plan needs and how fast it is: the verdict before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from launcher.job.cluster import NetworkName
from launcher.planner.dataset.dataset_size import Items, evaluation_items, training_items
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator, batch_of
from launcher.planner.memory.footprint import Footprint
from launcher.planner.memory.formulas import Formulas
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.memory.program import Program
from launcher.planner.memory.teacher import Taught
from launcher.planner.plan import Plan
from launcher.planner.speed.duration import Duration, duration
from launcher.planner.speed.step_time import Speed, speed
from launcher.planner.target import USABLE, Target, target_here
from launcher.runs import wording
from launcher.runs.wording import gib


@dataclass(frozen=True)
class Forecast:
    """Memory, speed and verdict of a plan on its target."""

    plan: Plan
    footprint: Footprint
    target: Target
    """The device that it counts with."""
    checkpoint_bytes: int
    """The bytes of one checkpoint on the disk; 0 where the plan writes none."""
    program: Program
    """What its model is to it: formulas, or a profile of the model's real class."""
    speed: Speed | None = None
    """None where the device's rates are not known."""
    duration: Duration | None = None
    """Of the whole job; None where its number of steps or the speed is not known."""
    items: Items | None = None
    """What was seen of the training data; None where that is not in files here."""
    padded: float | None = None
    """Tokens of a sample with its padding, that the speed is of; None: all are as long as they may be."""

    @property
    def traced(self) -> bool:
        """Return whether it goes by a profile of the model's real class."""
        of = (
            (self.program.student, self.program.teacher)
            if isinstance(self.program, Taught)
            else (self.program,)
        )
        return not all(isinstance(program, Formulas) for program in of)

    @property
    def step(self) -> float:
        """Return the seconds of a step; 0 where the speed is not known."""
        return self.speed.step if self.speed else 0.0

    @property
    def fits(self) -> bool:
        """Return whether every phase fits the device and the host; True where their memory is not known."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Return whether the highest phase fits a rank's device; True where its memory is not known."""
        return not self.target.memory_bytes or self.footprint.highest.total <= self._usable_bytes

    @property
    def fits_host(self) -> bool:
        """Return whether what is offloaded fits a node's own memory; True where that is not known."""
        if not self.target.host_memory_bytes or self.plan.offload == "none":
            return True
        return self.host_bytes <= self.target.host_memory_bytes * USABLE["cpu"]

    @property
    def _usable_bytes(self) -> int:
        return self.target.usable_bytes(self.plan.mesh.device)

    @property
    def host_bytes(self) -> int:
        """Return what the ranks of a node need together of its own memory."""
        return max(phase.host for phase in self.footprint.phases) * self.plan.mesh.ranks_per_node

    @property
    def lack(self) -> str:
        """Return what the plan needs of a memory that has less, in words."""
        if not self.fits_device:
            return f"{gib(self.footprint.highest.total)} of the {gib(self._usable_bytes)} of a rank"
        usable = int(self.target.host_memory_bytes * USABLE["cpu"])
        return f"{gib(self.host_bytes)} of the {gib(usable)} of the host's memory"

    def line(self) -> str:
        """Return the summary that `run` and `submit` print, in one line."""
        highest, speed, there = self.footprint.highest, self.speed, self.target.memory_bytes
        memory = f"{gib(highest.total)} a rank"
        if there:
            part = USABLE[self.plan.mesh.device]
            memory = f"{gib(highest.total)} of the {gib(self._usable_bytes)} that a rank may use"
            memory += f" ({part:.0%} of its {gib(there)})"
        rate = ""
        if speed:
            share = "MFU" if self.plan.mesh.device == "cuda" else "of the measured rate"
            share = f"{speed.utilisation:.0%} {share}"
            rate = f", about {speed.tokens_per_second:,.0f} tokens/s ({share})"
        end = f", {wording.duration(self.duration.total)} to the end" if self.duration else ""
        return f"{memory} at the highest ({highest.name}){rate}{end}"

    def to_dict(self) -> dict[str, Any]:
        """Return it for machines; sizes in bytes, times in seconds."""
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


def forecast(
    plan: Plan, target: Target, profiles: Profiles = CACHED, program: Program | None = None
) -> Forecast | None:
    """Return the forecast of a plan; None where no pass of its model can be forecast.

    profiles: where the model's program comes from. program: the one that is known already.
    """
    program = program or profiles.program(plan)
    if program is None:
        return None
    estimator, gpu = Estimator(plan, program), target.gpu
    foreseen = Forecast(plan, estimator.footprint(), target, estimator.checkpoint_bytes, program)
    if gpu is None:
        return foreseen
    items, held_out = training_items(plan), evaluation_items(plan)
    typical, share, padded = plan, 1.0, None
    if items is not None and not items.packed:
        # Samples that were looked at: the speed is that of samples as long as they are, with their padding.
        padded = items.mean if plan.layout == "packed" else items.padded(plan.batch)
        length = max(1, round(padded))
        typical = plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})
        share = items.mean / length
    setting = replace(estimator.setting, batch=batch_of(typical))
    rate = speed(typical, estimator.units, program.blocks(setting), gpu)
    rate = replace(rate, tokens=round(rate.tokens * share), model_flops=rate.model_flops * share)
    if (teacher := estimator.teacher) is not None:
        beside = speed(typical.of_teacher(), teacher.units, teacher.blocks(setting.batch), gpu)
        rate = replace(rate, compute=rate.compute + beside.evaluation)
    lasts = duration(plan, rate, foreseen.checkpoint_bytes, gpu, target.disk_rate, items, held_out)
    return replace(foreseen, speed=rate, duration=lasts, items=items, padded=padded)


def forecast_here(
    plan: Plan,
    hardware: Hardware,
    network: NetworkName | None = None,
    profiles: Profiles = CACHED,
    program: Program | None = None,
) -> Forecast | None:
    """Return the forecast of a plan on this machine, with what was measured of it."""
    return forecast(plan, target_here(plan, hardware, network), profiles, program)
