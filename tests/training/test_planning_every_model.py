"""The planner over every model type that transformers has for the tasks: a plan or a refusal, never a
traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from launcher.errors import LauncherError
from launcher.job.schema import Job
from launcher.planner.model.positions import _BEHIND_PADDING, _KEYS, held
from launcher.planner.preview import preview_job
from launcher.render.files import files
from launcher.render.launch_paths import Place

KINDS = sorted(
    {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "vit",
        "t5",
        "clip",
    }
)
# Each is planned four times; all together take about 20 s.


def config_of(kind: str) -> dict[str, Any]:
    """What a config.json of this type says where nobody changes it."""
    try:
        content: dict[str, Any] = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    except Exception as error:  # a type of which transformers itself makes none without sizes
        pytest.skip(f"{kind}: {type(error).__name__}")
    return content


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_type_is_planned_or_refused(kind: str) -> None:
    content = {
        "name": "a",
        "data": {"train": {"path": "rows.jsonl"}, "text": "text", "max_length": 64},
        "batch": {"global_batch_size": 8},
        "training": {"max_steps": 3},
        "cluster": {"gpus_per_node": 8},
    }
    for task in ("causal-lm", "sequence-classification"):
        for engine in ("fsdp", "deepspeed"):
            model = {"name": "some/model", "task": task, "config": config_of(kind), "weights": "random"}
            job = Job.model_validate(content | {"model": model, "parallel": {"engine": engine}})
            try:
                seen = preview_job(job, gpu="h100-80gb")
                assert files(seen.plan, Place("/run", "/run/rendered", "python"))["plan.json"]
            except LauncherError as error:
                assert str(error)


@pytest.mark.parametrize("kind", sorted({*_KEYS, *_BEHIND_PADDING}))
def test_types_with_a_table_of_positions_say_how_many_in_their_config(kind: str) -> None:
    """A type that transformers renames, or whose key it does, must not be passed over in silence."""
    if kind == "gpt-sw3":
        pytest.skip("a tokenizer's own type: its models are gpt2's")
    config = config_of(kind)
    if kind == "esm":
        config["position_embedding_type"] = "absolute"
    found = held(config)
    assert found is not None and found[0] > 32
