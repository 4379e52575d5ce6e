"""Several sources: the loss of a plain loop over the same order, on any number of ranks, resumed, and by source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.planner.plan import Length
from launcher.runs import events
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.training.data.order import MixedOrder
from launcher.training.early_stopping import EarlyEnd
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    evaluations,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    replan,
    state,
    tokenizer,
    write_texts,
)
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS, EVALUATE_EVERY = 10, 5
SIZES, COUNTS = (60, 25), (25, 25)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sources in equal shares, the second with a column of its own, and two that are held out."""
    folder = tmp_path_factory.mktemp("data")
    first = write_texts(folder / "prose.jsonl", SIZES[0])
    second = write_texts(folder / "code.jsonl", SIZES[1], seed=2, column="body")
    held_out = [
        write_texts(folder / "held-a.jsonl", 7, seed=3),
        write_texts(folder / "held-b.jsonl", 11, seed=4, column="body"),
    ]
    own = {"columns": {"text": "body"}}
    return {
        "train": [{**first, "weight": 1}, {**second, "weight": 1, "alias": "other"} | own],
        "evaluation": [held_out[0], held_out[1] | own],
        "text": "text",
        "max_length": 64,
        "num_workers": 1,
    }


def make(model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> Any:
    values = {"training": {"clip_norm": 0.0}, "evaluate_every": {"value": EVALUATE_EVERY, "unit": "steps"}}
    values |= {"batch": batch_of(world_size, 6 // world_size)}
    return plan_for(model, data, world_size, NUM_STEPS, **(values | changes))


def run_of(path: Path, model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> RunDirectory:
    run = new_run(path, make(model, data, world_size, **changes))
    finish(run, world_size)
    return run


def by_source(run: RunDirectory) -> list[dict[str, float]]:
    return [one["loss_by_source"] for one in events.read(run.metrics_file) if one["kind"] == "train"]


def tokens(source: dict[str, Any]) -> list[torch.Tensor]:
    column = source.get("columns", {"text": "text"})["text"]
    lines = Path(source["path"]).read_text().splitlines()
    return [torch.tensor([tokenizer()(json.loads(line)[column])["input_ids"]]) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Any]) -> RunDirectory:
    return run_of(tmp_path_factory.mktemp("whole") / "run", model, data, 1)


def test_the_losses_are_those_of_a_plain_loop_over_the_order(
    whole: RunDirectory, model: Path, data: dict[str, Any]
) -> None:
    items = [(number, ids) for number, source in enumerate(data["train"]) for ids in tokens(source)]
    places = MixedOrder(17, SIZES, COUNTS).indices(0, 6 * NUM_STEPS).reshape(NUM_STEPS, 6)
    plain = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    losses, each = [], []
    for step in places:
        sums, counts = [0.0, 0.0], [0, 0]
        number_of_all = sum(items[place][1].shape[1] - 1 for place in step)
        for place in step:
            number, ids = items[place]
            loss = plain(ids, labels=ids).loss * (ids.shape[1] - 1)
            (loss / number_of_all).backward()
            sums[number] += float(loss.detach())
            counts[number] += ids.shape[1] - 1
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(sums) / number_of_all)
        names = ("prose", "other")
        each.append({names[k]: sums[k] / counts[k] for k in range(2) if counts[k]})
    measured = [record["loss"] for record in curve(whole).values()]
    torch.testing.assert_close(measured, losses, rtol=2e-5, atol=0)
    for ours, theirs in zip(by_source(whole), each, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_an_evaluation_is_of_all_and_of_each_source(
    whole: RunDirectory, model: Path, data: dict[str, Any]
) -> None:
    plain, results = AutoModelForCausalLM.from_pretrained(model), {}
    total, number = 0.0, 0
    for alias, source in zip(("held-a", "held-b"), data["evaluation"], strict=True):
        loss_sum, count = 0.0, 0
        for ids in tokens(source):
            with torch.no_grad():
                loss_sum += float(plain(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        results[f"{alias}/loss"] = loss_sum / count
        total, number = total + loss_sum, number + count
    measured = evaluations(whole)[0]
    assert measured["loss"] == pytest.approx(total / number, rel=1e-4)
    assert {name: measured[name] for name in results} == pytest.approx(results, rel=1e-4)
    assert set(measured) >= {"held-a/perplexity", "held-b/perplexity"}


@pytest.mark.slow
def test_the_metric_of_one_source_decides_what_is_kept_and_when_it_ends(
    model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    metric = "held-b/accuracy"
    early = {"metric": metric, "patience": 2}
    plan = make(
        model,
        data,
        1,
        training={"learning_rate": 1e-2, "early_stopping": early},
        checkpoint={"every": 1, "keep_last": 1, "keep_best": 1, "metric": metric},
        evaluate_every={"value": 1, "unit": "steps"},
        length=Length(value=5, unit="steps"),
    )
    run = new_run(tmp_path / "run", plan)
    finish(run, 1)
    values = {step: measured[metric] for step, measured in evaluations(run).items() if step}
    assert values[5] > values[2], "were less better, patience would have run out before"
    best = max(values, key=lambda step: (values[step], step))
    assert [stored.step for stored in list_checkpoints(run)] == sorted({best, 5})
    ending = EarlyEnd(run, plan, True, bool, lambda *_, **__: None)
    for step, value in enumerate([0.5, 0.6, 0.4, 0.55], start=1):
        assert not ending.reached
        ending.judge(step, False, {"loss": 1.0 / step, metric: value})
    assert ending.reached


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_other_ranks_have_the_same_order_and_numbers(
    world_size: int, whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", model, data, world_size)
    compare(run, whole, 1e-5)
    assert [one["sample_ids"] for one in curve(run).values()] == [
        one["sample_ids"] for one in curve(whole).values()
    ]
    for ours, theirs in zip(by_source(run), by_source(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for step in (EVALUATE_EVERY, NUM_STEPS):
        assert evaluations(run)[step] == pytest.approx(evaluations(whole)[step], rel=1e-4)


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    stopped, moved = (new_run(tmp_path / name, make(model, data, 1)) for name in ("stopped", "moved"))
    finish(stopped, 1, stop_at=7)
    finish(stopped, 1)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 1, stop_at=4)
    replan(moved, make(model, data, 3))
    finish(moved, 3)
    compare(moved, whole, 1e-4)


@pytest.mark.very_slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_numbers_of_fsdp(
    stage: int, whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = run_of(tmp_path / "run", model, data, 2, **deepspeed(stage))
    compare(run, whole, 1e-4)
    for ours, theirs in zip(by_source(run), by_source(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_epoch_is_as_long_as_the_shares_make_it(model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    length = Length(value=1, unit="epochs")
    run = run_of(tmp_path / "run", model, data | {"evaluation": None}, 1, length=length)
    assert sum(one["num_samples"] for one in curve(run).values()) == sum(COUNTS)
    [report] = named(run, "prepared")
    assert [(one["source"], one["num_items"], one["in_an_epoch"]) for one in report["by_source"]] == [
        ("prose", 60, 25),
        ("other", 25, 25),
    ]
