"""`launcher parity`: every engine and stage gives the numbers of one process, and a difference is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.launch.parity import CASES, SINGLE, Outcome

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def job(tmp_path: Path, model: Path, data: dict[str, Any]) -> Path:
    """Packed data, two micro-batches a step, clipping."""
    content = {
        "name": "parity",
        "model": {"name": str(model)},
        "data": data,
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "training": {"learning_rate": 1e-3, "warmup": 0, "clip_norm": 0.5, "weight_decay": 0.1},
        "cluster": {"gpus_per_node": 0},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.very_slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_every_engine_agrees_with_one_process(
    precision: str, tolerance: float, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["parity", str(job), "--nproc", "2", "--json", "--set", f"precision={precision}"])
    assert left.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tolerance"] == tolerance
    assert [case["case"] for case in report["cases"]] == [SINGLE, *CASES]
    for case in report["cases"]:
        assert case["verdict"] == "agrees" and len(case["losses"]) == 20
        assert max(case["loss_off_by"], case["grad_norm_off_by"]) <= tolerance, case["case"]


def test_a_difference_is_told_and_ends_with_1(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines' part is not run here: what they would have given is put in at the border to their
    processes."""
    found = [
        Outcome(SINGLE, (2.0, 1.0), (1.0, 1.0)),
        Outcome("FSDP", (2.0, 1.001), (1.0, 1.0)),
        Outcome("ZeRO-1", (2.0, 1.0), (1.0, 1.0)),
        Outcome("ZeRO-2", (2.0,), (1.0,)),
        Outcome("ZeRO-3", problem="rank 0: no room"),
    ]
    monkeypatch.setattr("launcher.launch.parity.outcomes", lambda *arguments: iter(found))
    with pytest.raises(SystemExit) as left:
        main(["parity", str(job), "--json", "--set", "precision=fp32"])
    assert left.value.code == 1
    verdicts = {case["case"]: case["verdict"] for case in json.loads(capsys.readouterr().out)["cases"]}
    wanted = {
        SINGLE: "agrees",
        "FSDP": "differs",
        "ZeRO-1": "agrees",
        "ZeRO-2": "differs",
        "ZeRO-3": "not run: rank 0: no room",
    }
    assert verdicts == wanted
    with pytest.raises(SystemExit):
        main(["parity", str(job), "--set", "precision=fp32"])
    shown = capsys.readouterr().out
    assert "1.0e-03" in shown and "not run: rank 0: no room" in shown
