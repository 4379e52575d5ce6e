"""What holds of a run with virtual tokens, whatever makes them: it goes on exactly, and peft writes its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.predict_entry import predict
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, curve, evaluations, finish, new_run, replan, state, tokenizer
from tests.training.test_predict import scratch
from tests.training.test_resume import compare


def goes_on(plan: Callable[..., Plan], trained: RunDirectory) -> None:
    """Stopped, a run goes on to the bit; and on another number of ranks and another engine within rounding."""
    folder = trained.path.parent
    stopped, moved = (new_run(folder / name, plan(2)) for name in ("stopped", "moved"))
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(trained) and evaluations(stopped) == evaluations(trained)
    assert_equal(state(stopped), state(trained))
    finish(moved, 2, stop_at=2)
    replan(moved, plan(3, **deepspeed(3)))
    finish(moved, 3)
    compare(moved, trained, 1e-5)
    assert evaluations(moved)[4] == pytest.approx(evaluations(trained)[4], rel=1e-4)


def answers_are_those_of(model: Any, trained: RunDirectory, asking: Plan) -> None:
    """peft's model of an exported adapter has the run's loss, and writes what `predict` writes."""
    folder = trained.path.parent
    words, total, count = tokenizer(), 0.0, 0
    rows = [json.loads(line) for line in (folder / "data/held-out.jsonl").read_text().splitlines()]
    output = folder / "answers.jsonl"
    finish(scratch(folder / "asking", asking, output, run=trained.path), 2, entry=predict)
    for row, line in zip(rows, output.read_text().splitlines(), strict=True):
        query, answer = (words(row[name], add_special_tokens=False)["input_ids"] for name in row)
        ids = torch.tensor([[1, *query, *answer, 2]])
        labels = ids.clone()
        labels[0, : 1 + len(query)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * (len(answer) + 1)
        count += len(answer) + 1
        ids = torch.tensor([[1, *query]])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                 do_sample=False, pad_token_id=0)  # fmt: skip
        assert json.loads(line)["text"] == words.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert evaluations(trained)[4]["loss"] == pytest.approx(total / count, rel=1e-6)
