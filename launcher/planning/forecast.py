"""Forecast a plan's memory and speed, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import NetworkName
from launcher.planning.duration import Duration, duration
from launcher.planning.epochs import Items, evaluation_items, training_items
from launcher.planning.footprint.estimate import Estimator, Footprint, batch_of, estimator
from launcher.planning.footprint.families import KNOWN, WITH_ADAPTERS, Program, nearest
from launcher.planning.gpus import GpuType, on_network
from launcher.planning.hardware import Hardware
from launcher.planning.measured import kind_of, rates_for, slack_kind
from launcher.planning.memory import gib, keeps_freed
from launcher.planning.model_config import config_of
from launcher.planning.plan import Plan
from launcher.planning.speed import Speed, speed
from launcher.runs import words
from launcher.runs.machine import Machine

Trace = Callable[[Plan], Program]
"""Makes a program of a plan's model from its real class."""
USABLE = {"cuda": 0.95, "cpu": 0.9}
"""The share of a device's memory that a plan may fill: what the formulas were ever under, and what else lives there."""


@dataclass(frozen=True)
class Forecast:
    """Memory, speed and verdict of a plan."""

    plan: Plan
    footprint: Footprint
    memory_bytes: int
    """Of one rank's device; 0 where it is not known."""
    checkpoint_bytes: int
    """Of one checkpoint on the disk."""
    speed: Speed | None = None
    trace: Trace | None = None
    """By the model's real class and not by the formulas."""
    host_memory_bytes: int = 0
    """Of a node's own memory, for what is offloaded; 0 where it is not known."""
    slack: float | None = None
    """As runs on this machine had it, of what comes and goes; None where it is assumed."""
    duration: Duration | None = None
    """Of the whole job; None where its number of steps or the speed is not known."""
    slack_kind: str = ""
    """Under what name a run of the plan keeps its own."""
    items: Items | None = None
    """What was seen of the training data; None where that is not in files here."""
    padded: float | None = None
    """Tokens of a sample with its padding, for which the speed is; None where every sample is taken to be as long as it may be."""
    gpu: GpuType | None = None
    """With whose rates the speed was foreseen."""
    disk_rate: float | None = None
    """Bytes a second of a node's disk, where it was measured."""

    @property
    def traced(self) -> bool:
        return self.trace is not None

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device and what is offloaded the host; True where the memory is not known."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        return not self.memory_bytes or self.footprint.highest.total <= self.memory_bytes * USABLE[self.plan.mesh.device]

    @property
    def fits_host(self) -> bool:
        known = self.host_memory_bytes and self.plan.offload != "none"
        return not known or self.host_bytes <= self.host_memory_bytes * USABLE["cpu"]

    @property
    def host_bytes(self) -> int:
        """What the ranks of a node need together of its own memory."""
        return max(phase.host for phase in self.footprint.phases) * self.plan.mesh.ranks_per_node

    @property
    def lack(self) -> str:
        """What the plan needs of a memory that has less."""
        if not self.fits_device:
            usable = int(self.memory_bytes * USABLE[self.plan.mesh.device])
            return f"{gib(self.footprint.highest.total)} of the {gib(usable)} of a rank"
        return f"{gib(self.host_bytes)} of the {gib(int(self.host_memory_bytes * USABLE['cpu']))} of the host's memory"

    def line(self) -> str:
        """The one-line summary that `run` and `submit` print."""
        highest = self.footprint.highest
        memory = f"{gib(highest.total)} of a rank's {gib(self.memory_bytes)}" if self.memory_bytes else f"{gib(highest.total)} a rank"
        memory += f" with the {gib(highest.slack)} of slack that runs here had" if self.slack else ""
        learnt = f", x{self.speed.correction:.2f} a step as runs here took" if self.speed and self.speed.correction != 1 else ""
        rate = f", about {self.speed.tokens_per_second:,.0f} tokens/s ({self._share()}{learnt})" if self.speed else ""
        end = f", {words.duration(self.duration.total)} to the end" if self.duration else ""
        return f"{memory} at the highest ({highest.name}){rate}{end}"

    def _share(self) -> str:
        assert self.speed is not None
        return f"{self.speed.utilisation:.0%} {'MFU' if self.plan.mesh.device == 'cuda' else 'of the measured rate'}"

    def to_dict(self) -> dict[str, Any]:
        """For machines; sizes in bytes, times in seconds."""
        phases = {
            phase.name: {"bytes": phase.total, "live": phase.peak, "host_bytes": phase.host, "at": phase.where, "parts": phase.parts}
            for phase in self.footprint.phases
        }
        content: dict[str, Any] = {"fits": self.fits, "memory_bytes": self.memory_bytes, "phases": phases}
        content |= {"checkpoint_bytes": self.checkpoint_bytes, "kind": kind_of(self.plan, self.gpu), "traced": self.traced}
        content |= {"slack": self.slack, "slack_kind": self.slack_kind}
        if self.speed:
            s = self.speed
            content["speed"] = {
                "step_seconds": s.step, "correction": s.correction,
                "tokens_per_second": s.tokens_per_second, "mfu": s.utilisation, "compute_seconds": s.compute,
                "communication_seconds": s.communication, "exposed_seconds": s.exposed, "optimizer_seconds": s.optimizer,
            }  # fmt: skip
        if d := self.duration:
            content["duration"] = {
                "seconds": d.total, "steps": d.num_steps, "data_seconds": d.data * d.num_steps, "saves": d.num_saves,
                "saving_seconds": d.saving, "evaluations": d.num_evaluations, "evaluating_seconds": d.evaluating,
                "gpu_hours": d.total * self.plan.mesh.world_size / 3600,
            }  # fmt: skip
        if self.items:
            content["epoch"] = {"items": self.items.num_items, "rows": self.items.num_rows, "mean_tokens": self.items.mean}
        return content


def forecast(
    plan: Plan,
    memory_bytes: int,
    gpu: GpuType | None = None,
    correction: float = 1.0,
    trace: Trace | None = None,
    host_memory_bytes: int = 0,
    slack: float | None = None,
    slack_kind: str = "",
    disk_rate: float | None = None,
) -> Forecast | None:
    """The forecast of a plan; None where its model's config cannot be read or its architecture is not known to the formulas.

    correction: what a step takes of what the speed model says, as runs on the same machine have shown. trace: go by the model's real
    class in place of the formulas. slack: the share of what comes and goes that is kept beside it, as runs on the same machine have shown.
    disk_rate: bytes a second of a node's disk, where it was measured.
    """
    made = _estimator(plan, trace, slack)
    if made is None:
        return None
    footprint = made.footprint()
    roomy = keeps_freed(max(phase.peak for phase in footprint.phases), memory_bytes)
    said = Forecast(plan, footprint, memory_bytes, made.checkpoint_bytes, None, trace, host_memory_bytes, slack, None, slack_kind)
    return said if gpu is None else _timed(said, made, gpu, correction, roomy, disk_rate)


def _timed(said: Forecast, made: Estimator, gpu: GpuType, correction: float, roomy: bool, disk_rate: float | None) -> Forecast:
    """The forecast with its speed and duration: for samples as long as they are, where they are padded and were looked at."""
    plan, items = said.plan, training_items(said.plan)
    if items is None or items.packed:
        padded, rate = None, speed(plan, made.units, made.segments(), gpu, correction, roomy)
    else:
        padded = items.mean if plan.layout == "packed" else items.padded(plan.batch)
        length = max(1, round(padded))
        shorter = plan.model_copy(update={"data": plan.data.model_copy(update={"max_length": length})})
        typical = _estimator(shorter, said.trace)
        assert typical is not None  # of the same model
        rate = speed(shorter, typical.units, typical.segments(), gpu, correction, roomy)
        rate = replace(rate, tokens=round(rate.tokens * items.mean / length), model_flops=rate.model_flops * items.mean / length)
    lasts = duration(plan, rate, said.checkpoint_bytes, gpu, disk_rate, items, evaluation_items(plan))
    return replace(said, speed=rate, duration=lasts, items=items, padded=padded, gpu=gpu, disk_rate=disk_rate)


def least_bytes(plan: Plan, trace: Trace | None = None) -> int:
    """Bytes that a rank's device needs whatever a pass takes, as `Estimator.least` has it; 0 where the formulas do not know the model."""
    made = _estimator(plan, trace)
    return made.least() if made is not None else 0


def forecast_here(plan: Plan, hardware: Hardware, network: NetworkName | None = None, trace: Trace | None = None) -> Forecast | None:
    """The forecast of a plan on this machine, with what was measured of it."""
    machine = Machine.read()
    memory = hardware.rank_memory(plan.mesh.device, plan.mesh.ranks_per_node)
    rates = rates_for(plan, hardware, machine)
    correction, kind = machine.correction(kind_of(plan, rates)), slack_kind(plan, hardware)
    gpu, slack = rates and on_network(rates, network), machine.slack(kind)
    return forecast(plan, memory, gpu, correction, trace, hardware.memory_bytes, slack, kind, machine.disk_rate())


def _estimator(plan: Plan, trace: Trace | None = None, slack: float | None = None) -> Estimator | None:
    if trace is not None:
        return Estimator(plan, trace(plan), batch_of(plan), slack)
    config = config_of(plan.model)
    try:
        return None if config is None else estimator(plan, config, slack=slack)
    except KeyError as error:
        key, value, where = "model.name", plan.model.name, "its config.json"
        if plan.model.config is not None:
            key, value, where = "model.config", str(plan.model.config.get("model_type")), "it"
        reason = f"{where} has no {error.args[0]}, which a {config and config.get('model_type')} model needs"
        raise ConfigurationError(Problem(key, value, reason)) from None


def why_not(plan: Plan) -> str:
    """Why there is no forecast, in one clause."""
    config = config_of(plan.model)
    if config is None:
        return f"no config.json of {plan.model.name} on this machine; fetch it, name its directory, or write model.config"
    kind = str(config.get("model_type"))
    if plan.model.adapter is not None and kind not in WITH_ADAPTERS:
        return f"the formulas know adapters beside {', '.join(WITH_ADAPTERS)}, and this is a {kind} model"
    if kind in KNOWN:
        return f"the formulas have {kind} for other tasks than {plan.task}"
    return f"the formulas do not know the architecture {kind}; the nearest they know is {nearest(kind, tasks.find(plan.task).traits)}"
