"""Jobs of sources and targets are planned for encoder-decoders, and refused for other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.planner.changes import changes
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job


def plan_of(folder: Path, config: dict[str, Any], **keys: Any) -> Plan:
    (folder / "rows.jsonl").write_text('{"de": "ein Wort", "en": "a word"}\n' * 4)
    rows = {"path": "rows.jsonl"}
    content = {
        "name": "pairs",
        "model": {"name": "new", "task": "sequence-to-sequence", "weights": "random", "config": config},
        "data": {"train": rows, "evaluation": rows, "source": "de", "target": "en"},
        "batch": {"global_batch_size": 4},
        "cluster": {"gpus_per_node": 0, "ranks_per_node": 1},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content | keys))
    return plan_job(load(path))


@pytest.mark.parametrize(
    "kind", ["t5", "mt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "encoder-decoder"]
)
def test_encoder_decoders_are_planned(kind: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"model_type": kind, "d_model": 64, "vocab_size": 100})
    assert (plan.layout, plan.attention, plan.evaluation) == ("padded", "sdpa", None)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"a {kind} model cannot do sequence-to-sequence; it can do"):
        plan_of(tmp_path, {"model_type": kind, "hidden_size": 64, "vocab_size": 100})


def test_how_answers_are_written_may_change_between_attempts(tmp_path: Path) -> None:
    before = plan_of(tmp_path, {"model_type": "t5"})
    after = plan_of(tmp_path, {"model_type": "t5"}, evaluation={"generate": {"num_beams": 4}})
    assert after.evaluation is not None and after.digest() == before.digest(), (
        "it decides no number of the training"
    )
    different = changes(before, after)
    assert {change.key.partition(".")[0] for change in different} == {"evaluation"}
    assert all(change.allowed for change in different)
    assert Plan.model_validate_json(after.to_json()).evaluation == after.evaluation
