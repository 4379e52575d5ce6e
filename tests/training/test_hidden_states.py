"""Hidden states that are drawn to a teacher's: the curve of a plain loop on every engine, resumed, exported,
measured."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.tasks.distillation import PROJECTION, HiddenStates, hidden_of, label_divergence
from launcher.training.checkpoint.export import export
from tests.training import test_distillation as distilling
from tests.training.plain_loop import plain_losses
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, batch_of, curve, finish, new_run, replan, state
from tests.training.test_distillation import (
    NUM_STEPS,
    SETTINGS,
    batches,
    divergence,
    encoder,
    rows,
    state_at_start,
    student,
    teacher,
)
from tests.training.test_resume import compare
from tests.training.test_trainer_tasks import plan_of as classifying_plan

__all__ = ["encoder", "rows", "student", "teacher"]
pytestmark = pytest.mark.distributed
HIDDEN = {"hidden_states": {"weight": 3.0}}


def plan(student: Path, teacher: Path, rows: dict[str, Any], world_size: int, **changes: Any) -> Plan:
    changes = {"distillation": {"teacher": str(teacher), **SETTINGS, **HIDDEN}} | changes
    return distilling.plan(student, teacher, rows, world_size, **changes)


def difference(own: Any, wanted: Any, pairs: dict[int, int], matrix: torch.Tensor | None) -> torch.Tensor:
    """The mean square at each position over the width and the pairs of layers, [samples, tokens]."""
    total = torch.zeros(())
    for layer, other in pairs.items():
        mine = own.hidden_states[layer]
        mine = mine if matrix is None else mine @ matrix.t()
        total = total + (mine - wanted.hidden_states[other]).square().mean(-1)
    return total / len(pairs)


@pytest.fixture(scope="module")
def plain(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of a loop in plain PyTorch, each sample alone; the projection begins as a run has it."""
    folder, own_plan = tmp_path_factory.mktemp("plain"), plan(student, teacher, rows, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        _, steps = batches(new_run(folder / "run", own_plan), own_plan)
        begins = state_at_start(new_run(folder / "other", own_plan), own_plan, folder, 1)
    matrix = torch.nn.Parameter(begins[f"model.{PROJECTION}.weight"].clone())
    assert matrix.shape == (64, 48) and float(matrix.detach().std()) > 0
    model, frozen = (AutoModelForCausalLM.from_pretrained(one).eval() for one in (student, teacher))
    parameters = [*model.parameters(), matrix]

    def loss_of(step: int) -> torch.Tensor:
        total, batch = torch.zeros(()), steps.step(step)
        for sample in (sample for items in batch.micro_batches for item in items for sample in item):
            ids = torch.tensor(sample["input_ids"], dtype=torch.int64)[None]
            with torch.no_grad():
                wanted = frozen(ids, output_hidden_states=True)
            own = model(ids, output_hidden_states=True)
            logits = own.logits[0, :-1]
            total = total + 0.3 * functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total = total + 0.7 * 4 * divergence(logits, wanted.logits[0, :-1], 2.0)
            total = total + 3.0 * difference(own, wanted, {1: 2, 2: 4}, matrix)[0, :-1].sum()
        return total / batch.num_supervised

    return plain_losses(parameters, NUM_STEPS, loss_of)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank x 4": (1, {"batch": batch_of(1, 4)}),
    "FSDP, 2 ranks": (2, {"batch": batch_of(2, 1, 2), "activation_checkpointing": "full"}),
    "ZeRO-3, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(3)}),
    "ZeRO-2, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(2)}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("1 rank x 4", marks=pytest.mark.slow),
        "FSDP, 2 ranks",
        pytest.param("ZeRO-3, 2 ranks", marks=pytest.mark.slow),
        pytest.param("ZeRO-2, 2 ranks", marks=pytest.mark.very_slow),
    ],
)
def test_a_run_has_the_curve_of_a_plain_loop(
    name: str, student: Path, teacher: Path, rows: dict[str, Any], plain: list[float], tmp_path: Path
) -> None:
    world_size, changes = WAYS[name]
    if "zero" in changes:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = new_run(tmp_path / "run", plan(student, teacher, rows, world_size, **changes))
    finish(run, world_size)
    torch.testing.assert_close([record["loss"] for record in curve(run).values()], plain, rtol=2e-5, atol=0)
    assert f"model.{PROJECTION}.weight" in state(run)
    export(run, tmp_path / "out")
    _, left = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not left["unexpected_keys"] and not left["missing_keys"], "no projection in an export"


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    make = functools.partial(plan, student, teacher, rows)
    whole, stopped = (
        new_run(tmp_path / name, make(2, batch=batch_of(2, 3))) for name in ("whole", "stopped")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    moved = new_run(tmp_path / "moved", make(2, batch=batch_of(2, 3)))
    finish(moved, 2, stop_at=2)
    replan(moved, make(3, batch=batch_of(3, 2)))
    finish(moved, 3)
    compare(moved, whole, 1e-4)


@pytest.mark.slow
def test_a_classifier_of_the_same_width_has_the_curve_of_a_plain_loop(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = distilling.classifier(
        tmp_path / "teacher",
        ["kind 0", "kind 1", "kind 2"],
        max_position_embeddings=64,
        pad_token_id=0,
        num_hidden_layers=4,
    )
    base = classifying_plan(encoder, tmp_path, "single-label", NUM_STEPS)
    settings = {"teacher": str(teacher), "own_loss": 0.25, "hidden_states": {"layers": {0: 0, 2: 3}}}
    own = Plan.model_validate(base.model_dump(by_alias=True) | {"distillation": settings})
    run = new_run(tmp_path / "run", own)
    finish(run, 2)
    material, steps = batches(run, own)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, config=material.config)
    start = {name.removeprefix("model."): value for name, value in state_at_start(run, own, tmp_path).items()}
    assert not [name for name in start if PROJECTION in name]
    model.load_state_dict(start, strict=False)
    frozen = AutoModelForSequenceClassification.from_pretrained(teacher).eval()

    def loss_of(step: int) -> torch.Tensor:
        [items] = steps.step(step).micro_batches
        batch = material.task.collate(items)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = frozen(**inputs, output_hidden_states=True)
        result = model(**inputs, labels=batch["labels"], output_hidden_states=True)
        drawn = label_divergence("single-label", result.logits, wanted.logits, 1.0).mean()
        apart = difference(result, wanted, {0: 0, 2: 3}, None) * inputs["attention_mask"]
        hidden = (apart.sum(-1) / inputs["attention_mask"].sum(-1)).mean()
        return 0.25 * result.loss + 0.75 * drawn + hidden

    losses = plain_losses(model.parameters(), NUM_STEPS, loss_of, 2e-3)
    torch.testing.assert_close([record["loss"] for record in curve(run).values()], losses, rtol=5e-5, atol=0)


def test_a_model_that_returns_none_is_named() -> None:
    with pytest.raises(ConfigurationError, match="returns no hidden states"):
        hidden_of(object(), torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("own", "others", "wanted"),
    [
        (3, 6, {1: 2, 2: 4, 3: 6}),
        (2, 3, {1: 2, 2: 3}),
        (4, 2, {1: 1, 2: 1, 3: 2, 4: 2}),
        (5, 1, dict.fromkeys(range(1, 6), 1)),
    ],
)
def test_layers_are_matched_in_even_distances(own: int, others: int, wanted: dict[int, int]) -> None:
    assert HiddenStates().pairs(own, others) == wanted
