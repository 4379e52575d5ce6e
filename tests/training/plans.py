"""Plans for tests: everything decided, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.planner.plan import Plan


def plan_of(model: Path, world_size: int = 1, **changes: Any) -> Plan:
    """A plan for the model in a directory; keys of `changes` are dotted names with `__` for the dots."""
    values: dict[str, Any] = {
        "name": "test",
        "task": "causal-lm",
        "engine": "fsdp",
        "sharding": "full",
        "precision": "fp32",
        "activation_checkpointing": "none",
        "attention": "packed",
        "num_data_workers": 1,
        "trackers": (),
        "grace_seconds": 30.0,
        "length": {"value": 4, "unit": "steps"},
        "batch": {
            "global_batch_size": 4,
            "micro_batch_size": 4 // world_size,
            "accumulation_steps": 1,
            "data_parallel_size": world_size,
        },
        "mesh": {
            "nodes": 1,
            "ranks_per_node": world_size,
            "world_size": world_size,
            "replicate": 1,
            "shard": world_size,
            "reshard_after_forward": True,
            "device": "cpu",
            "threads_per_rank": 1,
        },
        "model": {"name": str(model), "task": "causal-lm"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text"},
        "training": {"learning_rate": 1e-2, "max_steps": 4},
        "checkpoint": {},
    }
    for key, value in changes.items():
        section = values
        *path, last = key.split("__")
        for part in path:
            section = section[part]
        section[last] = value
    return Plan.model_validate(values)


def deepspeed(stage: int = 3, **changes: Any) -> dict[str, Any]:
    """Keywords of `plan_of` for DeepSpeed; buckets smaller than a tiny model, so that there are several."""
    sizes = {
        "reduce_bucket_size": 10_000,
        "allgather_bucket_size": 10_000,
        "prefetch_bucket_size": 10_000,
        "persistence_threshold": 100,
    }
    zero = {"stage": stage, "max_live_parameters": 30_000, "sub_group_size": 30_000} | sizes
    return {
        "engine": "deepspeed",
        "sharding": {1: "optimizer", 2: "gradients", 3: "full"}[stage],
        "zero": zero,
    } | changes
