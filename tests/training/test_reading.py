"""What of a model's files is not read as it stands there: rows for added tokens, and a head for other
classes. The same on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, CanineConfig

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.inputs import TrainingInputs
from launcher.training.model import loading as models
from launcher.training.model import pretrained
from launcher.training.model.reading import Changes, _Grown
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    evaluations,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    state,
    texts,
    tokenizer,
    write_rows,
)
from tests.training.tiny import model_of

NUM_TOKENS = 124
"""Of the tests' tokenizer, before any is added."""
DATA = {"train": {"path": "unused.jsonl"}, "text": "text", "label": "label"}


def with_added_tokens(
    path: Path, family: str, auto_class: str = "AutoModelForCausalLM", number: int = 3, **changes: Any
) -> Path:
    """A model with as many rows as its tokenizer had tokens before some were added."""
    model_of(family, auto_class, **({"vocab_size": NUM_TOKENS} | changes)).save_pretrained(path)
    longer = tokenizer()
    longer.add_tokens([f"<new-{index}>" for index in range(number)])
    longer.save_pretrained(path)
    return path


def whole(plan: Plan, labels: list[str] | None = None) -> dict[str, torch.Tensor]:
    """The model's parameters as they are loaded, each whole."""
    task = tasks.unprepared(plan, labels)
    config = pretrained.read_config(plan)
    if labels is not None:
        task.configure(config)
    loaded = models.load(plan, task.auto_class, config, build_shard(plan))
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in loaded.model.named_parameters()
    }


def build_shard(plan: Plan) -> Any:
    """The cut of the plan's engine."""
    from launcher.training.engines.fsdp import FsdpEngine
    from launcher.training.engines.unshard import cut_rows

    if plan.engine == "deepspeed":
        return lambda model: cut_rows(model, model._mesh_manager.get_mesh("fsdp"))
    engine = FsdpEngine.__new__(FsdpEngine)
    engine._plan = plan
    return engine._shard


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {"tie_word_embeddings": True}, id="tied"),
        pytest.param("llama", {"tie_word_embeddings": False}, id="untied", marks=pytest.mark.slow),
        pytest.param("gpt2", {}, id="gpt2", marks=pytest.mark.slow),
        pytest.param("phi", {}, id="a head with a bias", marks=pytest.mark.slow),
    ],
)
def test_new_rows_are_the_mean_of_the_old_on_any_number_of_ranks(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = with_added_tokens(tmp_path, family, **changes)
    stored = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    results = [on_ranks(1, whole, plan_of(path, 1, model__resize_embeddings=True))[0]]
    results += on_ranks(3, whole,
    plan_of(path, 3, model__resize_embeddings=True, batch={"global_batch_size": 3, "micro_batch_size": 1,
                                          "accumulation_steps": 1, "data_parallel_size": 3}))  # fmt: skip
    results += on_ranks(2, whole, plan_of(path, 2, model__resize_embeddings=True, **deepspeed(3)))
    grown = 0
    for name, expected in stored.items():
        if expected.shape[0] == NUM_TOKENS:
            mean = expected.detach().double().mean(dim=0, keepdim=True).float()
            expected = torch.cat([expected.detach(), mean.expand(3, *mean.shape[1:])])
            grown += 1
        for result in results:
            torch.testing.assert_close(result[name], expected.detach(), rtol=1e-6, atol=1e-9)
            assert torch.equal(result[name], results[0][name]), name
    assert grown == {"llama": 1 if changes.get("tie_word_embeddings") else 2, "gpt2": 1, "phi": 3}[family]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_learns_added_tokens_and_its_export_loads(tmp_path: Path) -> None:
    path = with_added_tokens(tmp_path / "model", "llama", tie_word_embeddings=False)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"<new-1> {text}"} for text in texts(24)])
    data = {"train": rows, "evaluation": rows, "text": "text", "max_length": 64, "num_workers": 1}
    with pytest.raises(
        ConfigurationError,
        match=r"data\.train: has the token '<new-1>' \(125\), and the embedding has 124 rows",
    ):
        TrainingInputs.prepare(
            new_run(tmp_path / "refused", plan_for(path, data)),
            plan_for(path, data, model__resize_embeddings=False),
        )
    runs = []
    for world_size in (1, 2):
        run = new_run(
            tmp_path / f"run-{world_size}", plan_for(path, data, world_size, 2, model__resize_embeddings=True)
        )
        finish(run, world_size)
        runs.append(run)
    one, two = (evaluations(run)[2]["loss"] for run in runs)
    assert one == pytest.approx(two, rel=1e-5)
    assert state(runs[0])["model.model.embed_tokens.weight"].shape[0] == 127
    export(runs[1], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 127
    assert torch.equal(loaded.lm_head.weight, state(runs[1])["model.lm_head.weight"])


@pytest.mark.slow
@pytest.mark.distributed
def test_an_adapter_beside_new_rows_is_merged_and_not_exported_alone(tmp_path: Path) -> None:
    path = with_added_tokens(tmp_path / "model", "llama", tie_word_embeddings=True)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"<new-1> {text}"} for text in texts(24)])
    data = {"train": rows, "text": "text", "max_length": 64, "num_workers": 1}
    run = new_run(
        tmp_path / "run",
        plan_for(path, data, 2, 2, model__resize_embeddings=True, model__adapter={"rank": 2}),
    )
    finish(run, 2)
    export(run, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight
    stored = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    assert torch.equal(merged[:NUM_TOKENS], stored)
    torch.testing.assert_close(merged[125], stored.mean(dim=0), rtol=1e-5, atol=1e-7)
    with pytest.raises(
        ConfigurationError, match=r"the run has 127 rows for tokens and its base 124: .* leave --adapter out"
    ):
        export(run, tmp_path / "alone", adapter=True)


def test_a_model_without_a_table_of_tokens_cannot_grow(tmp_path: Path) -> None:
    CanineConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigurationError, match="a canine model has no table of tokens that could grow; leave it out"
    ):
        pretrained.read_config(plan_of(tmp_path, model__resize_embeddings=True))


def test_rows_are_read_in_slices() -> None:
    """As safetensors' own are: one rank's rows, and one rank's columns."""
    table = torch.arange(12.0).reshape(4, 3)
    grown = _Grown(table, 7)
    expected = torch.cat([table, table.mean(dim=0).expand(3, 3)])
    assert grown.get_shape() == [7, 3]
    assert torch.equal(grown[...], expected)
    for start, stop in ((0, 2), (3, 6), (5, 7), (7, 7)):
        assert torch.equal(grown[start:stop], expected[start:stop])
        assert torch.equal(grown[start:stop, 1:], expected[start:stop, 1:])


def classifier(path: Path, labels: list[str], family: str = "llama") -> Path:
    """A classifier with these classes."""
    named_ = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }
    return model_directory(
        path, family, "AutoModelForSequenceClassification", num_labels=len(labels), **named_
    )


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize(
    "labels", [["a", "b", "c", "d", "e"], ["x", "z", "y"]], ids=["more", "as many in another order"]
)
def test_other_classes_get_a_new_head_on_any_number_of_ranks(
    labels: list[str], family: str, tmp_path: Path
) -> None:
    """A part of the head may have the size of a part of the stored one: what is read must not hang on that."""
    path = classifier(tmp_path, ["x", "y", "z"], family)
    stored = dict(
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).named_parameters()
    )
    task = {
        "task": "sequence-classification",
        "model__task": "sequence-classification",
        "attention": "sdpa",
        "data": DATA,
    }
    results = on_ranks(1, whole, plan_of(path, 1, **task), labels) + on_ranks(
        2, whole, plan_of(path, 2, **task), labels
    )
    head = {"llama": {"score.weight"}, "roberta": {"classifier.out_proj.weight", "classifier.out_proj.bias"}}[
        family
    ]
    assert head <= stored.keys()
    for name, value in stored.items():
        for result in results:
            assert torch.equal(result[name], results[0][name]), name
            assert name.endswith(".bias") or torch.equal(result[name], value) == (name not in head), name
        assert name not in head or results[0][name].shape[0] == len(labels)


@pytest.mark.distributed
def test_the_head_is_kept_where_its_classes_are(tmp_path: Path) -> None:
    path = classifier(tmp_path, ["NEUTRAL", "Entailment", "contra-diction"])
    stored = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).score.weight
    task = {
        "task": "sequence-classification",
        "model__task": "sequence-classification",
        "attention": "sdpa",
        "data": DATA,
    }
    [result] = on_ranks(1, whole, plan_of(path, 1, **task), ["neutral", "entailment", "contra diction"])
    assert torch.equal(result["score.weight"], stored)


def _one_run(directory: Path, model: Path, rows: list[dict[str, Any]], **data: Any) -> RunDirectory:
    source = write_rows(directory / "rows.jsonl", rows)
    described = {
        "train": source,
        "evaluation": source,
        "text": "text",
        "label": "label",
        "max_length": 64,
        "num_workers": 1,
    } | data
    task = {"task": "sequence-classification", "model__task": "sequence-classification", "attention": "sdpa"}
    run = new_run(
        directory / "run", plan_for(model, described, 1, 1, training={"learning_rate": 1e-8}, **task)
    )
    finish(run, 1)
    return run


def _predicted(path: Path, rows: list[str]) -> list[int]:
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    with torch.no_grad():
        return [
            int(model(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0].argmax()) for text in rows
        ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "spelt",
    [
        ["neutral", "entailment", "contradiction"],
        ["Neutral", "ENTAILMENT", "Contradiction"],
        [0, 1, 2],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
    ],
    ids=["the same", "another case", "numbers", "generic"],
)
def test_a_classifier_says_of_rows_what_it_says(spelt: list[Any], tmp_path: Path) -> None:
    """Each row has the class that the model gives it: before training all of them are right."""
    own = spelt if spelt[0] == "LABEL_0" else ["neutral", "entailment", "contradiction"]
    path = classifier(tmp_path / "model", own)
    lines = list(texts(40))
    run = _one_run(
        tmp_path,
        path,
        [
            {"text": text, "label": spelt[number]}
            for text, number in zip(lines, _predicted(path, lines), strict=True)
        ],
    )
    assert evaluations(run)[0]["accuracy"] == 1.0
    noted = [record["text"] for record in named(run, "noted")]
    assert noted == (["the labels are numbers, and are taken for the ids of the model's " "classes: 0 is 'neutral', 1 is " "'entailment', 2 is "
                      "'contradiction'"] if spelt[0] == 0 else [])  # fmt: skip
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(3)] == own
    assert config["pad_token_id"] == tokenizer().pad_token_id


@pytest.mark.distributed
def test_classes_that_the_model_does_not_have_are_said(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model", ["x", "y"])
    run = _one_run(
        tmp_path, path, [{"text": text, "label": "xyz"[number % 3]} for number, text in enumerate(texts(24))]
    )
    [noted] = named(run, "noted")
    assert noted["text"].startswith(
        "the model's 2 classes ('x', 'y') are not those of the rows: of 3 it does not have 'z'"
    )
    assert [record["new_parameters"] for record in named(run, "training")] == [["score.weight"]]


def test_nothing_of_the_loading_is_changed_where_nothing_must_be(tmp_path: Path) -> None:
    path = model_directory(tmp_path, "llama")
    plan = plan_of(path)
    config = pretrained.read_config(plan)
    assert (
        Changes.of(plan, pretrained.model_class(tasks.unprepared(plan).auto_class, config, plan), config)
        == Changes()
    )
