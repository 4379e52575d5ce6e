"""Runs that an earlier version left in tests/data/runs are shown, resumed, exported and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.launch.run_setup import reopen
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from tests.commands import launcher
from tests.earlier_runs import KINDS, NUM_STEPS, STOP_AT, computed_by, unpack
from tests.training.runs import curve, evaluations, finish

ARCHIVES = Path(__file__).parents[1] / "data" / "runs"


def unpacked(folder: Path, *kinds: str) -> Path:
    """A folder with runs/KIND, and what they were made of."""
    for name in ("material", *kinds):
        unpack(ARCHIVES / f"{name}.tar.xz", folder)
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, only to be looked at."""
    return unpacked(tmp_path_factory.mktemp("earlier"), *KINDS, "script")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_is_shown(kind: str, earlier: Path) -> None:
    seen = json.loads(launcher("status", earlier / "runs" / kind, "--json").stdout)
    assert (seen["state"], seen["step"], seen["total_steps"], seen["checkpoint_step"]) == (
        "stopped",
        STOP_AT,
        NUM_STEPS,
        STOP_AT,
    )
    assert seen["loss"] > 0 and seen["attempts"] == 1 and seen["metrics"]["loss"] > 0
    assert launcher("checkpoint", "verify", earlier / "runs" / kind).stdout.split() == [
        "step",
        "verdict",
        "3",
        "whole",
    ]
    assert launcher("checkpoint", "list", earlier / "runs" / kind).stdout.splitlines()[1].split()[0] == "3"
    assert "stopped" in launcher("watch", earlier / "runs" / kind, "--once").stdout


def test_the_list_has_all_and_a_script_that_failed_says_why(earlier: Path) -> None:
    seen = {
        run["name"]: run for run in json.loads(launcher("list", earlier / "runs", "--json").stdout)["runs"]
    }
    assert {name: run["state"] for name, run in seen.items()} == dict.fromkeys(KINDS, "stopped") | {
        "script": "failed"
    }
    assert seen["script"]["failure"]["cause"] == "RuntimeError: not at the first start"
    assert "was told ['two words']" in launcher("logs", earlier / "runs" / "script").stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_exported(kind: str, earlier: Path, tmp_path: Path) -> None:
    done = launcher("export", earlier / "runs" / kind, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    auto_class = (
        AutoModelForSequenceClassification if kind == "sequence-classification" else AutoModelForCausalLM
    )
    model = auto_class.from_pretrained(tmp_path / "out")
    before = load_file(
        earlier / ("encoder" if kind == "sequence-classification" else "decoder") / "model.safetensors"
    )
    changed = {
        name
        for name, value in model.state_dict().items()
        if name in before and not torch.equal(value, before[name])
    }
    assert changed
    if kind == "zero3":
        launcher("export", earlier / "runs" / "causal-lm", "--out", tmp_path / "fsdp")
        for name, value in load_file(tmp_path / "fsdp" / "model.safetensors").items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    """To the bit where torch and the processor are those that it was computed by."""
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = RunDirectory(unpacked(tmp_path, kind) / "runs" / kind)
    wanted: dict[str, Any] = json.loads((run.path / "continued.json").read_text())
    assert reopen(run, [], None).mesh.world_size == 2
    finish(run, 2)
    assert [record["step"] for record in read(run.events_file) if record["event"] == "resumed"] == [STOP_AT]
    tolerance = 0.0 if wanted["computed_by"] == computed_by() else 1e-3
    steps = curve(run)
    assert sorted(steps) == list(range(1, NUM_STEPS + 1))
    for record in wanted["train"]:
        for name in ("loss", "grad_norm"):
            assert steps[record["step"]][name] == pytest.approx(record[name], rel=tolerance, abs=0)
    assert evaluations(run)[NUM_STEPS] == pytest.approx(wanted["evaluation"], rel=tolerance, abs=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_is_measured(earlier: Path) -> None:
    """What it measures before training is what the run measured then."""
    run = RunDirectory(earlier / "runs" / "adapter")
    done = launcher("evaluate", run.path, "--nproc", "1", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["before"]["loss"] == pytest.approx(evaluations(run)[0]["loss"], rel=1e-5)
    assert measured["after"]["loss"] != measured["before"]["loss"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_script_begins_again(tmp_path: Path) -> None:
    run = RunDirectory(unpacked(tmp_path, "script") / "runs" / "script")
    done = launcher("resume", run.path)
    assert done.returncode == 0, done.stderr
    assert run.finished and run.last_attempt() == 2
    assert "was told ['two words']\nwent on" in (run.attempt(2) / "rank-0.log").read_text()
