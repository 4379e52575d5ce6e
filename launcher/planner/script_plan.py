"""Plan a user's own script: ranks, engine, precision."""

from __future__ import annotations

from launcher.job.schema import Batch, Job, Tracking, Training
from launcher.job.script_job import NO_DATA, unused
from launcher.planner.decider import Decider
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import BatchPlan, Decision, Plan
from launcher.planner.resolve.mesh import mesh as arrange
from launcher.planner.search import plan_job

_NO_BATCH = BatchPlan(global_batch_size=1, micro_batch_size=1, accumulation_steps=1, data_parallel_size=1)
_OURS = ("cluster.", "parallel.", "zero.")


def plan(
    job: Job,
    script: tuple[str, ...],
    nproc: int | None = None,
    hardware: Hardware | None = None,
    local: bool = True,
) -> Plan:
    """Return a plan for running `script`, with everything decided that `job` leaves open.

    Its batch, length and data are placeholders: one sample, one step. Raises ConfigurationError as for any
    job.
    """
    hardware = hardware or Hardware.detect()
    mesh, _ = arrange(Decider(job, hardware, nproc, local))
    checkpointing = job.memory.activation_checkpointing
    neutral = job.model_copy(
        update={
            "batch": Batch(global_batch_size=mesh.world_size, micro_batch_size=1),
            "training": Training(max_steps=1, seed=job.training.seed),
            "model": job.model.model_copy(update={"attention": "eager"}),
            "memory": job.memory.model_copy(
                update={"activation_checkpointing": "none" if checkpointing == "auto" else checkpointing}
            ),
            "data": NO_DATA.model_copy(update={"num_workers": 1}),
            "trackers": (),
            "tracking": Tracking(),
            "precision": "fp32" if job.precision == "auto" else job.precision,
        }
    )
    # The script's computation and its engine's messages are unknown.
    decided = plan_job(neutral, nproc, hardware, local)
    ours = tuple(decision for decision in decided.decisions if decision.key.startswith(_OURS))
    if job.precision == "auto":
        ours += (Decision(key="precision", value="fp32", reason="unless the script itself asks for another"),)
    ours += tuple(
        Decision(key=key, value="not used", reason="the script brings its own") for key in unused(job)
    )
    return decided.model_copy(update={"script": script, "decisions": ours, "batch": _NO_BATCH})
