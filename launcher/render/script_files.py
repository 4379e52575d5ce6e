"""The rendering of Accelerate's and DeepSpeed's files for a user's own script, with `auto` left in."""

from __future__ import annotations

import json
from typing import Any

import yaml

from launcher.planner.plan import Plan
from launcher.render import accelerate, deepspeed

_FILLED_IN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def files(plan: Plan, directory: str) -> dict[str, str]:
    """Return the text of each file by name; `directory` is the absolute path where they will be written."""
    contents = {
        "accelerate.yaml": yaml.safe_dump(
            accelerate_config(plan, f"{directory}/ds_config.json"), sort_keys=False
        )
    }
    if plan.zero is not None:
        contents["ds_config.json"] = json.dumps(deepspeed_config(plan), indent=2) + "\n"
    return contents


def accelerate_config(plan: Plan, deepspeed_file: str) -> dict[str, Any]:
    """Return the content of accelerate.yaml. It names FSDP on a CPU too, if the plan does: launcher's ranks make
    Accelerate shard there."""
    mesh = plan.mesh
    if plan.engine == "fsdp" and plan.sharding != "none" and mesh.device == "cpu":
        plan = plan.model_copy(update={"mesh": mesh.model_copy(update={"device": "cuda"})})
    return {**accelerate.config(plan, deepspeed_file), "use_cpu": mesh.device == "cpu"}


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Return the content of ds_config.json with `auto` for batch, clipping and precision: Accelerate fills them
    in from the script, the Trainer from its arguments.

    Any number would have to match the script's: the Trainer refuses another, and Accelerate uses it in place of
    the script's.
    """
    scaled = deepspeed.config(plan.model_copy(update={"precision": "fp16"}))["fp16"]
    return {
        **deepspeed.config(plan),
        **dict.fromkeys(_FILLED_IN, "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {**scaled, "enabled": "auto"},
    }
