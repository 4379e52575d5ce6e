"""Distillation: the curve of a plain PyTorch loop on every engine and number of ranks, resumed and refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.distillation import Distillation, label_divergence
from launcher.training import distillation, heads, loss
from launcher.training.checkpoint.export import export
from launcher.training.data.batches import Batches, total_items
from launcher.training.data.order import Order
from launcher.training.inputs import TrainingInputs
from launcher.training.model import pretrained
from launcher.training.model import teacher as teaching
from launcher.training.model.teacher import check_teacher
from tests.training.batches import batch_of_samples
from tests.training.plain_loop import plain_losses
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
    tokenizer,
)
from tests.training.test_resume import compare
from tests.training.test_trainer_tasks import plan_of as classifying_plan
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
NUM_STEPS = 4
SETTINGS = {"temperature": 2.0, "own_loss": 0.3}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("student"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model of another family, whose embedding has more rows than the student's."""
    sizes = {"hidden_size": 64, "vocab_size": 140, "seed": 1, "num_hidden_layers": 4}
    return model_directory(tmp_path_factory.mktemp("teacher"), "qwen3", **sizes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return causal_data(tmp_path_factory.mktemp("rows"))


def plan(student: Path, teacher: Path, rows: dict[str, Any], world_size: int = 1, **changes: Any) -> Plan:
    section = {"teacher": str(teacher), **SETTINGS}
    return plan_for(student, rows, world_size, NUM_STEPS, **({"distillation": section} | changes))


def batches(run: RunDirectory, plan: Plan) -> tuple[TrainingInputs, Batches]:
    """All samples of each step, in one micro-batch."""
    material = TrainingInputs.of(run, plan)
    order = Order(plan.training.seed, material.train.num_items, shuffle=True)
    num_items = total_items(plan, material.train.num_items)
    size = plan.batch.global_batch_size
    return material, Batches(
        material.train, order, type(plan.batch).model_validate(batch_of(1, size)), 0, num_items
    )


def divergence(own: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum over positions, by PyTorch's own function, over the rows that both have."""
    num_both = min(own.shape[-1], wanted.shape[-1])
    return functional.kl_div(
        (own[..., :num_both] / temperature).log_softmax(-1),
        (wanted[..., :num_both] / temperature).softmax(-1),
        reduction="sum",
    )


@pytest.fixture(scope="module")
def plain(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of a loop in plain PyTorch, each sample alone."""
    own_plan = plan(student, teacher, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        _, steps = batches(new_run(tmp_path_factory.mktemp("plain") / "run", own_plan), own_plan)
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher))

    def loss_of(step: int) -> torch.Tensor:
        total, batch = torch.zeros(()), steps.step(step)
        for sample in (sample for items in batch.micro_batches for item in items for sample in item):
            ids = torch.tensor(sample["input_ids"], dtype=torch.int64)[None]
            with torch.no_grad():
                wanted = frozen(ids).logits[0, :-1]
            logits = model(ids).logits[0, :-1]
            total = total + 0.3 * functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total = total + 0.7 * 4 * divergence(logits, wanted, 2.0)
        return total / batch.num_supervised

    return plain_losses(model.parameters(), NUM_STEPS, loss_of)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank x 4": (1, {"batch": batch_of(1, 4)}),
    "4 passes of 1": (1, {"batch": batch_of(1, 1, 4)}),
    "FSDP, 2 ranks": (2, {"batch": batch_of(2, 1, 2)}),
    "FSDP, 2 copies": (2, {"batch": batch_of(2, 2), "sharding": "none"}),
    "ZeRO-3, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(3)}),
    "ZeRO-2, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(2)}),
}


@pytest.mark.parametrize(
    "name",
    [
        "1 rank x 4",
        pytest.param("4 passes of 1", marks=pytest.mark.very_slow),
        "FSDP, 2 ranks",
        pytest.param("ZeRO-3, 2 ranks", marks=pytest.mark.slow),
        pytest.param("ZeRO-2, 2 ranks", marks=pytest.mark.very_slow),
        pytest.param("FSDP, 2 copies", marks=pytest.mark.very_slow),
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
    losses = [record["loss"] for record in curve(run).values()]
    torch.testing.assert_close(losses, plain, rtol=2e-5, atol=0)
    held_out = AutoModelForCausalLM.from_pretrained(student)
    assert evaluations(run)[0]["loss"] == pytest.approx(_own_loss(held_out, rows), rel=1e-4), (
        "an evaluation measures the task's own loss, without a teacher"
    )
    assert not [key for key in state(run) if "teacher" in key or "layers.3." in key]


def _own_loss(model: Any, rows: dict[str, Any]) -> float:
    """The mean loss over all tokens of the held-out rows, by the model's own class."""
    loss_sum, number = 0.0, 0
    for line in Path(rows["evaluation"]["path"]).read_text().splitlines():
        ids = torch.tensor([tokenizer()(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            loss_sum += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        number += ids.shape[1] - 1
    return loss_sum / number


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    make = functools.partial(plan, student, teacher, rows)
    whole, stopped, moved = (
        new_run(tmp_path / name, make(2, batch=batch_of(2, 3))) for name in ("whole", "stopped", "moved")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=2)
    replan(moved, make(3, batch=batch_of(3, 2)))
    finish(moved, 3)
    compare(moved, whole, 1e-4)


@pytest.mark.slow
def test_a_run_teaches_as_its_export_does(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    """FSDP on two ranks and ZeRO-3 learn from a run what they learn from its export, stopped in between and
    with the teacher's checkpoints gone."""
    large = new_run(tmp_path / "large", plan_for(teacher, rows, 1, 2))
    finish(large, 1)
    export(large, tmp_path / "exported", 2)
    batch, section = batch_of(2, 3), {"teacher": str(large.path / "model"), "checkpoint": 2, **SETTINGS}
    known, learning, other = (
        new_run(tmp_path / name, plan(student, tmp_path / "exported", rows, 2, batch=batch, **changes))
        for name, changes in (
            ("known", {}),
            ("learning", {"distillation": section}),
            ("other", {"distillation": section, **deepspeed(3)}),
        )
    )
    finish(known, 2)
    finish(other, 2)
    shutil.copytree(student, learning.path / "teacher")  # of another, before anything was learned
    finish(learning, 2, stop_at=2)
    shutil.rmtree(large.checkpoints)
    finish(learning, 2)
    assert curve(learning) == curve(known)
    assert_equal(state(learning), state(known))
    compare(other, known, 1e-4)


@pytest.mark.parametrize("evaluate", [None, False, True])
def test_a_teacher_is_written_out_once_for_each_checkpoint(
    evaluate: bool | None,
    teacher: Path,
    rows: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a run that measures its averages those."""
    training = {"training": {"ema": {"decay": 0.5, "evaluate": evaluate}}} if evaluate is not None else {}
    large = new_run(tmp_path / "large", plan_for(teacher, rows, 1, 2, **training))
    wrote: list[tuple[int, bool]] = []

    def write(run: RunDirectory, out: Path, step: int, ema: bool) -> None:
        assert run.path == large.path and not out.exists()
        out.mkdir()
        wrote.append((step, ema))

    monkeypatch.setattr(teaching, "export", write)
    monkeypatch.setattr(teaching, "distributed", SimpleNamespace(get_rank=lambda: 0, barrier=lambda: None))
    run = RunDirectory(tmp_path / "run")
    (run.path / "teacher").mkdir(parents=True)
    for step in (2, 2, 4):
        own = plan(teacher, large.path / "model", rows)
        own = own.model_copy(
            update={"distillation": Distillation(teacher=str(large.path / "model"), checkpoint=step)}
        )
        there = teaching.written_out(run, own)
        assert there is not None and there.teacher == str(run.path / "teacher")
    assert wrote == [(2, bool(evaluate)), (4, bool(evaluate))]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_in_chunks_the_divergence_is_the_plain_one(
    family: str, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of passes that take several chunks, with caps and scales, to 1e-6."""
    monkeypatch.setattr(loss, "chunk_length", lambda vocabulary, cuda: 7)
    changes = {"final_logit_softcapping": 5.0} if family == "gemma2" else {}
    model = model_of(family, attn_implementation="eager", **changes).train()
    frozen = AutoModelForCausalLM.from_pretrained(teacher).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randint(3, 131, (length,), generator=generator) for length in (11, 4, 18)]
    settings = Distillation(teacher="any", **SETTINGS)
    batch = batch_of_samples(samples, "padded")
    output = distillation.causal_lm(model, batch, frozen, settings)
    output.loss_sum.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for ids in samples:
        with torch.no_grad():
            wanted = frozen(ids[None]).logits[0, :-1]
        logits = model(ids[None]).logits[0, :-1]
        total = total + 0.3 * functional.cross_entropy(logits, ids[1:], reduction="sum")
        total = total + 0.7 * 4 * divergence(logits, wanted, 2.0)
    total.backward()
    torch.testing.assert_close(output.loss_sum, total.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6 + 1e-5 * size)
    with torch.no_grad():
        model.eval()
        assert heads.causal_lm(model, batch).losses is not None


@pytest.mark.parametrize("problem", ["single-label", "multi-label", "regression"])
def test_divergences_of_labels_are_those_of_their_distributions(problem: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = 1 if problem == "regression" else 4
    own, wanted = (torch.randn(5, outputs, generator=generator) for _ in range(2))
    temperature = 1.0 if problem == "regression" else 3.0
    one = torch.distributions.Bernoulli if problem == "multi-label" else torch.distributions.Categorical
    if problem == "regression":
        expected = (own - wanted).square()[:, 0]
    else:
        expected = torch.distributions.kl_divergence(
            one(logits=wanted / temperature), one(logits=own / temperature)
        )
    expected = expected.mean(-1) if problem == "multi-label" else expected
    torch.testing.assert_close(label_divergence(problem, own, wanted, temperature), expected)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_directory(
        tmp_path_factory.mktemp("encoder"), "bert", "AutoModel", num_hidden_layers=2, **still
    )


def classifier(path: Path, labels: list[str], **changes: Any) -> Path:
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return model_directory(path, "roberta", "AutoModelForSequenceClassification", seed=2, **names, **changes)


@pytest.mark.parametrize(
    ("problem", "engine"),
    [
        pytest.param("single-label", {}, marks=pytest.mark.slow),
        pytest.param("multi-label", {}, marks=pytest.mark.very_slow),
        pytest.param("regression", {}, marks=pytest.mark.very_slow),
        pytest.param("single-label", deepspeed(3), marks=pytest.mark.very_slow),
    ],
)
def test_a_classifier_has_the_curve_of_a_plain_loop(
    problem: str, engine: dict[str, Any], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    labels = {"single-label": ["kind 0", "kind 1", "kind 2"], "multi-label": ["low", "many"]}.get(
        problem, ["value"]
    )
    teacher = classifier(tmp_path / "teacher", labels, max_position_embeddings=64, pad_token_id=0)
    base = classifying_plan(encoder, tmp_path, problem, NUM_STEPS)
    settings = {"teacher": str(teacher), "own_loss": 0.25}
    settings |= {} if problem == "regression" else {"temperature": 1.5}
    own = Plan.model_validate(base.model_dump(by_alias=True) | engine | {"distillation": settings})
    run = new_run(tmp_path / "run", own)
    finish(run, 2)
    material, steps = batches(run, own)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, config=material.config)
    start = {name.removeprefix("model."): value for name, value in state_at_start(run, own, tmp_path).items()}
    model.load_state_dict(start, strict=False)
    frozen = AutoModelForSequenceClassification.from_pretrained(teacher).eval()

    def loss_of(step: int) -> torch.Tensor:
        [items] = steps.step(step).micro_batches
        batch = material.task.collate(items)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = frozen(**inputs).logits
        result = model(**inputs, labels=batch["labels"])
        temperature = settings.get("temperature", 1.0)
        drawn = label_divergence(problem, result.logits, wanted, temperature).mean()
        return 0.25 * result.loss + 0.75 * temperature**2 * drawn

    losses = plain_losses(model.parameters(), NUM_STEPS, loss_of, 2e-3)
    torch.testing.assert_close([record["loss"] for record in curve(run).values()], losses, rtol=5e-5, atol=0)


def state_at_start(
    run: RunDirectory, plan: Plan, scratch: Path, world_size: int = 2
) -> dict[str, torch.Tensor]:
    """The weights that a run begins with, its new head among them: as a run of no learning saves them."""
    still = plan.model_copy(update={"training": plan.training.model_copy(update={"learning_rate": 1e-30})})
    other = new_run(scratch / "still", still)
    finish(other, world_size, stop_at=1)
    return {key: value for key, value in state(other).items() if key.startswith("model.")}


def checked(student: Path, teacher: Path, rows: dict[str, Any]) -> str:
    """The problem of a teacher that does not go with the student; empty where it does."""
    own = plan(student, teacher, rows)
    tokenizer = pretrained.read_processor(own)
    try:
        check_teacher(own, tasks.build(own, tokenizer), tokenizer, None)  # type: ignore[arg-type]
    except ConfigurationError as error:
        [problem] = error.problems
        assert problem.key == "distillation.teacher"
        return problem.reason
    return ""


def test_a_teacher_with_another_tokenizer_is_refused(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    assert not checked(student, teacher, rows)
    other = shutil.copytree(teacher, tmp_path / "words")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w7"', '"other"'))
    assert "'w7' has the number 11 in the model's and none in the teacher's" in checked(student, other, rows)
    other = shutil.copytree(teacher, tmp_path / "cut")
    content = json.loads(text)
    content["pre_tokenizer"] = None
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "into other tokens" in checked(student, other, rows)
    small = model_directory(tmp_path / "small", "qwen3", vocab_size=100)
    assert "its embedding has 100 rows" in checked(student, small, rows)
    assert checked(student, tmp_path / "nowhere", rows), "a directory that is not there"


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["kind 0", "kind 2", "kind 1"], "they must be the same, in order"),
        (["kind 0", "kind 1"], "they must be the same, in order"),
        ([], "no classification head"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(
    labels: list[str], reason: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = (
        classifier(tmp_path / "teacher", labels)
        if labels
        else model_directory(tmp_path / "teacher", "roberta", "AutoModel")
    )
    base = classifying_plan(encoder, tmp_path, "single-label", NUM_STEPS)
    own = base.model_copy(update={"distillation": Distillation(teacher=str(teacher))})
    with pytest.raises(ConfigurationError, match=reason):
        TrainingInputs.of(new_run(tmp_path / "run", own), own)


def test_a_teacher_of_several_numbers_is_refused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = classifier(tmp_path / "teacher", ["a", "b"])
    base = classifying_plan(encoder, tmp_path, "regression", NUM_STEPS)
    own = base.model_copy(update={"distillation": Distillation(teacher=str(teacher))})
    with pytest.raises(ConfigurationError, match="it has 2 outputs, and a number is one"):
        TrainingInputs.of(new_run(tmp_path / "run", own), own)
