"""The presets in ds_configs/: the rendered files of one example job.

`python -m launcher.render.presets DIRECTORY` writes them; a test checks that those in ds_configs/ are up to
date.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.job.schema import Job
from launcher.planner.hardware.detect import Hardware
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import Plan
from launcher.planner.resolve.zero_buckets import Buckets
from launcher.planner.search import plan_job
from launcher.render import accelerate, deepspeed
from launcher.render.files import json_text, yaml_text

EXAMPLE = ModelShape(
    num_parameters=6_738_415_616,
    hidden_size=4096,
    num_layers=32,
    intermediate_size=11008,
    layer_parameters=202_375_168,
    table_parameters=32_000 * 4096,
)
"""A 7B model with Llama's architecture."""
NVME = "/mnt/nvme"

_HYBRID = {"cluster.nodes": 2, "parallel.replicate": 2}
_PLUS_PLUS = {
    "cluster.nodes": 2,
    "parallel.secondary_shard": 8,
    "parallel.quantized_weights": True,
    "parallel.quantized_gradients": True,
}
JOBS: dict[str, dict[str, Any]] = {
    "zero1.json": {"parallel.engine": "deepspeed", "parallel.shard": "optimizer"},
    "zero2.json": {"parallel.engine": "deepspeed", "parallel.shard": "gradients"},
    "zero3.json": {"parallel.engine": "deepspeed", "parallel.shard": "full"},
    "zero3-cpu-offload.json": {"parallel.engine": "deepspeed", "memory.offload": "parameters"},
    "zero3-nvme.json": {
        "parallel.engine": "deepspeed",
        "memory.offload": "parameters",
        "memory.offload_to": NVME,
    },
    "zero++.json": {"parallel.engine": "deepspeed", **_PLUS_PLUS},
    "accelerate-zero3.yaml": {"parallel.engine": "deepspeed", "parallel.shard": "full"},
    "fsdp2-full.yaml": {"parallel.engine": "fsdp"},
    "fsdp2-hybrid.yaml": {"parallel.engine": "fsdp", **_HYBRID},
    "fsdp2-offload.yaml": {"parallel.engine": "fsdp", "memory.offload": "parameters"},
}
"""The keys of each preset beyond the example: 8 GPUs per node, bf16, 64 samples per step, micro-batches of 2."""


def plan(keys: dict[str, Any]) -> Plan:
    """Return the plan of the example with some keys of its job set."""
    content: dict[str, Any] = {
        "name": "example",
        "model": {"name": "example-7b"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text"},
        "batch": {"global_batch_size": 64, "micro_batch_size": 2},
        "precision": "bf16",
        "memory": {"activation_checkpointing": "full"},
        "parallel": {"shard": "full"},
        "cluster": {"gpus_per_node": 8, "threads_per_rank": 8},
        "trackers": [],
    }
    for key, value in keys.items():
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: value} if name else value
    decided = plan_job(Job.model_validate(content), hardware=Hardware(64, 1 << 40), local=False)
    if decided.zero is None:
        return decided
    sizes, _ = Buckets.of(
        EXAMPLE, decided.offload_to != "cpu", decided.offload_to != "cpu" and decided.offload == "parameters"
    )
    return decided.model_copy(update={"zero": decided.zero.model_copy(update=asdict(sizes))})


def presets() -> dict[str, str]:
    """Return the text of every preset by name."""
    contents = {}
    for name, keys in JOBS.items():
        if name.endswith(".json"):
            contents[name] = json_text(deepspeed.config(plan(keys)))
        else:
            contents[name] = yaml_text(accelerate.config(plan(keys), "zero3.json"))
    return contents


def main() -> None:
    """Write the presets into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in presets().items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
