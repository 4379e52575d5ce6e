"""The rendered files of a plan, by name."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import yaml

from launcher.planner.plan import Plan
from launcher.render import accelerate, deepspeed, sbatch, torchrun
from launcher.render.launch_paths import Place

NAMES = ("ds_config.json", "accelerate.yaml", "torchrun.txt", "submit.sbatch", "plan.json")


def files(plan: Plan, place: Place) -> dict[str, str]:
    """Return the text of each file of a plan by name; ds_config.json only if the engine is DeepSpeed."""
    contents = {}
    if plan.engine == "deepspeed":
        contents["ds_config.json"] = json_text(deepspeed.config(plan))
    contents["accelerate.yaml"] = yaml_text(
        accelerate.config(plan, str(PurePosixPath(place.rendered) / "ds_config.json"))
    )
    contents["torchrun.txt"] = torchrun.command(plan, place)
    contents["submit.sbatch"] = sbatch.script(plan, place)
    contents["plan.json"] = plan.to_json()
    return contents


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def yaml_text(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=True, allow_unicode=True)
