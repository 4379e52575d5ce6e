"""Preview a job before it runs: its plan, here or on GPUs that are not here, with all that is shown of it."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.comparison import gpu_types, plan_on, with_network
from launcher.planner.dataset.dataset_size import why_no_items
from launcher.planner.forecast import Forecast, forecast
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.planner.suggestions import Suggestion, nearest_that_fit
from launcher.planner.target import GPUS_PER_NODE, target_here


@dataclass(frozen=True)
class Preview:
    """A plan and what is to be expected of it."""

    plan: Plan
    forecast: Forecast | None
    """By what decided: the formulas, or a profile of the model's real class."""
    traced: Forecast | None
    """By the model's real class, where that was asked for."""
    no_forecast: str | None
    """Why there is none."""
    no_epoch: str | None
    """Why nothing is known of an epoch."""
    suggestions: tuple[Suggestion, ...]
    """The nearest plans that fit, where this one does not."""

    @property
    def shown(self) -> Forecast | None:
        """Return the forecast that counts: the traced one where there is one."""
        return self.traced or self.forecast


def preview_job(
    job: Job,
    nproc: int | None = None,
    gpu: str | None = None,
    network: str | None = None,
    profiles: Profiles = CACHED,
    compared: Profiles | None = None,
) -> Preview:
    """Return the plan of a job on this machine, or on GPUs of the table, and its forecast.

    profiles: where the model's program comes from. compared: another source, whose forecast stands beside.

    Raises ConfigurationError for a GPU or a network that the table does not have, and for ranks of this
    machine beside such a GPU.
    """
    job, per_node = with_network(job, network), GPUS_PER_NODE
    if gpu is None and job.cluster.gpu is None:
        hardware = Hardware.detect()
        # Of GPUs that are neither here nor named, the plan is the one that `submit` would make.
        here = nproc is not None or bool(hardware.gpus) or job.cluster.gpus_per_node in ("auto", 0)
        plan = plan_job(job, nproc, hardware, local=here, profiles=profiles)
        per_node = len(hardware.gpus) or GPUS_PER_NODE
        target = target_here(plan, hardware, job.cluster.network)
        foreseen = forecast(plan, target, profiles)
        traced = forecast(plan, target, compared) if compared else None
    else:
        if nproc is not None:
            raise ConfigurationError(_ranks_of_this_machine(job, nproc, gpu))
        [kind] = gpu_types(job, gpu)
        row = plan_on(job, kind, profiles=profiles)
        plan, foreseen, traced = row.plan, row.forecast, None
        if compared is not None and row.target is not None:
            traced = forecast(plan, row.target, compared)
    shown = traced or foreseen
    suggestions = nearest_that_fit(shown, per_node=per_node) if shown and not shown.fits else []
    no_forecast = None if foreseen else profiles.why_not(plan)
    return Preview(plan, foreseen, traced, no_forecast, why_no_items(plan), tuple(suggestions))


def _ranks_of_this_machine(job: Job, nproc: int, gpu: str | None) -> Problem:
    if gpu is not None:
        reason = f"is of this machine, and --gpu {gpu} of others; leave one of them out"
        reason += f", or write --set cluster.gpus_per_node={nproc}"
    else:
        reason = f"is of this machine, and cluster.gpu {job.cluster.gpu} of others; leave it out"
        reason += ", or add --set cluster.gpu=null"
    return Problem("--nproc", nproc, reason)
