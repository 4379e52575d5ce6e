"""Limits of a plan's micro-batch, its choices of recomputation, and the room of a CPU's ranks."""

from __future__ import annotations

from launcher.job.schema import ActivationCheckpointing
from launcher.planner.plan import Plan

ROOMY_TIMES = 3
"""A CPU rank that keeps freed memory holds at most this multiple of its tensors' peak."""
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}
"""Tokens beyond which a larger micro-batch is no faster, and would only take memory."""
RECOMPUTATIONS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
"""Modes of activation checkpointing, the one that recomputes least first."""


def samples_per_pass(plan: Plan) -> int:
    """Return the largest useful micro-batch: a larger one is no faster."""
    return max(1, TOKENS_PER_PASS[plan.mesh.device] // plan.data.max_length)


def recomputations(plan: Plan) -> tuple[ActivationCheckpointing, ...]:
    """Return the modes that the engine supports, the least first: ZeRO-3 cannot recompute selectively."""
    third_stage = plan.zero is not None and plan.zero.stage == 3
    return tuple(recompute for recompute in RECOMPUTATIONS if recompute != "selective" or not third_stage)


def keeps_freed(live: int, memory_bytes: int) -> bool:
    """Return whether a CPU's ranks have room to keep freed memory. live: their tensors' peak bytes."""
    return 0 < ROOMY_TIMES * live <= memory_bytes
