"""From a run to measures and answers by the commands alone, on either engine; stopped in the middle, and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.runs import model_directory, texts, write_rows

ENGINES = {"fsdp": [], "deepspeed": ["--set", "parallel.engine=deepspeed", "--set", "parallel.shard=full"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model, and rows that it has not seen."""
    folder = tmp_path_factory.mktemp("commands")
    model_directory(folder / "model", "llama")
    for name, number in (("train", 200), ("held-out", 24), ("other", 30), ("many", 500)):
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts(number, seed=number)])
    content = {
        "name": "run",
        "model": {"name": "model"},
        "data": {
            "train": {"path": "train.jsonl"},
            "evaluation": {"path": "held-out.jsonl"},
            "text": "text",
            "max_length": 64,
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "training": {"max_steps": 4, "learning_rate": 1e-3, "evaluate_every": 2},
        "parallel": {"engine": "fsdp", "shard": "full"},
        "cluster": {"ranks_per_node": 2, "gpus_per_node": 0},
        "precision": "fp32",
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    assert launcher(folder, "run", "job.yaml", "--run-dir", "run").returncode == 0
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launcher(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def told(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.very_slow
@pytest.mark.timeout(1200)
def test_both_engines_measure_the_same_and_write_it_down(folder: Path) -> None:
    found = {}
    for engine, options in ENGINES.items():
        arguments = [
            "evaluate",
            "run",
            "--on",
            "other.jsonl",
            "--bootstrap",
            "50",
            "--plots",
            "--json",
            *options,
        ]
        found[engine] = told(launcher(folder, *arguments))
        assert found[engine]["engine"] == engine
    for when in ("before", "after"):
        assert found["fsdp"][when] == pytest.approx(found["deepspeed"][when], rel=1e-5)
    for when, intervals in found["fsdp"]["confidence"].items():
        if isinstance(intervals, dict):
            assert intervals["loss"] == pytest.approx(
                found["deepspeed"]["confidence"][when]["loss"], rel=1e-3
            )
    kept = folder / "run" / "evaluations"
    assert {path.name for path in kept.iterdir()} == {
        "evaluate-step-00000004-other.json",
        "evaluate-step-00000004-other-learning-curve.svg",
    }
    assert json.loads((kept / "evaluate-step-00000004-other.json").read_text())["data"]["rows_used"] == 30


@pytest.mark.very_slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_leaves_what_is_done_and_the_same_command_goes_on(engine: str, folder: Path) -> None:
    arguments = ["predict", "run", "--input", "many.jsonl", "--json", *ENGINES[engine], "--output"]
    whole = told(launcher(folder, *arguments, f"{engine}-whole.jsonl"))
    assert whole["rows"] == whole["answered"] == 500
    process = start(folder, *arguments, f"{engine}.jsonl")
    state = folder / f"{engine}.jsonl.partial.json"
    while not (state.exists() and json.loads(state.read_text())["rows"]) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75 and "the same command goes on there" in err, err
    rows = json.loads(state.read_text())["rows"]
    assert 0 < rows < 500
    rest = told(launcher(folder, *arguments, f"{engine}.jsonl"))
    assert rest["rows"] == 500 and rest["rows_before"] == rows
    assert (folder / f"{engine}.jsonl").read_bytes() == (folder / f"{engine}-whole.jsonl").read_bytes()
