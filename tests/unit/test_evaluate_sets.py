"""`launcher evaluate` on several sets of rows in one table, and what of its options do not go together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.errors import ConfigurationError
from launcher.launch import evaluation
from launcher.launch.evaluation import Request, estimate_fisher
from launcher.launch.screen import Watcher
from tests.unit.test_scheduling_local import plan

LOCALLY = evaluation.evaluate_locally
MEASURED_ON = Request.measured_on


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the ranks: the loss of old rows goes up, that of all others down."""

    def evaluate(request: Request, watcher: Any, resamples: int) -> dict[str, Any]:
        after = 2.0 if request.on == Path("old.jsonl") else 0.5
        return {"before": {"loss": 1.0}, "after": {"loss": after}, "on": str(request.on)}

    monkeypatch.setattr(Request, "of", lambda *_: Request(plan(), Path("run"), None, None))
    monkeypatch.setattr(Request, "measured_on", lambda self, on: dataclasses.replace(self, on=on))
    monkeypatch.setattr(evaluation, "evaluate_locally", evaluate)


def answer(*options: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", "run", *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_several_sets_of_rows_are_one_table() -> None:
    both = ["--on", "old.jsonl", "--on", "new.jsonl"]
    lines = [line.split() for line in answer(*both).splitlines()]
    assert lines == [
        ["on", "metric", "before", "after", "change"],
        ["old.jsonl", "loss", "1.0000", "2.0000", "+1.0000"],
        ["new.jsonl", "loss", "1.0000", "0.5000", "-0.5000"],
    ]
    sets = json.loads(answer(*both, "--json"))["sets"]
    assert [(one["on"], one["after"]["loss"]) for one in sets] == [("old.jsonl", 2.0), ("new.jsonl", 0.5)]
    assert json.loads(answer("--on", "old.jsonl", "--json"))["after"] == {"loss": 2.0}


def test_fisher_information_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(plan: Any, module: str, wanted: dict[str, Any], *_: Any) -> dict[str, Any]:
        asked.append(wanted["rows"])
        assert (plan.engine, plan.precision) == (
            "fsdp",
            "fp32",
        ) and module == "launcher.training.fisher_entry"
        return {"file": wanted["file"], "step": 3, "rows": 8, "parameters": 1234}

    half = plan().model_copy(update={"precision": "fp16"})
    monkeypatch.setattr(Request, "of", lambda *_: Request(half, Path("run"), None, None))
    monkeypatch.setattr(evaluation, "ask", ask)
    said = answer("--fisher", "--rows", "8", "--on", "old rows.jsonl")
    assert said == "1,234 weights by 8 samples, in run/evaluations/fisher-step-STEP-old-rows.safetensors\n"
    assert json.loads(answer("--fisher", "--json"))["parameters"] == 1234 and asked == [8, 256]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--on", "a/x.jsonl", "--on", "b/x.jsonl"], "two of the same name"),
        (["--on", "a b.jsonl", "--on", "a-b.jsonl"], "two of the same name"),
        (["--on", "a.jsonl", "--on", "b.jsonl", "--plots"], "one set of rows at a time"),
        (["--rows", "8"], "goes with --fisher"),
        (["--fisher", "--bootstrap", "9"], "measures nothing; leave --bootstrap"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        answer(*options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__adapter": {"rank": 2}}, "trains an adapter"),
        ({"data__streaming": True}, "data.streaming=false"),
    ],
)
def test_fisher_information_that_is_of_no_use_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        estimate_fisher(Request(plan(**changes), Path("run"), None, None), Watcher(), 8)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.yaml"])
def test_all_files_are_looked_for_before_anything_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "measured_on", MEASURED_ON)
    monkeypatch.setattr(evaluation, "evaluate_locally", lambda *_: pytest.fail("measured"))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"nowhere.*no such file"):
        answer("--on", str(tmp_path / "rows.jsonl"), "--on", str(tmp_path / name))


def test_without_held_out_rows_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = plan()
    bare = bare.model_copy(update={"data": bare.data.model_copy(update={"evaluation": None})})
    monkeypatch.setattr(evaluation, "ask", lambda *_: pytest.fail("started"))
    with pytest.raises(ConfigurationError, match=r"names no held-out rows; write --on FILE"):
        LOCALLY(Request(bare, Path("run"), None, None), Watcher())
