"""Refuse a plan before it starts: memory, disk for checkpoints, time limit."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.errors import ConfigurationError, OutOfMemoryError, Problem, StorageError
from launcher.job.schema import Job
from launcher.planning.decide import NODE_MEMORY
from launcher.planning.duration import DISK_RATE
from launcher.planning.fitting import known
from launcher.planning.forecast import USABLE, Forecast, Trace, forecast, forecast_here
from launcher.planning.gpus import gpu_type, on_network
from launcher.planning.hardware import Hardware
from launcher.planning.memory import gib
from launcher.planning.nearest import PER_NODE, nearest_that_fit
from launcher.planning.plan import Plan
from launcher.planning.slurm import node_memory
from launcher.runs.machine import Machine

_FORCE = "--force starts it all the same"


def preflight(job: Job, plan: Plan, directory: Path, local: bool, force: bool = False, trace: Trace | None = None) -> Forecast | None:
    """The forecast of a plan that is to start now in `directory`; None where nothing is known of its model.

    `trace` goes by the model's real class where the formulas do not know it.
    Raises OutOfMemoryError, StorageError or ConfigurationError where it cannot run, unless `force`.
    """
    _check_sizes(plan)
    if plan.script:
        return None
    here = Hardware.detect() if local else None
    made = _forecast(job, plan, here, trace if trace is not None and not known(plan) else None)
    if made is None or force:
        return made
    assumed = here is None and node_memory(job.cluster) is None
    _check_memory(made, PER_NODE if here is None else len(here.gpus), assumed)
    _check_disk(made, directory)
    _check_time(made)
    return made


def _check_sizes(plan: Plan) -> None:
    """Raises ConfigurationError where a model is to be loaded whose sizes stand in the job file: its own files say what it is."""
    if plan.model.config is not None and plan.model.weights == "pretrained":
        reason = "stands for a model that is not here yet; leave it out where its weights are loaded, or write model.weights: random"
        raise ConfigurationError(Problem("model.config", None, reason))


def _forecast(job: Job, plan: Plan, here: Hardware | None, trace: Trace | None) -> Forecast | None:
    """On this machine, or on the GPUs that the job names; of other GPUs, and of CPU nodes of which it does not say it, the memory is not
    known."""
    if here is not None:
        return forecast_here(plan, here, job.cluster.network, trace)
    gpu = gpu_type(job.cluster.gpu, "cluster.gpu") if job.cluster.gpu is not None and plan.mesh.device == "cuda" else None
    host = node_memory(job.cluster)
    if plan.mesh.device == "cpu":
        return forecast(plan, (host or 0) // plan.mesh.ranks_per_node, trace=trace)
    network = gpu and on_network(gpu, job.cluster.network)
    return forecast(plan, gpu.memory_bytes if gpu else 0, network, trace=trace, host_memory_bytes=host or NODE_MEMORY)


def _check_memory(made: Forecast, per_node: int, assumed: bool) -> None:
    """`assumed`: nothing says how much memory the nodes have."""
    if made.fits:
        return
    found = nearest_that_fit(made, 1, per_node)
    nearest = f"the nearest that fits: {found[0][0]}" if found else "nothing near it fits"
    if made.fits_device:
        lack = f"{made.lack} (of a node {gib(NODE_MEMORY)} are assumed; cluster.mem says what it has)" if assumed else made.lack
        raise OutOfMemoryError(f"with memory.offload {made.plan.offload} this plan needs {lack}; {nearest}; {_FORCE}")
    highest = made.footprint.highest
    largest = max(highest.parts, key=lambda kind: highest.parts[kind])
    usable = gib(int(made.memory_bytes * USABLE[made.plan.mesh.device]))
    raise OutOfMemoryError(
        f"this plan needs {gib(highest.total)} of a rank ({highest.name}; most of it {largest}, {gib(highest.parts[largest])}), "
        f"and {usable} of {gib(made.memory_bytes)} can be used; {nearest} (`launcher plan` shows more); {_FORCE}"
    )


def _check_disk(made: Forecast, directory: Path) -> None:
    """One checkpoint has to be written before another can go."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    usage = shutil.disk_usage(there)
    free = usage.free
    if usage.total and made.checkpoint_bytes > free:  # what is no disk at all is refused by whoever writes to it
        raise StorageError(
            f"a checkpoint takes {gib(made.checkpoint_bytes)}, and {gib(free)} are free at {there}: "
            f"name a larger disk with --run-dir, or make room; {_FORCE}"
        )


def _check_time(made: Forecast) -> None:
    """Loading, one step and one save, at the best that the hardware can do."""
    limit = made.plan.slurm.time_limit_minutes
    if limit is None:
        return
    step = made.speed.step if made.speed else 0.0
    measured = Machine.read().disk_rate()
    disk = 2 * made.checkpoint_bytes / ((measured or DISK_RATE) * made.plan.mesh.nodes)
    if step + disk > 60 * limit:
        reason = f"loading and saving take {disk:.0f} s at the least, a step {step:.0f} s: nothing would ever be done; {_FORCE}"
        raise ConfigurationError(Problem("cluster.time_limit", 60.0 * limit, reason))
