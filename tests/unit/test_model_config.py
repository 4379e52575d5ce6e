"""A model whose sizes the job file says: planned as if its config.json were here, and never mistaken for one whose weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.reference import json_schema
from launcher.planning.forecast import forecast
from launcher.planning.model_config import config_of
from launcher.planning.model_shape import ModelShape
from launcher.planning.outlook import look
from launcher.planning.preflight import preflight

SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": 3,
}  # fmt: skip


def written(folder: Path, name: str = "some-org/not-here", config: Any = SIZES, **model: Any) -> Path:
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    content = {
        "name": "a",
        "model": {"name": name, "weights": "random"} | ({"config": config} if config is not None else {}) | model,
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 128},
        "batch": {"global_batch_size": 4},
        "training": {"max_steps": 5},
        "cluster": {"ranks_per_node": 1, "gpus_per_node": 0},
        "precision": "fp32",
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_sizes_in_the_job_plan_as_a_directory_with_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SIZES))
    here = look(load(written(tmp_path, str(model), None)))
    elsewhere = look(load(written(tmp_path)))
    assert here.forecast is not None and elsewhere.forecast is not None
    assert elsewhere.forecast.footprint == here.forecast.footprint and config_of(elsewhere.plan.model) == SIZES
    assert elsewhere.plan.activation_checkpointing == here.plan.activation_checkpointing
    assert ModelShape.read(elsewhere.plan.model) == ModelShape.read(here.plan.model)


def test_a_size_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    job = load(written(tmp_path), ["model.config.num_hidden_layers=6"])
    assert job.model.config == SIZES | {"num_hidden_layers": 6}


def test_the_job_goes_before_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    plan = look(load(written(tmp_path, str(tmp_path), SIZES | {"vocab_size": 1000}))).plan
    assert (config_of(plan.model) or {})["vocab_size"] == 1000


def test_numbers_of_tokens_are_no_secrets_and_texts_may_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="looks like a secret"):
        load(written(tmp_path, config=SIZES | {"auth_token": "abc"}))
    assert load(written(tmp_path)).model.config == SIZES


def test_a_size_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, config={key: value for key, value in SIZES.items() if key != "hidden_size"})
    with pytest.raises(SystemExit) as left:
        main(["plan", str(path)])
    assert left.value.code == 2
    assert "model.config = 'llama': it has no hidden_size, which a llama model needs" in capsys.readouterr().err


def test_sizes_that_are_no_section_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(written(tmp_path, config=[1, 2]))
    (problem,) = refused.value.problems
    assert problem.key == "model.config" and "config.json" in problem.reason


def test_weights_that_are_loaded_bring_their_own_sizes(tmp_path: Path) -> None:
    job = load(written(tmp_path, weights="pretrained"))
    seen = look(job)
    assert seen.forecast is not None, "a plan is for before the model is fetched"
    with pytest.raises(ConfigurationError, match=r"model\.weights: random"):
        preflight(job, seen.plan, tmp_path, local=True)
    made = load(written(tmp_path))
    assert preflight(made, look(made).plan, tmp_path, local=True) is not None


def test_no_config_anywhere_says_what_to_do(tmp_path: Path) -> None:
    seen = look(load(written(tmp_path, config=None)))
    assert seen.forecast is None and "write model.config" in str(seen.why_not)
    assert forecast(seen.plan, 0) is None


def test_editors_are_told_that_it_is_an_object() -> None:
    described = json_schema()["$defs"]["Model"]["properties"]["config"]
    assert {"type": "object", "additionalProperties": True} in described["anyOf"] and "config.json" in described["description"]
