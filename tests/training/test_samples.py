"""What the model says at its evaluations: the same rows on any number of ranks, and nothing of the training changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher import tasks
from launcher.data.section import Source
from launcher.runs import samples
from launcher.runs.layout import RunDirectory
from launcher.training.samples import _truth
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    state,
)

EVERY = {"value": 2, "unit": "steps"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model") / "llama", "llama")


def trained(
    path: Path, model: Path, number: int, world_size: int = 1, stops: tuple[int, ...] = ()
) -> RunDirectory:
    options: dict[str, Any] = {
        "evaluate_every": EVERY,
        "evaluation": {"samples": number},
        "batch": batch_of(world_size, 4 // world_size),
    }
    run = new_run(path, plan_for(model, causal_data(path.parent / "data"), world_size, 4, **options))
    for stop_at in (*stops, None):
        finish(run, world_size, stop_at=stop_at)
    return run


def shown(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    files = sorted((run.path / "samples").iterdir())
    return {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


@pytest.mark.parametrize(
    ("task", "columns", "truth"),
    [
        ("sequence-classification", {"text": "review", "label": "opinion"}, ["opinion"]),
        ("sequence-to-sequence", {"source": "long", "target": "short"}, ["short"]),
        ("causal-lm", {"prompt": "ask", "completion": "reply"}, ["reply"]),
        ("causal-lm", {"text": "text"}, []),
        ("question-answering", {"question": "q", "context": "c", "answers": "a"}, ["a"]),
        ("image-to-text", {"image": "picture", "text": "caption"}, ["caption"]),
        ("image-classification", {"image": "picture", "label": "kind"}, ["kind"]),
    ],
)
def test_the_columns_that_hold_the_truth_are_those_that_are_learned(
    task: str, columns: dict[str, str], truth: list[str]
) -> None:
    kind = tasks.find(task)
    learned = kind(kind.Columns(train=Source(path="a"), **columns))
    assert [name for name in _truth(learned) if name in columns.values()] == truth


@pytest.mark.slow
def test_with_samples_a_run_goes_the_same_way(model: Path, tmp_path: Path) -> None:
    """To the bit, and stopped between them too; the samples of a stopped run are those of the other."""
    without = trained(tmp_path / "without", model, 0)
    whole = trained(tmp_path / "whole", model, 3)
    stopped = trained(tmp_path / "stopped", model, 3, stops=(1, 3))
    assert not (without.path / "samples").exists()
    assert curve(without) == curve(whole) == curve(stopped)
    assert_equal(state(without), state(whole))
    assert_equal(state(stopped), state(whole))
    assert shown(stopped) == shown(whole)
    assert list(shown(whole)) == [f"step-{step:08d}.jsonl" for step in (0, 2, 4)]
    newest = samples.newest(whole)
    assert newest is not None and newest[0] == 4


def test_they_are_rows_from_all_over_and_say_what_the_model_says(model: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", model, 3, world_size=2)
    rows = [json.loads(line) for line in (tmp_path / "data" / "evaluation.jsonl").read_text().splitlines()]
    found = shown(run)["step-00000000.jsonl"]
    assert [one["row"] for one in found] == [0, 12, 23]
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    from tests.training.runs import tokenizer

    for one in found:
        assert one["input"] == rows[one["row"]]
        ids = torch.tensor([tokenizer()(one["input"]["text"])["input_ids"]])
        with torch.no_grad():
            loss = float(theirs(input_ids=ids, labels=ids).loss)
        assert one["answer"]["log_probability"] == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-5)


def test_a_disk_that_takes_no_samples_stops_nothing(model: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", plan_for(model, causal_data(tmp_path / "data"), 1, 2))
    (run.path / "samples").write_text("in the way")
    finish(run, 1)
    assert run.finished
