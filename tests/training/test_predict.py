"""Predictions: those of transformers' own model, on any number of ranks and either engine, stopped or not."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.engines.fsdp import FsdpEngine
from launcher.training.evaluate_entry import measure
from launcher.training.model.model_files import EVALUATION
from launcher.training.predict_entry import predict
from launcher.training.signals import StopRequest
from tests.training.plans import deepspeed
from tests.training.runs import (
    batch_of,
    errors_of,
    finish,
    model_directory,
    new_run,
    plan_for,
    texts,
    write_rows,
)

CLASSIFIER: dict[str, Any] = {
    "task": "sequence-classification",
    "model__task": "sequence-classification",
    "layout": "padded",
}
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a language model, and rows of which some cannot be used."""
    folder = tmp_path_factory.mktemp("predict")
    order = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: number for number, label in enumerate(LABELS)},
    }
    model_directory(folder / "bert", "bert", "AutoModelForSequenceClassification", num_labels=3, **order)
    model_directory(folder / "llama", "llama")
    rows: list[dict[str, Any]] = [{"text": text} for text in texts(90)]
    rows[3], rows[40], rows[89] = {"text": " "}, {"other": "x"}, {"text": None}
    write_rows(folder / "rows.jsonl", rows)
    return folder


def plan(folder: Path, model: str, world_size: int, **changes: Any) -> Plan:
    source = {"path": str(folder / "rows.jsonl")}
    data = {"train": source, "evaluation": source, "text": "text", "max_length": 48, "num_workers": 1}
    batch = changes.pop("batch", batch_of(world_size, 2))
    if model == "bert":
        return plan_for(
            folder / model,
            data | {"label": "label"},
            world_size,
            batch=batch,
            attention="sdpa",
            **CLASSIFIER,
            **changes,
        )
    return plan_for(folder / model, data, world_size, batch=batch, **changes)


def scratch(
    path: Path, plan: Plan, output: Path, model: Path | None = None, run: Path | None = None, **options: Any
) -> RunDirectory:
    made = new_run(path, plan)
    request = {"run": run and str(run), "model": model and str(model), "step": None, "output": str(output)}
    told = {"probabilities": False, "top_k": None} | options
    (made.path / "request.json").write_text(json.dumps(request | {"options": told}))
    return made


def answered(tmp_path: Path, plan: Plan, model: Path, **options: Any) -> list[dict[str, Any]]:
    output = tmp_path / "out.jsonl"
    finish(scratch(tmp_path / "scratch", plan, output, model, **options), plan.mesh.world_size, entry=predict)
    return [json.loads(line) for line in output.read_text().splitlines()]


def shares(row: dict[str, Any]) -> dict[str, float]:
    return {one["label"]: one["probability"] for one in row["labels"]}


def test_two_ranks_say_what_transformers_says(folder: Path, tmp_path: Path) -> None:
    found = answered(tmp_path, plan(folder, "bert", 2), folder / "bert", top_k=3)
    given = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(len(given)))
    reasons = {row["row"]: row["problem"] for row in found if "problem" in row}
    assert reasons == {3: "empty", 40: "missing key", 89: "missing key"}
    first = json.loads((tmp_path / "scratch" / "prediction.json").read_text())["first"]
    assert [row["row"] for row in first] == [0, 1, 2, 4, 5], "one that cannot be used is not shown"
    assert all(row["input"] == given[row["row"]] for row in first)
    assert all(row["answer"]["label"] == found[row["row"]]["label"] for row in first)
    asked = pipeline(
        "text-classification", str(folder / "bert"), tokenizer=str(folder / "bert"), top_k=None, device="cpu"
    )
    for row in found:
        if "problem" in row:
            continue
        words = given[row["row"]]["text"].split()
        assert row.get("cut", False) == (len(words) > 46)
        [theirs] = asked([" ".join(words[:46])])
        assert row["label"] == theirs[0]["label"]
        assert shares(row) == pytest.approx({one["label"]: one["score"] for one in theirs}, abs=2e-6)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_each_rows_own_columns_stand_beside_its_answer(suffix: str, folder: Path, tmp_path: Path) -> None:
    """Of Parquet only the columns that the task names are read otherwise."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": 7, "text": "a text", "label": "mine"}, {"id": 8, "text": " ", "label": "other"}]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        write_rows(file, rows)
    of = plan(folder, "bert", 1)
    source = type(of.data.train)(path=str(file))
    of = of.model_copy(update={"data": of.data.model_copy(update={"evaluation": source})})
    made = scratch(tmp_path / "scratch", of, output := tmp_path / "out.csv", folder / "bert")
    asked = json.loads((made.path / "request.json").read_text())
    (made.path / "request.json").write_text(json.dumps(asked | {"with_input": True}))
    finish(made, 1, entry=predict)
    first, second = csv.DictReader(output.read_text().splitlines())
    assert {name: first[f"input.{name}"] for name in rows[0]} == {
        "id": "7",
        "text": "a text",
        "label": "mine",
    }
    assert first["label"] in LABELS and second["input.id"] == "8" and second["problem"] == "empty"


def test_several_classes_are_given_by_the_thresholds_beside_the_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert", tmp_path / "export")
    thresholds = {"a": 0.0, "b": 1.0, "c": 0.0}
    (tmp_path / "export" / EVALUATION).write_text(json.dumps({"details": {"thresholds": thresholds}}))
    own = plan(folder, "bert", 1)
    data = own.data.model_copy(update={"problem": "multi-label", "thresholds": "fit"})
    found = answered(tmp_path, own.model_copy(update={"data": data}), tmp_path / "export")
    assert all(row["labels"] == ["a", "c"] for row in found if "problem" not in row)


def test_a_language_model_says_how_likely_each_text_is(folder: Path, tmp_path: Path) -> None:
    found = answered(tmp_path, plan(folder, "llama", 2), folder / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    words = AutoTokenizer.from_pretrained(folder / "llama")
    given = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in found[:20]:
        if "problem" in row:
            continue
        ids = torch.tensor([words(given[row["row"]]["text"])["input_ids"][:48]])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=ids).loss)
        assert row["tokens"] == ids.shape[1] - 1
        assert row["log_probability"] == pytest.approx(-loss * row["tokens"], rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def _stopping(after: int) -> Callable[[int, StopRequest], None]:
    return functools.partial(_stop, after)


def _stop(after: int, rank: int, stop: StopRequest) -> None:
    """Ask the last rank to stop after so many passes."""
    evaluate, passes = FsdpEngine.evaluate, [0]

    def counted(self: FsdpEngine, batch: Any) -> Any:
        passes[0] += 1
        if rank == 1 and passes[0] == after:
            stop.request("SIGTERM")
        return evaluate(self, batch)

    FsdpEngine.evaluate = counted  # type: ignore[method-assign]


@pytest.mark.slow
def test_stopped_and_gone_on_it_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    """A stretch is 16 passes of 1 sample on each of 2 ranks: the first stop comes in the second of three."""
    asked = plan(folder, "bert", 2, batch=batch_of(2, 1))
    (tmp_path / "whole").mkdir()
    whole = answered(tmp_path / "whole", asked, folder / "bert")
    output = tmp_path / "out.jsonl"
    first = scratch(tmp_path / "first", asked, output, folder / "bert")
    finish(first, 2, _stopping(20), entry=predict)
    assert not output.exists() and len(Path(f"{output}.partial").read_text().splitlines()) == 32
    other = scratch(tmp_path / "other", asked, output, folder / "bert", top_k=2)
    assert "was begun of something else: options" in str(errors_of(other, 2, entry=predict)[0])
    finish(scratch(tmp_path / "second", asked, output, folder / "bert"), 2, entry=predict)
    assert [json.loads(line) for line in output.read_text().splitlines()] == whole
    summary = json.loads((tmp_path / "second" / "prediction.json").read_text())
    assert (summary["rows"], summary["rows_before"], summary["problems"]) == (
        90,
        32,
        {"empty": 1, "missing key": 2},
    )


@pytest.mark.slow
@pytest.mark.very_slow
def test_a_run_answers_under_zero_as_under_fsdp_and_as_exported(folder: Path, tmp_path: Path) -> None:
    """A run trained under one engine is asked and measured under both; its export says the same."""
    from launcher.training.checkpoint.export import export

    rows = [{"text": text, "label": LABELS[number % 3]} for number, text in enumerate(texts(40, seed=3))]
    source = write_rows(tmp_path / "labelled.jsonl", rows)
    trained = plan(folder, "bert", 2, num_steps=3, training={"learning_rate": 1e-3})
    data = trained.data.model_copy(
        update={name: type(trained.data.train)(**source) for name in ("train", "evaluation")}
    )
    trained = trained.model_copy(update={"data": data})
    run = new_run(tmp_path / "run", trained)
    finish(run, 2)
    export(run, tmp_path / "export")
    said, measured = {}, {}
    for engine, changes in (("fsdp", {}), ("zero", deepspeed(3))):
        asked = Plan.model_validate(trained.model_dump(by_alias=True) | changes)
        output = tmp_path / f"{engine}.jsonl"
        finish(scratch(tmp_path / engine, asked, output, run=run.path, top_k=3), 2, entry=predict)
        said[engine] = [json.loads(line) for line in output.read_text().splitlines()]
        looked = scratch(tmp_path / f"{engine}-measured", asked, output, run=run.path)
        request = json.loads((looked.path / "request.json").read_text()) | {"resamples": 20, "seed": 1}
        (looked.path / "request.json").write_text(json.dumps(request))
        finish(looked, 2, entry=measure)
        measured[engine] = json.loads((looked.path / "evaluation.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "export")
    for ours, theirs, row in zip(said["fsdp"], said["zero"], rows, strict=True):
        assert ours["label"] == theirs["label"]
        assert shares(ours) == pytest.approx(shares(theirs), abs=2e-6)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([words(row["text"])["input_ids"][:48]])).logits[0]
        assert shares(ours) == pytest.approx(
            dict(zip(LABELS, logits.softmax(0).tolist(), strict=True)), abs=2e-6
        )
    for when in ("before", "after"):
        assert measured["fsdp"][when] == pytest.approx(measured["zero"][when], rel=1e-5)
    assert measured["fsdp"]["before"]["loss"] != measured["fsdp"]["after"]["loss"]
    low, high = measured["fsdp"]["confidence"]["after"]["loss"]
    assert low < measured["fsdp"]["after"]["loss"] < high
    assert measured["fsdp"]["step"] == 3


def test_a_task_that_says_nothing_is_refused() -> None:
    from launcher.tasks.task import Task
    from launcher.training.asking import refuse_silent

    class Silent(Task):
        name = "silent"

    Silent.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"model.task = 'silent': Silent has no method `answers`"):
        refuse_silent(object.__new__(Silent))
