"""What `launcher evaluate` and `launcher predict` are asked, refuse and print."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.cli.model import table
from launcher.cli.predict import described
from launcher.errors import ConfigurationError, DataError
from launcher.launch.evaluation import Request
from launcher.launch.prediction import Logits, Prediction
from launcher.launch.screen import Watcher
from launcher.tasks.task import AnswerOptions

CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    for name in ("train", "other"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    return tmp_path


def job(folder: Path, name: str, task: str = "causal-lm", **data: Any) -> Path:
    content = {
        "name": name,
        "model": {"name": "model", "task": task},
        "data": {"train": {"path": "train.jsonl"}, **data},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | {"cluster": {"gpus_per_node": 0, "ranks_per_node": 2}}))
    return path


def request(folder: Path) -> Request:
    own = job(folder, "own", text="text", evaluation={"path": "train.jsonl"}, max_length=32)
    return Request.of(str(folder / "model"), own, None, None, [])


def test_another_file_and_another_job_take_the_place_of_the_rows(folder: Path) -> None:
    asked = request(folder)
    (folder / "other.jsonl").touch()
    file = asked.measured_on(folder / "other.jsonl").plan
    assert file.data.evaluation is not None and file.data.evaluation.path == str(folder / "other.jsonl")
    other = job(folder, "other", text="text", evaluation={"path": "other.jsonl"}, max_length=16)
    theirs = asked.measured_on(other).plan
    assert theirs.data.max_length == 16 and theirs.data.evaluation == file.data.evaluation
    assert theirs.model == asked.plan.model and theirs.batch == asked.plan.batch


@pytest.mark.parametrize(
    ("task", "data", "match"),
    [
        (
            "sequence-classification",
            {"text": "text", "label": "label"},
            r"is a job of sequence-classification, and",
        ),
        ("causal-lm", {"text": "text"}, r"names no held-out rows"),
    ],
)
def test_a_job_that_measures_nothing_of_it_is_refused(
    task: str, data: dict[str, Any], match: str, folder: Path
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        request(folder).measured_on(job(folder, "other", task, **data))


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("answers.xlsx", r"--output = .*the nearest is answers\.csv"),
        ("train.jsonl", r"--output = .*is there already"),
        ("none/answers.jsonl", r"--output = .*the folder .* is not there"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_starts(
    output: str, match: str, folder: Path
) -> None:
    asked = Prediction(request(folder), folder / "train.jsonl", folder / output, AnswerOptions())
    with pytest.raises(ConfigurationError, match=match):
        asked.run(Watcher())


def test_before_after_and_intervals_stand_side_by_side() -> None:
    plain = {"before": {"loss": 2.0, "f1": 0.25}, "after": {"loss": 1.5, "f1": 0.75}}
    lines = table(plain).splitlines()
    assert lines[1].split() == ["loss", "2.0000", "1.5000", "-0.5000"]
    assert lines[2].split() == ["f1", "0.2500", "0.7500", "+0.5000"] and len(lines) == 3
    of_yes = table(plain | {"details": {"before": {}, "after": {"f1_of": "yes"}}})
    assert of_yes.splitlines()[2].split()[:3] == ["f1", "(of", "yes)"]
    of = {"before": {"loss": [1.9, 2.1]}, "after": {"loss": [1.4, 1.6]}, "change": {"loss": [-0.6, -0.4]}}
    shown = table(plain | {"confidence": {"level": 0.95, "resamples": 1000, "seed": 1, **of}}).splitlines()
    assert shown[2].split() == ["[1.9000,", "2.1000]", "[1.4000,", "1.6000]", "[-0.6000,", "-0.4000]"]
    assert shown[-1] == "in brackets: 95% intervals of 1,000 drawings of the rows"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "rows.jsonl",
            '{"texts": "a"}\n' * 3,
            "none of 3 rows that were looked at has the columns: missing key",
        ),
        ("rows.csv", "texts,n\na,1\n", "has no column 'text'; it has 'texts', 'n'; did you mean 'texts'"),
        ("rows.jsonl", '{"texts": "a"}\n{"text": "b"}\n', None),
        ("rows.jsonl", '{"text": ""}\n', None),
        ("rows.jsonl", "", None),
    ],
)
def test_other_columns_are_refused_before_a_model_is_loaded(
    name: str, content: str, match: str | None, folder: Path
) -> None:
    (folder / name).write_text(content)
    prediction = Prediction(request(folder), folder / name, folder / "new.jsonl", AnswerOptions())
    assert prediction.columns == ["text"]
    if match is None:
        prediction.refuse_other_columns()
        return
    with pytest.raises((ConfigurationError, DataError), match=match):
        prediction.run(Watcher())


def test_a_model_that_read_two_text_files_reads_any_file_as_text(folder: Path) -> None:
    asked = request(folder)
    (folder / "other.txt").write_text("a\n")
    train = type(asked.plan.data.train)(path="train.jsonl", targets=str(folder / "other.txt"))
    data = asked.plan.data.model_copy(update={"train": train})
    asked = replace(asked, plan=asked.plan.model_copy(update={"data": data}))
    (folder / "rows.en").write_text("a\n")
    Prediction(asked, folder / "rows.en", folder / "new.jsonl", AnswerOptions()).refuse_other_columns()


def test_what_could_not_be_answered_is_counted_by_reason() -> None:
    summary = {"rows": 1200, "output": "out.jsonl", "rows_per_second": 1234.5, "rows_before": 1000}
    said = described(summary | {"problems": {"empty": 2, "missing key": 5}}).splitlines()
    assert said[0] == "1,200 rows in out.jsonl, 1,234.5 rows a second (1,000 were there already)"
    assert said[1] == "7 of them could not be used and say why: 5 missing key, 2 empty"
    assert len(described(summary | {"problems": {}}).splitlines()) == 1
    bare = described(summary | {"problems": {}, "with_input": False}).splitlines()
    assert bare[1] == "they are numbered as the rows are; --with-input writes the rows' own columns as well"
    assert len(described(summary | {"problems": {}, "with_input": True}).splitlines()) == 1
    row = {"text": "where is my parcel " * 9, "label": "delivery"}
    first = [{"row": 0, "input": row, "answer": {"label": "refund", "probability": 0.93}, "truth": ["label"]}]
    told = described(summary | {"problems": {}, "first": first}, 60).splitlines()
    assert told[1] == "the first:" and len(told) == 3 and len(told[2]) <= 60
    assert told[2].startswith("  where is my pa") and "true: delivery; model: label: refund" in told[2]
    assert len(described(summary | {"problems": {}, "first": first}).splitlines()) == 1, "no terminal"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--input", "train.jsonl", "--output", "a.xlsx"], r"--output = 'a\.xlsx'"),
        (
            ["--input", "trian.jsonl", "--output", "a.csv"],
            r"--input = 'trian\.jsonl': no such file.*train\.jsonl",
        ),
        (["--logits", "model"], r"--logits = 'model': is there already"),
    ],
)
def test_what_the_command_line_shows_is_refused_before_anything_is_planned(
    options: list[str], match: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Request, "of", lambda *_: pytest.fail("it was planned"))
    result = CliRunner().invoke(app, ["predict", "model", "--job", "own.yaml", *options])
    assert isinstance(result.exception, ConfigurationError)
    assert re.search(match, str(result.exception))


@pytest.mark.parametrize(
    ("options", "doing"),
    [
        (["--input", "rows.jsonl", "--output", "new.jsonl", "--json"], "answering rows.jsonl"),
        (["--logits", "new"], "writing logits"),
    ],
)
def test_predict_says_what_it_does_before_it_plans(
    options: list[str], doing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("{}")

    def refuse(*_: object) -> None:
        raise ConfigurationError([])

    monkeypatch.setattr(Request, "of", refuse)
    result = CliRunner().invoke(app, ["predict", "model", "--job", "own.yaml", *options])
    assert result.stderr == f"planning, loading the model, then {doing} ...\n" and result.stdout == ""


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "logits of 7 samples (8 rows) in new, 9 kB\n"),
        ({"tokens": 1234}, "hidden states of 1,234 tokens of 7 samples (8 rows) in new, 9 kB\n"),
    ],
)
def test_predict_says_what_it_wrote_for_a_student(
    more: dict[str, int], line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    summary = {"samples": 7, "rows": 8, "bytes": 9000, "output": "new"}
    monkeypatch.setattr(Request, "of", lambda *_: None)
    monkeypatch.setattr(Logits, "run", lambda *_: summary | more)
    result = CliRunner().invoke(app, ["predict", "model", "--job", "own.yaml", "--logits", "new"])
    assert result.stdout == line
