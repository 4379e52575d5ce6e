"""Reference steps that are nearly all communication, which `launcher bench` times on a CPU."""

from __future__ import annotations

from typing import Any

from launcher.job.schema import Job
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.memory.decoders import Llama
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.planner.speed.collectives import traffic
from launcher.planner.speed.step_time import optimizer_seconds
from launcher.runs.machine import REFERENCE, REFERENCE_LENGTH

SMALL = REFERENCE
LARGE = {
    **REFERENCE,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
    "vocab_size": 4096,
}
"""As many layers, of 52 MiB: what it takes longer are the bytes."""
_CUTS = {"fsdp": ("full", "gradients"), "deepspeed": ("optimizer", "gradients", "full")}


def plans(num_ranks: int, engine: str) -> dict[str, tuple[Plan, Plan]]:
    """For each cut of an engine (`fsdp full`) a plan of the small model and one of the large, on as many
    ranks of this CPU."""
    return {
        f"{engine} {cut}": (_plan(num_ranks, SMALL, engine, cut), _plan(num_ranks, LARGE, engine, cut))
        for cut in _CUTS[engine]
    }


def _plan(num_ranks: int, sizes: dict[str, Any], engine: str, cut: str) -> Plan:
    content = {
        "name": "bench",
        "model": {"name": "reference", "config": sizes, "weights": "random"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": REFERENCE_LENGTH},
        "batch": {"global_batch_size": num_ranks, "micro_batch_size": 1},
        "training": {"max_steps": 1},
        "precision": "fp32",
        "parallel": {"engine": engine, "shard": cut},
        "memory": {"activation_checkpointing": "none"},
        "cluster": {"gpus_per_node": 0},
    }
    return plan_job(Job.model_validate(content), num_ranks, Hardware(num_ranks, 1 << 40))


def costs(
    both: tuple[Plan, Plan], seconds: tuple[float, float], rates: GpuType
) -> tuple[float, float] | None:
    """Seconds of a message and of a byte received, from what each of the two steps takes longer than its
    computing alone.

    None where the step of more bytes took no longer: other work on the machine was more than what is looked
    for.
    """
    known = [Llama(sizes).units() for sizes in (SMALL, LARGE)]
    small, large = (traffic(plan, units) for plan, units in zip(both, known, strict=True))
    short, long = (
        s - optimizer_seconds(plan, units, rates) for s, plan, units in zip(seconds, both, known, strict=True)
    )
    per_byte = (long - short) / (large.received - small.received)
    if per_byte <= 0:
        return None
    return max(0.0, (short - small.received * per_byte) / small.num_messages), per_byte
