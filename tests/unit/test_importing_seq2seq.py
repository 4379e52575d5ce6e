"""Seq2SeqTrainingArguments become a sequence-to-sequence job that writes in its evaluation as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError
from launcher.importing.job import Imported, import_files
from launcher.job.load import load, validate

PLAIN = {"output_dir": "out", "model_name_or_path": "hub/t5", "per_device_train_batch_size": 4}


def imported(folder: Path, **arguments: Any) -> Imported:
    (folder / "arguments.json").write_text(json.dumps(PLAIN | arguments))
    return import_files([folder / "arguments.json"])


def said(found: Imported, kind: str) -> str:
    return "\n".join(f"{one.said}: {one.text}" for one in found.remarks if one.kind == kind)


def test_generation_becomes_the_section_evaluation(tmp_path: Path) -> None:
    found = imported(
        tmp_path, predict_with_generate=True, generation_max_length=64, generation_num_beams=4,
        label_smoothing_factor=0.1, validation_file="val.jsonl", max_source_length=256,
        max_target_length=48, source_prefix="translate: ",
    )  # fmt: skip
    content = found.content
    assert content["model"] == {"name": "hub/t5", "task": "sequence-to-sequence"}
    assert content["evaluation"] == {"generate": {"max_new_tokens": 63, "num_beams": 4}}
    assert content["data"]["evaluation"] == {"path": "val.jsonl"}
    shown = {key: content["data"][key] for key in ("max_length", "max_target_length", "prefix")}
    assert shown == {"max_length": 256, "max_target_length": 48, "prefix": "translate: "}
    assert content["data"]["label_smoothing"] == 0.1
    assert "the decoder's first token counts there" in said(found, "changes meaning")
    assert "label_smoothing" not in said(found, "cannot be said")
    job, problems = validate(yaml.safe_load(found.text))
    assert problems == [] and job is not None and job.model.task == "sequence-to-sequence"


def test_columns_and_held_out_rows_are_to_be_filled_in(tmp_path: Path) -> None:
    found = imported(tmp_path, predict_with_generate="true", source_lang="de", target_lang="en")
    assert found.content["data"]["source"] == "FILL-IN-source"
    assert found.content["data"]["target"] == "FILL-IN-target"
    assert found.content["data"]["evaluation"] == {"path": "FILL-IN-held-out.jsonl"}
    assert found.content["evaluation"] == {"generate": True}
    for line in ("source: FILL-IN-source", "path: FILL-IN-held-out.jsonl", "path: FILL-IN.jsonl"):
        assert f"{line}   # fill in\n" in found.text
    wanted = said(found, "fill in")
    for key in ("data.source: ", "data.target: ", "data.evaluation: ", "max_new_tokens: left out there"):
        assert key in wanted
    assert "source_lang: a name inside `translation`" in wanted and "data.target_language" in wanted
    assert "which columns are what" not in wanted
    (tmp_path / "job.yaml").write_text(found.text)
    with pytest.raises(ConfigurationError, match=r"FILL-IN\.jsonl.*no such file"):
        load(tmp_path / "job.yaml")


def test_what_is_left_out_stays_the_models_own(tmp_path: Path) -> None:
    """Left out, beams are the model's own here as there; the length is not, and is said."""
    (tmp_path / "config.json").write_text("{}")
    own = {"num_beams": 4, "length_penalty": 2.0, "max_length": 142}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    found = imported(tmp_path, model_name_or_path=str(tmp_path), predict_with_generate=True)
    assert found.content["evaluation"] == {"generate": {"max_new_tokens": 141}}
    assert "by the model's generation_config.json, max_length = 142" in said(found, "changes meaning")
    (tmp_path / "generation_config.json").write_text("[]")
    found = imported(tmp_path, model_name_or_path=str(tmp_path), predict_with_generate=True)
    assert found.content["evaluation"] == {"generate": True}


def test_without_generation_nothing_is_written(tmp_path: Path) -> None:
    """A dump of the arguments has all of their keys."""
    found = imported(
        tmp_path, predict_with_generate=False, generation_max_length=20, generation_num_beams=None,
        sortish_sampler=False, generation_config=None, text_column="article", summary_column="highlights",
    )  # fmt: skip
    assert found.content["model"]["task"] == "sequence-to-sequence" and "evaluation" not in found.content
    assert (found.content["data"]["source"], found.content["data"]["target"]) == ("article", "highlights")
    assert "generation_max_length: counts where predict_with_generate is true" in said(found, "ignored")


def test_a_script_for_translation_is_one_with_its_own_lengths_and_beams() -> None:
    words = ["python", "run_translation.py", "--model_name_or_path", "hub/t5", "--dataset_name", "hub/pairs"]
    words += ["--max_length", "64", "--predict_with_generate", "--val_max_target_length", "30"]
    words += ["--num_beams", "3", "--generation_num_beams", "5", "--sortish_sampler", "true"]
    words += ["--generation_config", "other.json"]
    found = import_files([], words)
    assert found.content["model"]["task"] == "sequence-to-sequence"
    assert found.content["data"]["train"] == {"name": "hub/pairs"}
    assert found.content["evaluation"] == {"generate": {"max_new_tokens": 29, "num_beams": 3}}
    lost = said(found, "cannot be said")
    assert "sortish_sampler: " in lost and "generation_config: a file of its own kind" in lost


def test_other_arguments_stay_what_they_were(tmp_path: Path) -> None:
    found = imported(tmp_path, num_train_epochs=2)
    assert "task" not in found.content["model"] and "evaluation" not in found.content


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"generation_max_length": 1}, "generation_max_length = 1: write a number of at least 2"),
        ({"generation_num_beams": "many"}, "generation_num_beams = 'many': write a number"),
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor = 1.5"),
    ],
)
def test_values_that_are_none_are_refused(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        imported(tmp_path, predict_with_generate=True, **arguments)
