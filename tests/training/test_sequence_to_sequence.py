"""The loss of pairs is the model's own, smoothed as transformers smooths it, for every family of encoder-decoders."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.trainer_pt_utils import LabelSmoother

from launcher import tasks
from launcher.data.section import Source
from launcher.planner.plan import Plan
from launcher.tasks.sequence_to_sequence import PairColumns, SequenceToSequence
from launcher.tasks.task import AnswerOptions, Sample
from launcher.training.engines import build
from tests.training import pairs
from tests.training.pairs import FAMILIES, model_of
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks
from tests.training.wholes import whole

LENGTHS = ((9, 4), (3, 7), (5, 1), (2, 2))


def task_of(**keys: Any) -> SequenceToSequence:
    task = tasks.find("sequence-to-sequence")(
        PairColumns(**{"train": Source(path="rows.jsonl"), "source": "source", "target": "target", **keys})
    )
    assert isinstance(task, SequenceToSequence)
    return task


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    made = [
        {
            name: generator.integers(3, 120, n, dtype=np.int32)
            for name, n in zip(("input_ids", "labels"), both, strict=True)
        }
        for both in LENGTHS
    ]
    for one in made:
        one["labels"][-1] = 2
    return [Sample(one, number, sum(map(len, one.values()))) for number, one in enumerate(made)]


def both(family: str, smoothing: float) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Our model and transformers' with equal weights, after a loss and a backward pass each."""
    ours, own = model_of(family).train(), model_of(family).train()
    for module in [*ours.modules(), *own.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    batch = task_of(label_smoothing=smoothing).collate([[sample] for sample in samples()])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    output = own(**plain)
    expected = LabelSmoother(smoothing)(output, batch["labels"]) if smoothing else output.loss
    expected = expected * (batch["labels"] != -100).sum()
    found = task_of(label_smoothing=smoothing).loss(ours, batch).loss_sum
    expected.backward()
    found.backward()
    return ours, own, found, expected


@pytest.mark.parametrize("family", [*FAMILIES, "encoder-decoder"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradients_are_those_of_transformers(family: str, smoothing: float) -> None:
    ours, own, found, expected = both(family, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            gradients[name],
            rtol=1e-3,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_an_evaluation_does_not_smooth_and_counts_what_is_right() -> None:
    model, batch = model_of("t5").eval(), task_of().collate([[sample] for sample in samples()])
    with torch.no_grad():
        smoothed, plain = (task_of(label_smoothing=value).loss(model, batch) for value in (0.5, 0.0))
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    assert float(smoothed.loss_sum) == float(plain.loss_sum)
    with_gradient = task_of(label_smoothing=0.5).loss(model, batch).loss_sum
    torch.testing.assert_close(with_gradient, plain.loss_sum, msg="Fisher information is of the plain loss")
    assert int(plain.num_correct) == int((logits.argmax(-1) == batch["labels"]).sum())


@pytest.mark.parametrize("family", ["t5", "mbart"])
def test_filler_is_not_learned(family: str) -> None:
    model, (first, *others) = model_of(family).eval(), samples()
    batch = task_of().collate([[first], *([one.as_filler()] for one in others)])
    alone = task_of().collate([[first]])
    with torch.no_grad():
        torch.testing.assert_close(
            task_of().loss(model, batch).loss_sum, task_of().loss(model, alone).loss_sum
        )


def test_the_head_computes_as_before_behind_a_loss() -> None:
    model, batch = model_of("bart").eval(), task_of().collate([[sample] for sample in samples()])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        before = model(**plain).logits
        task_of().loss(model, batch)
        assert torch.equal(model(**plain).logits, before)
        with contextlib.suppress(ValueError):
            task_of().loss(model, {"labels": batch["labels"], "targets": batch["targets"]})
        assert torch.equal(model(**plain).logits, before), "after an error too"


def positions(plan: Plan) -> list[torch.Tensor]:
    """What a sharded model has for positions, whole."""
    config = AutoConfig.from_pretrained(plan.model.name, attn_implementation="sdpa")
    engine = build(plan, task_of(), config, {})
    named = engine.model.state_dict(keep_vars=True)
    return [whole(value) for name, value in named.items() if "embed_positions" in name]


@pytest.mark.distributed
def test_positions_that_no_file_holds_are_made_in_parts(tmp_path: Path) -> None:
    model = pairs.model_of("marian")
    model.save_pretrained(tmp_path)
    own = [value for name, value in model.state_dict().items() if "embed_positions" in name]
    for found in on_ranks(2, positions, plan_of(tmp_path, 2)):
        assert len(found) == len(own) == 2
        assert all(torch.equal(one, other) for one, other in zip(found, own, strict=True))


def test_a_model_that_does_not_write_is_asked_how_likely_targets_are() -> None:
    model, made = model_of("t5").eval(), samples()
    batch = task_of().collate([[sample] for sample in made])
    with torch.no_grad():
        output = task_of().loss(model, batch)
        told = task_of().answers(output, batch, made, AnswerOptions())
        alone = [task_of().loss(model, task_of().collate([[sample]])) for sample in made]
    for one, own, sample in zip(told, alone, made, strict=True):
        assert one["log_probability"] == pytest.approx(-float(own.loss_sum), rel=1e-4)
        assert one["tokens"] == len(sample["labels"])
