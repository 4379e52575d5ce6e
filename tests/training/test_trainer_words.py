"""Masked LM and tags train: the same numbers on one rank and on several, on FSDP and on ZeRO, and to the bit
after a stop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher import tasks
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.task import AnswerOptions, Encoded, Sample
from launcher.training.checkpoint.export import export
from launcher.training.signals import StopRequest
from tests.distributed.test_tasks_token_classification import piece_tokenizer
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    evaluations,
    finish,
    new_run,
    plan_for,
    state,
    write_rows,
)
from tests.training.tiny import model_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers without dropout, and a tokenizer of letters."""
    directory = tmp_path_factory.mktemp("encoder")
    sizes = {
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    model_of("bert", "AutoModel", **sizes).save_pretrained(directory)
    piece_tokenizer().save_pretrained(directory)
    return directory


def sentences(num_rows: int = 72) -> list[dict[str, list[str]]]:
    """Words of a to e, in which a `q` begins a name of one or two words, and a long row that takes several
    windows."""
    generator = random.Random(4)
    rows = []
    for number in range(num_rows):
        words, tags = [], []
        while len(words) < (40 if number == 5 else 4 + number % 5):
            named = generator.random() < 0.3
            size = generator.randrange(1, 3)
            words += ["q" * named + "".join(generator.choices("abcde", k=2)), "fa"][: size if named else 1]
            tags += ["B-name", "I-name"][:size] if named else ["O"]
        rows.append({"words": words, "tags": tags})
    return rows


def plan_of(
    encoder: Path,
    directory: Path,
    task: str,
    batch: dict[str, int],
    num_steps: int = NUM_STEPS,
    **changes: Any,
) -> Plan:
    directory.mkdir(exist_ok=True)
    rows = sentences()
    text = [{"text": " ".join(row["words"])} for row in rows]
    source = write_rows(directory / f"{task}.jsonl", text if task == "masked-lm" else rows)
    keys = (
        {"text": "text", "mask_probability": 0.3}
        if task == "masked-lm"
        else {"words": "words", "tags": "tags"}
    )
    data = {"train": source, "evaluation": source, "max_length": 32, "num_workers": 1} | keys
    head = {"head": "model"} if task == "masked-lm" else {}
    kinds = {
        "model__task": task,
        "task": task,
        "attention": "sdpa",
        "layout": "padded",
        **head,
        "batch": batch,
    }
    return plan_for(
        encoder,
        data,
        batch["data_parallel_size"],
        num_steps,
        training={"learning_rate": 3e-3},
        **(kinds | changes),
    )


def run_of(path: Path, plan: Plan) -> RunDirectory:
    run = new_run(path, plan)
    finish(run, plan.mesh.world_size)
    return run


def numbers(run: RunDirectory) -> torch.Tensor:
    return torch.tensor(
        [[record["loss"], record["grad_norm"]] for record in curve(run).values()], dtype=torch.float64
    )


def in_other_pieces(rank: int, stop: StopRequest) -> None:
    """For a hook: the head is gone through in other pieces on each rank."""
    from launcher.training import own_head

    own_head.chunk_length = lambda vocabulary, cuda: (3, 500)[rank]


@pytest.fixture(scope="module", params=["masked-lm", "token-classification"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, encoder: Path
) -> tuple[str, RunDirectory]:
    """The task, and its run on one rank."""
    directory = tmp_path_factory.mktemp("whole")
    return request.param, run_of(
        directory / "run", plan_of(encoder, directory, request.param, batch_of(1, 8))
    )


@pytest.mark.parametrize(
    ("whole", "engine"),
    [
        ("masked-lm", "zero3"),
        ("token-classification", "fsdp"),
        pytest.param("masked-lm", "fsdp", marks=pytest.mark.very_slow),
        pytest.param("token-classification", "zero3", marks=pytest.mark.very_slow),
    ],
    indirect=["whole"],
)
def test_two_ranks_have_the_numbers_of_one(
    engine: str, whole: tuple[str, RunDirectory], encoder: Path, tmp_path: Path
) -> None:
    """On ZeRO in two micro-batches; windows of one row are on several ranks; masks are drawn alike."""
    task, alone = whole
    batch, changes = (batch_of(2, 4), {}) if engine == "fsdp" else (batch_of(2, 2, 2), deepspeed(3))
    run = run_of(tmp_path / "run", plan_of(encoder, tmp_path, task, batch, **changes))
    torch.testing.assert_close(numbers(run), numbers(alone), rtol=1e-4, atol=1e-6)
    assert [one["sample_ids"] for one in curve(run).values()] == [
        one["sample_ids"] for one in curve(alone).values()
    ]
    for step, metrics in evaluations(run).items():
        assert metrics == pytest.approx(evaluations(alone)[step], rel=1e-3), (
            "as the same rows are masked in each evaluation"
        )


def test_ranks_with_heads_in_other_pieces_do_not_wait_for_each_other(encoder: Path, tmp_path: Path) -> None:
    """On ZeRO-3 every use of the head's matrices may be a message; one rank has many pieces, the other one."""
    plan = plan_of(encoder, tmp_path, "masked-lm", batch_of(2, 2), 2, **deepspeed(3))
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"evaluation": None})})
    run = new_run(tmp_path / "run", plan)
    finish(run, 2, in_other_pieces)
    assert len(curve(run)) == 2


def test_it_learns_and_does_not_know_of_a_stop(
    whole: tuple[str, RunDirectory], encoder: Path, tmp_path: Path
) -> None:
    task, alone = whole
    first, *_, last = evaluations(alone).values()
    assert last["loss"] < first["loss"]
    stopped = new_run(tmp_path / "run", plan_of(encoder, tmp_path, task, batch_of(1, 8)))
    finish(stopped, 1, stop_at=3)
    finish(stopped, 1)
    assert curve(stopped) == curve(alone)
    assert_equal(state(stopped), state(alone))


def test_an_export_answers_in_its_pipeline_as_the_task_does(
    whole: tuple[str, RunDirectory], tmp_path: Path
) -> None:
    name, run = whole
    export(run, tmp_path / "out")
    pipeline = transformers.pipeline(
        "fill-mask" if name == "masked-lm" else name, model=str(tmp_path / "out")
    )
    plan = Plan.read(run.plan_file)
    task = tasks.build(plan, pipeline.tokenizer)
    task.adopt(pipeline.model.config, as_it_stands=True)
    task.for_prediction = True
    task.configure(pipeline.model.config)
    row: dict[str, Any] = {"text": "qab [MASK] cd fa"}
    if name == "token-classification":
        row = {"words": ["qab", "fa", "cd", "fa"]}
    [parts] = task.encode([row], pipeline.tokenizer)
    assert isinstance(parts, tuple)
    samples = [Sample(part.arrays, 0, part.length) for part in parts if isinstance(part, Encoded)]
    batch = task.collate([[sample] for sample in samples])
    with torch.no_grad():
        output = task.loss(pipeline.model, batch)
    answer = task.answer(row, task.answers(output, batch, samples, AnswerOptions(probabilities=True)))
    if name == "masked-lm":
        [best] = pipeline(row["text"], top_k=1)
        assert answer["text"] == f"qab {best['token_str']} cd fa"
        assert answer["masks"][0][0]["probability"] == pytest.approx(best["score"], rel=1e-4)
        return
    said = {one["start"]: one for one in pipeline(" ".join(row["words"]), ignore_labels=[])}
    beginnings = [said[start] for start in (0, 4, 7, 10)]
    assert answer["tags"] == [one["entity"] for one in beginnings]
    assert answer["probabilities"] == pytest.approx([one["score"] for one in beginnings], rel=1e-4)
