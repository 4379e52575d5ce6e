"""Preview a job before it runs: its plan and forecast, on this machine or on GPUs of the table."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.planner.comparison import gpu_types, plan_on
from launcher.planner.dataset.dataset_size import DatasetSizes
from launcher.planner.forecast import Forecast, forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.profiles import CACHED, Profiles, Unknown
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.planner.suggestions import Suggestion, nearest_that_fit
from launcher.planner.target import GPUS_PER_NODE, target_here


@dataclass(frozen=True)
class Preview:
    """A plan and its forecasts."""

    plan: Plan
    forecast: Forecast | None
    """The forecast that decided, by the formulas or by a profile of the model's own class."""
    traced: Forecast | None
    """The forecast by the model's own class, if requested."""
    no_forecast: str | None
    """Why there is no forecast."""
    sizes: DatasetSizes
    """The samples of its data."""
    suggestions: tuple[Suggestion, ...]
    """The nearest plans that fit, if this one does not."""

    @property
    def shown(self) -> Forecast | None:
        """Return the forecast to show: the traced one if there is one."""
        return self.traced or self.forecast


def preview_job(
    job: Job,
    nproc: int | None = None,
    gpu: str | None = None,
    profiles: Profiles = CACHED,
    compared: Profiles | None = None,
) -> Preview:
    """Return the plan of a job on this machine, or on GPUs of the table, and its forecast.

    profiles: the source of the model's program. compared: another source, for a second forecast.

    Raises ConfigurationError for a GPU that is not in the table, and if both `nproc` and a GPU are given.
    """
    per_node = GPUS_PER_NODE
    if gpu is None and job.cluster.gpu is None:
        hardware = Hardware.detect()
        # For GPUs that are neither here nor named, the plan is the one that `submit` would make.
        here = nproc is not None or bool(hardware.gpus) or job.cluster.gpus_per_node in ("auto", 0)
        plan = plan_job(job, nproc, hardware, local=here, profiles=profiles)
        per_node = len(hardware.gpus) or GPUS_PER_NODE
        target = target_here(plan, hardware, job.cluster.network)
    else:
        if nproc is not None:
            raise ConfigurationError(_ranks_of_this_machine(job, nproc, gpu))
        [kind] = gpu_types(job, gpu)
        plan, target = plan_on(job, kind, profiles=profiles)
    foreseen = forecast_of(plan, target, profiles)
    traced = forecast_of(plan, target, compared) if compared else None
    shown = traced if isinstance(traced, Forecast) else foreseen
    suggestions: list[Suggestion] = []
    if isinstance(shown, Forecast) and not shown.fits:
        suggestions = nearest_that_fit(shown, per_node=per_node)
    return Preview(
        plan,
        foreseen if isinstance(foreseen, Forecast) else None,
        traced if isinstance(traced, Forecast) else None,
        foreseen.reason if isinstance(foreseen, Unknown) else None,
        DatasetSizes.of(plan),
        tuple(suggestions),
    )


def _ranks_of_this_machine(job: Job, nproc: int, gpu: str | None) -> Problem:
    if gpu is not None:
        reason = f"is of this machine, and --gpu {gpu} of others; leave one of them out"
        reason += f", or write --set cluster.gpus_per_node={nproc}"
    else:
        reason = f"is of this machine, and cluster.gpu {job.cluster.gpu} of others; leave it out"
        reason += ", or add --set cluster.gpu=null"
    return Problem("--nproc", nproc, reason)
