"""A job whose rows are streamed: what is refused, and what its plan says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.forecast import speed_lines
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.schema import Job
from launcher.launch.prepare_data import fill_cache
from launcher.launch.screen import Watcher
from launcher.planner.changes import check
from launcher.planner.preview import preview_job
from launcher.planner.search import plan_job

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def job_of(folder: Path, task: str = "causal-lm", name: str = "a.jsonl", **sections: Any) -> Job:
    rows = [json.dumps({"text": "some words " * 9, "label": str(n % 3)}) for n in range(200)]
    (folder / name).write_text("\n".join(rows) + "\n")
    data = {"train": {"path": name}, "text": "text", "streaming": True, "max_length": 64}
    content = {
        "name": "streamed",
        "model": {"name": "model", "task": task, "config": LLAMA},
        "data": data | sections.pop("data", {}),
        "training": {"max_steps": 40} | sections.pop("training", {}),
        "cluster": {"gpus_per_node": 0},
    } | sections
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return load(folder / "job.yaml")


def refused(folder: Path, *arguments: str, **sections: Any) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as raised:
        job_of(folder, *arguments, **sections)
    return {problem.key: problem.reason for problem in raised.value.problems}


@pytest.mark.parametrize(
    ("sections", "key", "reason"),
    [
        ({"training": {"max_steps": None, "epochs": 2}}, "training.max_steps", "write training.max_steps"),
        ({"training": {"max_steps": None}}, "training.max_steps", "no number of steps"),
        ({"checkpoint": {"every": "1 epochs"}}, "checkpoint.every", "a time such as 15min"),
        ({"data": {"train": [{"path": "a.jsonl"}, {"path": "a.jsonl"}]}}, "data.train", "by one pattern"),
        ({"data": {"train": {"name": "org/set"}}}, "data.train.name", "hf download org/set"),
        ({"data": {"train": {"path": "a.jsonl", "limit": 5}}}, "data.train.limit", "training.max_steps says"),
        ({"data": {"train": {"path": "a.txt", "targets": "b.txt"}}}, "data.train.targets", "one .jsonl of both"),
        ({"data": {"num_workers": 3}}, "data.num_workers", "each rank has one process"),
        ({"data": {"streaming": False, "shuffle_window": 9}}, "data.shuffle_window", "data.streaming: true"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_works(
    sections: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.txt").write_text("x\n")
    assert reason in refused(tmp_path, **sections)[key]


def test_evaluations_by_epochs_and_other_formats_are_refused(tmp_path: Path) -> None:
    held_out = {"evaluation": {"path": "a.jsonl"}}
    every = {"evaluate_every": "0.5 epochs"}
    assert "training.evaluate_every" in refused(tmp_path, data=held_out, training=every)
    assert "only .jsonl, .ndjson, .txt, .parquet can be read" in refused(
        tmp_path, "causal-lm", "a.csv", data={"train": {"path": "a.csv"}}
    )["data.train.path"]  # fmt: skip


def test_a_task_that_counts_over_all_rows_is_refused_and_others_stream(tmp_path: Path) -> None:
    found = refused(tmp_path, "sequence-classification", data={"label": "label"})
    assert "masked-lm" in found["data.streaming"] and "causal-lm" in found["data.streaming"]
    assert "sequence-classification" not in found["data.streaming"].partition("false. ")[2]
    assert job_of(tmp_path, "masked-lm").data.streaming


def test_the_plan_has_the_steps_of_the_job_and_lengths_of_some_rows(tmp_path: Path) -> None:
    gpus = {"gpu": "h100-80gb", "gpus_per_node": 8, "nodes": 1}
    preview = preview_job(job_of(tmp_path, cluster=gpus))
    [reason] = [one.reason for one in preview.plan.decisions if one.key == "training.max_steps"]
    assert "the job's, not the data's" in reason
    assert preview.forecast is not None
    text = speed_lines(preview.forecast)
    assert "40 steps, which the job says and not the data: about 6.4 epochs" in text
    assert "about 200 samples of 200 rows" in text


def test_how_rows_are_streamed_stays_as_the_run_began(tmp_path: Path) -> None:
    before = plan_job(job_of(tmp_path))
    with pytest.raises(ConfigurationError, match=r"data\.shuffle_window"):
        check(before, plan_job(job_of(tmp_path, data={"shuffle_window": 50})))
    with pytest.raises(ConfigurationError, match=r"data\.streaming"):
        check(before, plan_job(job_of(tmp_path, data={"streaming": False})))


def test_there_is_nothing_to_prepare_ahead(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="tokenised as training goes"):
        fill_cache(job_of(tmp_path), Watcher())
