"""Several tasks at once: the losses of transformers' own classes over one body, on any number of ranks and engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from launcher import tasks
from launcher.data.rows import Row
from launcher.data.section import Sources
from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory
from launcher.tasks.multi_task import SCALES, MultiTask
from launcher.tasks.task import KEEPS_LOSSES, Encoded, Sample
from launcher.training.checkpoint.export import export
from launcher.training.evaluate_entry import measure
from launcher.training.model.with_heads import head_class, head_config, head_of
from launcher.training.predict_entry import predict
from tests.training.multi_tasks import (
    KINDS,
    SIZES,
    WEIGHTS,
    Plain,
    batches,
    data_of,
    held_out,
    loaded,
    loss_of,
    plan_of,
    rows,
)
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    errors_of,
    evaluations,
    finish,
    model_directory,
    new_run,
    replan,
    state,
    tokenizer,
    write_rows,
)
from tests.training.test_predict import scratch
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS = 6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers without dropout."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = tmp_path_factory.mktemp("encoder")
    return model_directory(folder, "bert", "AutoModel", num_hidden_layers=2, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_of(tmp_path_factory.mktemp("data"))


def run_of(path: Path, encoder: Path, data: dict[str, Any], world_size: int, **changes: Any) -> RunDirectory:
    run = new_run(path, plan_of(encoder, data, world_size, NUM_STEPS, **changes))
    finish(run, world_size)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: dict[str, Any]) -> RunDirectory:
    return run_of(tmp_path_factory.mktemp("whole") / "run", encoder, data, 1)


def by_task(run: RunDirectory) -> list[dict[str, float]]:
    return [one["loss_by_source"] for one in events.read(run.metrics_file) if one["kind"] == "train"]


def test_the_losses_are_those_of_transformers_own_classes_over_one_body(
    whole: RunDirectory, encoder: Path
) -> None:
    plain = Plain(encoder, whole.path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    losses, each = [], []
    for batch in batches(NUM_STEPS):
        loss, means = plain.step_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        each.append(means)
    torch.testing.assert_close([one["loss"] for one in curve(whole).values()], losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(by_task(whole), each, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"world_size": 2}, id="2 ranks"),
        pytest.param({"world_size": 1, "batch": batch_of(1, 1, 12)}, id="1x12", marks=pytest.mark.very_slow),
        pytest.param({"world_size": 2, "engine": 3}, id="ZeRO-3", marks=pytest.mark.very_slow),
    ],
)
def test_others_have_the_same_numbers(
    changes: dict[str, Any], whole: RunDirectory, encoder: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    changes = dict(changes)
    if stage := changes.pop("engine", 0):
        changes |= deepspeed(stage)
    run = run_of(tmp_path / "run", encoder, data, **changes)
    compare(run, whole, 1e-4)
    for ours, theirs in zip(by_task(run), by_task(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for step in (0, NUM_STEPS):
        assert evaluations(run)[step] == pytest.approx(evaluations(whole)[step], rel=1e-4, abs=1e-5)


def test_each_head_has_the_loss_of_its_own_class_alone_on_the_same_batch(
    encoder: Path, tmp_path: Path
) -> None:
    data = data_of(tmp_path) | {"train": [], "evaluation": None}
    data["tasks"]["answers"] = {
        "task": "question-answering",
        "question": "question",
        "context": "context",
        "answers": "answers",
    }
    data["train"] = [{"path": "t", "task": name} for name in data["tasks"]]
    config = AutoConfig.from_pretrained(encoder, attn_implementation="eager")
    task = tasks.build(plan_of(encoder, data, 1, 1), tokenizer())
    assert isinstance(task, MultiTask)
    task.adopt(config)
    answer = {"text": ["w5"], "answer_start": [3]}
    given = {name: rows(name, 3) for name in SIZES} | {
        "answers": [
            {"question": "w1 w2", "context": f"w4 w5 w{number}", "answers": answer} for number in (6, 7)
        ]
    }
    samples: list[list[Sample]] = []
    for name, part in task.parts.items():
        if part.needs_labels:
            part.fit(Row(number, "t", number, row) for number, row in enumerate(given[name]))
        windows = [
            one if isinstance(one, tuple) and not isinstance(one, Encoded) else (one,)
            for one in part.encode(given[name], tokenizer())
        ]
        flat = [window for row in windows for window in row]
        samples += [
            [task.marked(Sample(one.arrays, number, one.length), name)] for number, one in enumerate(flat)
        ]
    task.configure(config)
    torch.manual_seed(0)
    model = task.auto_class.from_config(config, attn_implementation="eager").float().train()
    mixed = samples[::2] + samples[1::2]
    output = task.loss(model, task.collate(mixed) | {KEEPS_LOSSES: True})
    total = 0.0
    for name, part in task.parts.items():
        own = (
            head_class(config, name)
            ._from_config(head_config(config, name), attn_implementation="eager")
            .float()
        )
        own.load_state_dict(head_of(model, name).state_dict(), strict=False)
        getattr(own, own.base_model_prefix).load_state_dict(model.base_model.state_dict(), strict=False)
        alone = part.loss(
            own.train(), part.collate([item for item in mixed if task.part_of(item[0]) == name])
        )
        assert output.parts is not None
        assert float(output.parts[name].loss_sum) == pytest.approx(
            float(alone.loss_sum.detach()), abs=1e-6, rel=1e-6
        )
        total += task.loss_weights[name] * float(alone.loss_sum.detach())
    assert float(output.loss_sum.detach()) == pytest.approx(total, rel=1e-6)
    assert output.losses is not None and len(output.losses) == len(mixed)
    plain = sum(float(one.loss_sum) for one in output.parts.values()) if output.parts else 0.0
    assert float(output.losses.sum()) == pytest.approx(plain, rel=1e-5)
    output.loss_sum.backward()
    heads = [name for name, one in model.named_parameters() if one.grad is None]
    assert heads == [], "every parameter has a gradient in every pass, whichever samples it has"
    one = task.loss(model, task.collate(samples[:1]))
    one.loss_sum.backward()


def test_a_pass_without_samples_of_a_task_gives_its_head_a_gradient_of_zero(
    whole: RunDirectory, data: dict[str, Any]
) -> None:
    plan = Plan.read(whole.plan_file)
    config = AutoConfig.from_pretrained(whole.path / "model", attn_implementation="eager")
    task = tasks.build(plan, tokenizer())
    assert isinstance(task, MultiTask)
    task.adopt(config, as_it_stands=True)
    model = task.auto_class.from_config(config, attn_implementation="eager").float()
    [sample] = task.parts["kind"].encode(rows("kind", 1), tokenizer())
    marked = task.marked(Sample(sample.arrays, 0, sample.length), "kind")
    task.loss(model, task.collate([[marked]]) | task.in_a_step([0, 1, 0])).loss_sum.backward()
    norms = {name: float(head_of(model, name).classifier.weight.grad.norm()) for name in SIZES}
    assert norms["kind"] > 0 and norms["score"] == norms["words"] == 0
    scales = task.in_a_step([2, 3, 0])[SCALES]
    assert (scales["score"], scales["kind"]) == (0.5 * 5 / 2, 2.0 * 5 / 3)


def test_a_run_says_of_each_row_what_each_of_its_heads_says(
    whole: RunDirectory, data: dict[str, Any], tmp_path: Path
) -> None:
    """A row has the columns of some tasks, and is answered for these."""
    given = [rows("score", 1)[0] | rows("words", 1)[0], rows("kind", 1)[0], {"other": "x"}]
    source = write_rows(tmp_path / "rows.jsonl", given)
    export(whole, tmp_path / "export")
    plan = Plan.read(whole.plan_file)
    asked = plan.data.model_copy(update={"evaluation": Sources(**source)})
    scratch_of = scratch(
        tmp_path / "scratch", plan.model_copy(update={"data": asked}), tmp_path / "out.jsonl", run=whole.path
    )
    finish(scratch_of, 1, entry=predict)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [sorted(answer) for answer in answers[:2]] == [["row", "score", "words"], ["kind", "row"]]
    assert answers[2]["problem"] == "missing key"
    with torch.no_grad():
        score = loaded(tmp_path / "export", "score")(**tokenizer()(given[0]["text"], return_tensors="pt"))
        pair = tokenizer()(given[1]["first"], given[1]["second"], return_tensors="pt")
        kind = loaded(tmp_path / "export", "kind")(**pair).logits[0]
    assert answers[0]["score"]["value"] == pytest.approx(float(score.logits), abs=1e-5)
    assert answers[1]["kind"]["label"] == KINDS[int(kind.argmax())]
    assert len(answers[0]["words"]["tags"]) == len(given[0]["words"])


@pytest.mark.very_slow
def test_a_run_is_measured_before_and_after_with_intervals(
    whole: RunDirectory, encoder: Path, tmp_path: Path
) -> None:
    looked = scratch(tmp_path / "scratch", Plan.read(whole.plan_file), tmp_path / "none", run=whole.path)
    request = json.loads((looked.path / "request.json").read_text()) | {"resamples": 20, "seed": 1}
    (looked.path / "request.json").write_text(json.dumps(request))
    finish(looked, 1, entry=measure)
    measured = json.loads((looked.path / "evaluation.json").read_text())
    for when, step in (("before", 0), ("after", NUM_STEPS)):
        assert measured[when] == pytest.approx(evaluations(whole)[step], rel=1e-4, abs=1e-5)
    low, high = measured["confidence"]["after"]["kind/loss"]
    assert low < measured["after"]["kind/loss"] < high
    bare = scratch(tmp_path / "bare", Plan.read(whole.plan_file), tmp_path / "none", encoder)
    request = json.loads((bare.path / "request.json").read_text()) | {"resamples": 0, "seed": 1}
    (bare.path / "request.json").write_text(json.dumps(request))
    [error] = errors_of(bare, 1, entry=measure)
    assert "has no head of the task score; train it first" in str(error)


@pytest.mark.very_slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    encoder: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(encoder, data, 2, NUM_STEPS)
    uninterrupted, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(uninterrupted, 2)
    finish(stopped, 2, stop_at=4)
    finish(stopped, 2)
    assert curve(stopped) == curve(uninterrupted)
    assert_equal(state(stopped), state(uninterrupted))
    finish(moved, 2, stop_at=3)
    replan(moved, plan_of(encoder, data, 3, NUM_STEPS))
    finish(moved, 3)
    compare(moved, uninterrupted, 1e-4)


TUNING: dict[str, dict[str, Any]] = {
    "frozen": {"model__freeze": {"layers": "0", "embeddings": True}},
    "rates": {"training": {"learning_rate": 1e-3, "clip_norm": 0.0, "layer_decay": 0.5}},
    "LoRA": {"model__adapter": {"rank": 2, "alpha": 4}},
    "ZeRO-2": deepspeed(2),
}


@pytest.mark.very_slow
@pytest.mark.parametrize("name", list(TUNING))
def test_what_trains_goes_with_several_tasks(
    name: str, encoder: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    changes = TUNING[name]
    alone = {} if name == "ZeRO-2" else changes
    one = run_of(tmp_path / "one", encoder, data, 1, **alone)
    two = run_of(tmp_path / "two", encoder, data, 2, **changes)
    compare(two, one, 1e-4)
    export(two, tmp_path / "export")
    for task in SIZES:
        model = loaded(tmp_path / "export", task)
        with torch.no_grad():
            losses = [loss_of(task, model, row) for row in held_out(data, task)]
        mean = float(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
        assert mean == pytest.approx(evaluations(two)[NUM_STEPS][f"{task}/loss"], rel=1e-4, abs=1e-5)
    if name == "LoRA":
        with pytest.raises(ConfigurationError, match=r"--adapter.*a head for each task; leave it out"):
            export(two, tmp_path / "adapter", adapter=True)


def test_an_export_has_a_directory_for_each_head_that_transformers_loads(
    whole: RunDirectory, data: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "export"
    exported = export(whole, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "kind", "score", "words"]
    assert "score/model.safetensors" in exported.files
    last = evaluations(whole)[NUM_STEPS]
    for task in SIZES:
        model = loaded(out, task)
        with torch.no_grad():
            losses = [loss_of(task, model, row) for row in held_out(data, task)]
        mean = float(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
        assert mean == pytest.approx(last[f"{task}/loss"], rel=1e-5, abs=1e-6)
        assert not hasattr(model.config, "task_heads")
        own = json.loads((out / task / "launcher_evaluation.json").read_text())
        assert own["metrics"] == {
            name.removeprefix(f"{task}/"): value
            for name, value in last.items()
            if name.startswith(f"{task}/")
        }
    assert last["loss"] == pytest.approx(sum(WEIGHTS[task] * last[f"{task}/loss"] for task in SIZES))
    card = (out / "README.md").read_text()
    assert 'model = AutoModelForTokenClassification.from_pretrained("DIRECTORY/words")' in card
