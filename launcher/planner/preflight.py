"""Refuse what cannot run before it starts: for its memory, its checkpoints, or its time limit."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.errors import ConfigurationError, OutOfMemoryError, Problem, StorageError
from launcher.job.schema import Job
from launcher.planner.forecast import Forecast, forecast, sizes_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.plan import Plan
from launcher.planner.resolve.slurm_request import node_memory
from launcher.planner.speed.duration import DISK_RATE
from launcher.planner.suggestions import nearest_that_fit
from launcher.planner.target import GPUS_PER_NODE, NODE_MEMORY, Target, target_here, target_of_job
from launcher.runs.machine import Machine
from launcher.runs.wording import gib, in_phase

_FORCE = "--force starts it all the same"


def preflight(
    job: Job, plan: Plan, directory: Path, local: bool, force: bool = False, profiles: Profiles = CACHED
) -> Forecast | None:
    """Return the forecast of a plan about to start in `directory`; None if its model is unknown.

    profiles: the source of the model's program.
    Raises OutOfMemoryError, StorageError or ConfigurationError if it cannot run, unless `force`.
    """
    if plan.model.config is not None and plan.model.weights == "pretrained":  # its files say the sizes
        ways = "leave it out where its weights are loaded, or write model.weights: random"
        reason = f"stands for a model that is not here yet; {ways}"
        raise ConfigurationError(Problem("model.config", None, reason))
    if plan.script:
        return None
    here = Hardware.detect() if local else None
    target = target_of_job(job, plan) if here is None else target_here(plan, here, job.cluster.network)
    program = profiles.find(plan)
    if isinstance(program, Unknown):
        if not force:
            _check_state(plan, target, program)
        return None
    foreseen = forecast(plan, target, program, sizes_for(plan, target))
    if force:
        return foreseen
    assumed = here is None and node_memory(job.cluster) is None
    _check_memory(foreseen, GPUS_PER_NODE if here is None else len(here.gpus), assumed)
    _check_disk(foreseen, directory)
    _check_time(foreseen)
    return foreseen


def _check_state(plan: Plan, target: Target, unknown: Unknown) -> None:
    """Raise OutOfMemoryError if the training state alone does not fit, for a model whose activations cannot
    be forecast."""
    if unknown.profile is None or not target.memory_bytes:
        return
    needed, usable = Estimator(plan, unknown.profile).least(), target.usable_bytes(plan.mesh.device)
    if needed > usable:
        raise OutOfMemoryError(
            f"the parameters and their training state alone take {gib(needed)} of a rank, and {gib(usable)} of "
            f"{gib(target.memory_bytes)} can be used; cut them over more ranks, or train an adapter; {_FORCE}"
        )


def _check_memory(foreseen: Forecast, per_node: int, assumed: bool) -> None:
    """Raise OutOfMemoryError with the nearest plan that fits. assumed: the nodes' memory is a guess."""
    if foreseen.fits:
        return
    suggestions = nearest_that_fit(foreseen, 1, per_node)
    nearest = f"the nearest that fits: {suggestions[0].text}" if suggestions else "nothing near it fits"
    plan, lack = foreseen.plan, foreseen.lack
    if foreseen.fits_device:
        lack += (
            f" (of a node {gib(NODE_MEMORY)} are assumed; cluster.mem says what it has)" if assumed else ""
        )
        raise OutOfMemoryError(
            f"with memory.offload {plan.offload} this plan needs {lack}; {nearest}; {_FORCE}"
        )
    highest = foreseen.footprint.highest
    largest = max(highest.parts, key=lambda kind: highest.parts[kind])
    memory, usable = foreseen.target.memory_bytes, foreseen.target.usable_bytes(plan.mesh.device)
    most = f"most of it {largest}, {gib(highest.parts[largest])}"
    raise OutOfMemoryError(
        f"this plan needs {gib(highest.total)} of a rank ({in_phase(highest.name)}; {most}), "
        f"and {gib(usable)} of {gib(memory)} can be used; {nearest} (`launcher plan` shows more); {_FORCE}"
    )


def _check_disk(foreseen: Forecast, directory: Path) -> None:
    """Raise StorageError if there is no room for a checkpoint: a new one is written before an old one is
    deleted."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    usage, needed = shutil.disk_usage(there), foreseen.checkpoint_bytes
    if usage.total and needed > usage.free:  # what is no disk at all is refused by whoever writes to it
        raise StorageError(
            f"a checkpoint takes {gib(needed)}, and {gib(usage.free)} are free at {there}: "
            f"name a larger disk with --run-dir, or make room; {_FORCE}"
        )


def _check_time(foreseen: Forecast) -> None:
    """Raise ConfigurationError if loading, one step and one save alone exceed the time limit."""
    limit = foreseen.plan.slurm.time_limit_minutes
    if limit is None:
        return
    rate = Machine.read().disk_rate() or DISK_RATE
    disk = 2 * foreseen.checkpoint_bytes / (rate * foreseen.plan.mesh.nodes)
    if foreseen.step + disk > 60 * limit:
        needed = f"loading and saving take {disk:.0f} s at the least, a step {foreseen.step:.0f} s"
        reason = f"{needed}: nothing would ever be done; {_FORCE}"
        raise ConfigurationError(Problem("cluster.time_limit", 60.0 * limit, reason))
