"""Divide batches exactly, global = micro-batch x accumulation steps x data-parallel size, or refuse."""

from __future__ import annotations

from collections.abc import Iterable

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import ActivationCheckpointing, Batch
from launcher.planner.plan import BatchPlan, Plan


def divisors(number: int) -> list[int]:
    """Return every divisor of a positive number, in order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a positive number that is at most `limit`; 1 if `limit` is less."""
    return max(divisor for divisor in divisors(number) if divisor <= max(1, limit))


def nearest(wanted: int, values: Iterable[int]) -> str:
    """Return the wanted value if it is among the values, else the next ones below and above it, in words."""
    values = sorted(set(values))
    around = [*[v for v in values if v <= wanted][-1:], *[v for v in values if v > wanted][:1]]
    return " or ".join(str(value) for value in around if value != wanted or len(around) == 1)


def multiples_around(wanted: int, unit: int) -> str:
    """Return the multiples of `unit` next to the number wanted, in words."""
    below = wanted // unit * unit
    return nearest(wanted, [m for m in (below, below + unit) if m > 0 and m != wanted])


def divide(batch: Batch, data_parallel_size: int) -> BatchPlan:
    """Divide the global batch among ranks and micro-batches, of one sample if micro_batch_size is auto.

    Raises ConfigurationError with the nearest global batch, micro-batch and number of ranks that work.
    """
    size, ranks = batch.global_batch_size, data_parallel_size
    requested = None if batch.micro_batch_size == "auto" else batch.micro_batch_size
    micro = requested or 1
    if size % (ranks * micro):
        raise ConfigurationError(_refusal(size, ranks, requested))
    steps = size // ranks // micro
    return BatchPlan(
        global_batch_size=size, micro_batch_size=micro, accumulation_steps=steps, data_parallel_size=ranks
    )


def with_batch(plan: Plan, micro_batch_size: int, recompute: ActivationCheckpointing | None = None) -> Plan:
    """Return the plan with another micro-batch, a divisor of a rank's samples, and the same global batch.

    recompute: the activation checkpointing; unchanged if not given.
    """
    per_rank = plan.batch.micro_batch_size * plan.batch.accumulation_steps
    sizes = {"micro_batch_size": micro_batch_size, "accumulation_steps": per_rank // micro_batch_size}
    changes = {"batch": plan.batch.model_copy(update=sizes)}
    return plan.model_copy(update=changes | ({"activation_checkpointing": recompute} if recompute else {}))


def _refusal(size: int, ranks: int, micro: int | None) -> Problem:
    unit = ranks * (micro or 1)
    ways = [f"global_batch_size {multiples_around(size, unit)}"]
    if micro is not None and size % ranks == 0:
        ways.append(f"micro_batch_size {nearest(micro, divisors(size // ranks))}")
    if size % (micro or 1) == 0:
        ways.append(f"ranks {nearest(ranks, divisors(size // (micro or 1)))}")
    parts = f"{ranks} ranks" + (f" x {micro} samples of a pass" if micro is not None else "")
    return Problem(
        "batch.global_batch_size", size, f"is not a whole multiple of {parts}; what works: {', '.join(ways)}"
    )
