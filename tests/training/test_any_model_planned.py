"""A job with a model of any kind is planned, or refused; never with a traceback."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.plain_files import read_json
from launcher.planner.memory import profiles
from launcher.planner.plan import Plan
from launcher.training.tracing import make_profile
from tests.unit.test_suitability import LLAMA, command, job

SIZES = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4) | dict.fromkeys(
    ("encoder_layers", "decoder_layers", "num_layers", "type_vocab_size"), 2
)
SIZES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_model"), 64)
SIZES |= {"d_kv": 16, "image_size": 32, "patch_size": 8, "num_channels": 3}


@pytest.fixture(autouse=True)
def _traced_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trace in this process, which has imported torch; tests/training/test_tracing.py has the planner's own
    process."""
    out = tmp_path / "profile.json"

    def trace(plan: Plan) -> dict[str, Any]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(plan.to_json()))
        monkeypatch.setattr(sys, "argv", ["make_profile", str(out)])
        monkeypatch.setattr(make_profile.gc, "disable", lambda: None)
        try:
            make_profile.main()
        except Exception as error:  # of which the planner sees that the process failed, and its last line
            return {"failure": str(error)}
        answer: dict[str, Any] = read_json(out)
        return answer

    monkeypatch.setattr(profiles, "_trace", trace)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize(
    "kind",
    [
        "bart",
        pytest.param("mbart", marks=pytest.mark.very_slow),
        "t5",
        "vit",
        pytest.param("mamba", marks=pytest.mark.very_slow),
        "phi3",
        pytest.param("gemma3", marks=pytest.mark.very_slow),
        "roberta",
        "not-known",
        None,
        7,
    ],
)
def test_a_model_of_any_kind_is_planned_or_refused(kind: Any, task: str, tmp_path: Path) -> None:
    """Whatever the formulas know, and under either engine."""
    path = job(
        tmp_path, "some/model", task=task, config=LLAMA | SIZES | {"model_type": kind}, weights="random"
    )
    label = ["--set", "data.label=label"] if task != "causal-lm" else []
    for engine, shard in (("fsdp", "auto"), ("deepspeed", "full")):
        options = [*label, "--set", f"parallel.engine={engine}", "--set", f"parallel.shard={shard}"]
        for words in (["plan"], ["render", "--out", str(tmp_path / f"{engine}-out")]):
            assert command(*words, str(path), *options) in (0, 2)
