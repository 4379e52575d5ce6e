"""Plan the estimation of a model's Fisher information: a rank's memory, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import OutOfMemoryError
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.footprint import Phase
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import BatchPlan, Plan
from launcher.planner.target import target_here
from launcher.runs.wording import gib

_SHORTEST = 16


def plan_fisher(plan: Plan, profiles: Profiles) -> Plan:
    """Return the plan for estimating Fisher information here. It uses FSDP, whatever the plan's engine,
    without offloading. fp16 becomes fp32, as fp16 gradients are not finite without loss scaling. Activations
    are fully recomputed if they do not fit otherwise.

    Raises OutOfMemoryError with the nearest plan that fits, if this one does not. A model whose memory cannot
    be forecast is not refused.
    """
    precision = "fp32" if plan.precision == "fp16" else plan.precision
    changes = {"engine": "fsdp", "zero": None, "offload": "none", "precision": precision}
    plan = plan.model_copy(update=changes)
    target, program = target_here(plan, Hardware.detect()), profiles.find(plan)
    usable = target.usable_bytes(plan.mesh.device)
    if isinstance(program, Unknown) or not usable:
        return plan
    again = plan.model_copy(update={"activation_checkpointing": "full"})
    for one in (plan, again):
        if memory(one, program).total <= usable:
            return one
    nearest = next((text for text, one in _ways(again) if memory(one, program).total <= usable), None)
    needed = memory(again, program)
    largest = max(needed.parts, key=lambda kind: needed.parts[kind])
    raise OutOfMemoryError(
        f"Fisher information needs {gib(needed.total)} of a rank (most of it {largest}, "
        f"{gib(needed.parts[largest])}), and {gib(usable)} of {gib(target.memory_bytes)} can be used; "
        + (f"the nearest that fits: {nearest}" if nearest else "nothing near it fits; take more GPUs")
    )


def memory(plan: Plan, program: Program) -> Phase:
    """Return a rank's memory after a sample's backward pass: weights, gradients, and sums of squared
    gradients. It is estimated as SGD with momentum, which also keeps one number per trained weight."""
    size = plan.batch.data_parallel_size
    training = {"optimizer": "sgd", "momentum": 0.9, "moments": "fp32", "ema": None, "l2_sp": None}
    changes = {
        "training": plan.training.model_copy(update=training),
        "batch": BatchPlan(
            global_batch_size=size, micro_batch_size=1, accumulation_steps=1, data_parallel_size=size
        ),
        "distillation": None,
    }
    return Estimator(plan.model_copy(update=changes), program).footprint().phase("steady step")


def _ways(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield plans with less memory, and the options that select them."""
    mesh = plan.mesh
    if mesh.dp_shard < mesh.world_size:
        cut = {"dp_shard": mesh.world_size, "dp_replicate": 1, "reshard_after_forward": True}
        plan = plan.model_copy(update={"mesh": mesh.model_copy(update=cut), "sharding": "full"})
        yield "--set parallel.shard=full --set parallel.replicate=1", plan
    length = plan.data.max_length
    while (length := length // 2) >= _SHORTEST:
        shorter = plan.data.model_copy(update={"max_length": length})
        yield f"--set data.max_length={length}", plan.model_copy(update={"data": shorter})
