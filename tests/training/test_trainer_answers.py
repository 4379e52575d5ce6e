"""Questions are learned on both engines and any number of ranks, in windows, and an export answers as the run did."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from launcher import tasks
from launcher.errors import CheckpointError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.task import AnswerOptions, Sample
from launcher.training.checkpoint.export import export
from launcher.training.evaluate_entry import measure
from launcher.training.model.model_files import EVALUATION, kept
from launcher.training.subject import Subject
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
    state,
    tokenizer,
    write_rows,
)  # fmt: skip

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NUM_STEPS = 40


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with dropout, and a tokenizer for pairs that pads on the left."""
    directory = model_directory(
        tmp_path_factory.mktemp("encoder"),
        "bert",
        "AutoModel",
        num_hidden_layers=2,
        initializer_range=0.1,
        max_position_embeddings=64,
    )
    pairs = tokenizer()
    pairs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pairs.cls_token, pairs.padding_side = "<s>", "left"
    pairs.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs.save_pretrained(directory)
    return directory


def rows(num_rows: int, seed: int = 5) -> list[dict[str, Any]]:
    """Texts of 6 to 30 words; the answer are the words from 100 on, of which there are one to three, or none."""
    generator = random.Random(seed)
    found = []
    for number in range(num_rows):
        words = [f"w{generator.randrange(100)}" for _ in range(generator.randrange(6, 31))]
        place, length = generator.randrange(len(words)), generator.randrange(1, 4)
        answer = " ".join(f"w{generator.randrange(100, 120)}" for _ in range(length))
        context = " ".join([*words[:place], *([answer] if number % 4 else []), *words[place:]])
        answers = [{"text": answer, "answer_start": context.index(answer)}] if number % 4 else []
        found.append({"question": f"w{generator.randrange(100)} w1", "context": context, "answers": answers})
    return found


def plan_of(encoder: Path, directory: Path, world_size: int = 2, num_steps: int = 8, **changes: Any) -> Plan:
    data: dict[str, Any] = {
        "train": write_rows(directory / "rows.jsonl", rows(96)),
        "max_length": 24,
        "doc_stride": 6,
        "num_workers": 1,
    }
    data |= {
        "evaluation": write_rows(directory / "held-out.jsonl", rows(24, seed=6)),
        "unanswerable": True,
        "max_answer_length": 4,
    }
    task = {
        "model__task": "question-answering",
        "task": "question-answering",
        "attention": "sdpa",
        "layout": "padded",
    }
    values = {"batch": batch_of(world_size, 16 // world_size), "training": {"learning_rate": 4e-3}} | changes
    return plan_for(encoder, data, world_size, num_steps, **task, **values)


def run_of(path: Path, plan: Plan) -> RunDirectory:
    run = new_run(path, plan)
    finish(run, plan.mesh.world_size)
    return run


@pytest.fixture(scope="module")
def learned(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = tmp_path_factory.mktemp("learned")
    return run_of(directory / "run", plan_of(encoder, directory, num_steps=NUM_STEPS))


def test_it_learns_in_windows(learned: RunDirectory) -> None:
    said = named(learned, "prepared")[0]
    assert said["rows_used"] == 96 < said["num_items"]
    before, after = evaluations(learned)[0], evaluations(learned)[NUM_STEPS]
    assert after["loss"] < 0.5 * before["loss"] and after["f1"] > 0.6 > before["f1"], (before, after)
    assert after["has_answer_f1"] > 0.5 and after["no_answer_accuracy"] > 0.5, after
    told = json.loads(learned.evaluation(NUM_STEPS).read_text())
    assert told["metrics"] == after and told["details"]["num_without_answer"] == 6
    assert told["details"]["no_answer_threshold"] >= told["details"]["best_f1_threshold"]


def test_an_export_keeps_the_threshold_that_was_fitted(learned: RunDirectory, tmp_path: Path) -> None:
    """Other rows are measured by it, and no threshold is fitted on them; what goes along is of that model alone."""
    export(learned, tmp_path / "export")
    told = json.loads(learned.evaluation(NUM_STEPS).read_text())
    fitted = told["details"]["no_answer_threshold"]
    plan = Plan.read(learned.plan_file)
    other = write_rows(tmp_path / "other.jsonl", rows(16, seed=9))
    data = plan.data.model_copy(update={"evaluation": type(plan.data.train)(**other)})
    scratch = new_run(tmp_path / "scratch", plan.model_copy(update={"data": data}))
    request = {"run": None, "model": str(tmp_path / "export"), "step": None, "resamples": 0, "seed": 1}
    (scratch.path / "request.json").write_text(json.dumps(request))
    finish(scratch, 2, entry=measure)
    result = json.loads((scratch.path / "evaluation.json").read_text())
    assert result["details"]["after"]["no_answer_threshold"] == fitted
    assert result["details"]["before"]["no_answer_threshold"] != fitted  # the model that the job begins with
    assert Path(EVALUATION) not in kept(tmp_path / "export")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"details": [1]}', '{"details": {"no_answer_threshold": "high"}}']
)
def test_a_damaged_evaluation_beside_a_model_is_named(
    learned: RunDirectory, tmp_path: Path, content: str
) -> None:
    shutil.copytree(learned.path / "model", tmp_path / "model")
    (tmp_path / "model" / EVALUATION).write_text(content)
    with pytest.raises(
        CheckpointError, match=f"{EVALUATION} holds what was fitted .* remove it to go without"
    ):
        Subject.of(Plan.read(learned.plan_file), None, str(tmp_path / "model"))


def test_an_export_answers_as_the_run(learned: RunDirectory, tmp_path: Path) -> None:
    """`pipeline("question-answering")` is gone from transformers 5: the Auto class and the same arithmetic stand for it."""
    export(learned, tmp_path / "export")
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "export").eval()
    processor, plan = AutoTokenizer.from_pretrained(tmp_path / "export"), Plan.read(learned.plan_file)
    task = tasks.build(plan, processor)
    task.adopt_evaluation(json.loads(learned.evaluation(NUM_STEPS).read_text())["details"])
    task.configure(model.config)
    right = []
    for row in rows(24, seed=6):
        [windows] = task.encode([row], processor)
        assert isinstance(windows, tuple)
        samples = [Sample(one.arrays, 0, one.length, window=number) for number, one in enumerate(windows)]
        batch = task.collate([[sample] for sample in samples])
        with torch.no_grad():
            parts = task.answers(task.loss(model, batch), batch, samples, AnswerOptions(True, None))
        given, wanted = task.answer(row, parts), "".join(one["text"] for one in row["answers"])
        assert row["context"][given["start"] : given["end"]] == given["answer"]
        right.append(given["answer"] == wanted)
        if len(samples) == 1:
            # As transformers' documentation goes: the best begin and end of the text's tokens.
            inputs = processor(row["question"], row["context"], return_tensors="pt")
            with torch.no_grad():
                output = model(**inputs)
            spans = inputs.encodings[0].offsets
            inside = [place for place, number in enumerate(inputs.encodings[0].sequence_ids) if number == 1]
            scores = {
                (first, last): float(output.start_logits[0, first] + output.end_logits[0, last])
                for first in inside for last in inside if 0 <= last - first < 4
            }  # fmt: skip
            first, last = max(scores, key=lambda pair: scores[pair])
            if given["answer"]:
                assert row["context"][spans[first][0] : spans[last][1]] == given["answer"]
    assert np.mean(right) == pytest.approx(evaluations(learned)[NUM_STEPS]["exact_match"])


@pytest.fixture(scope="module")
def short(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Eight steps without dropout on one rank."""
    directory = tmp_path_factory.mktemp("short")
    return run_of(directory / "run", plan_of(still(encoder, directory), directory, 1))


def still(encoder: Path, directory: Path) -> Path:
    """The model without dropout, whose masks follow the cut."""
    import shutil

    plain = directory / "still"
    shutil.copytree(encoder, plain)
    config = json.loads((plain / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (plain / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, {"batch": batch_of(1, 4, 4)}), (2, {}), (2, deepspeed(3))],
    ids=["4x4 on one rank", "two ranks", "two ranks, ZeRO-3"],
)
def test_every_cut_and_engine_gives_the_same_numbers(
    world_size: int, changes: dict[str, Any], short: RunDirectory, encoder: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", plan_of(still(encoder, tmp_path), tmp_path, world_size, **changes))
    ours, theirs = (
        [[record["loss"], record["grad_norm"]] for record in curve(one).values()] for one in (run, short)
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
    assert [record["sample_ids"] for record in curve(run).values()] == [
        record["sample_ids"] for record in curve(short).values()
    ]
    assert evaluations(run)[8] == pytest.approx(evaluations(short)[8], rel=1e-4, nan_ok=True)


def test_a_stop_changes_no_bit(encoder: Path, tmp_path: Path) -> None:
    whole, stopped = (
        new_run(tmp_path / name, plan_of(encoder, tmp_path, num_steps=4)) for name in ("whole", "stopped")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    assert evaluations(stopped)[4] == evaluations(whole)[4]
