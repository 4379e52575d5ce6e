"""What a pass of a plan may be at most and can do without, and memory in words."""

from __future__ import annotations

from launcher.job.schema import ActivationCheckpointing
from launcher.planner.plan import Plan

ROOMY_TIMES = 3
"""What a CPU rank that keeps what it frees may hold, and more, in sizes of its tensors at their highest."""
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}
"""Tokens beyond which a larger pass is no faster, so that memory is not taken for nothing."""
RECOMPUTATIONS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
"""What may be computed again in the backward pass, the least first."""


def samples_per_pass(plan: Plan) -> int:
    """Return the largest micro-batch worth having: a larger pass is no faster."""
    return max(1, TOKENS_PER_PASS[plan.mesh.device] // plan.data.max_length)


def recomputations(plan: Plan) -> tuple[ActivationCheckpointing, ...]:
    """Return what the plan's engine can recompute, the least first: ZeRO-3 can do nothing selectively."""
    third_stage = plan.zero is not None and plan.zero.stage == 3
    return tuple(recompute for recompute in RECOMPUTATIONS if recompute != "selective" or not third_stage)


def keeps_freed(live: int, memory_bytes: int) -> bool:
    """Return whether a CPU's ranks have room to keep what they free. live: their tensors' most bytes."""
    return 0 < ROOMY_TIMES * live <= memory_bytes
