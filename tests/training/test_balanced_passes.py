"""A pass with more samples than were planned for needs no more memory, as they are shorter; and the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.data.pass_sizes import MOST
from launcher.planner.model.model_support import COSTS_BY_TOKEN
from tests.families.tiny import (
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    VOCABULARY,
    model_of,
)
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    state,
    texts,
    write_rows,
)

TASKS = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MASKED_LM)
LONGEST = 24


def _saved_bytes(model: Any, num_samples: int, length: int) -> int:
    """What a forward pass keeps for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.full((num_samples, length), VOCABULARY - 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        held = sum(storages.values())
        del output
    return held


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", sorted(COSTS_BY_TOKEN))
def test_many_short_samples_keep_no_more_than_a_few_long_ones(kind: str, task: str) -> None:
    try:
        model = model_of(kind, task, "eager")
    except (KeyError, ValueError):
        pytest.skip(f"{kind} has no class for {task}")
    model.train()
    planned = _saved_bytes(model, 4, LONGEST)
    per_label = 4 * MOST * 64  # a head for each sample of a few numbers
    for length in (LONGEST // MOST, LONGEST // MOST // 2):
        assert _saved_bytes(model, 4 * MOST, length) <= planned + per_label


def _run(folder: Path, name: str, world_size: int, micro: int, balanced: bool, **changes: Any) -> Any:
    data = {
        "train": {"path": str(folder / "rows.jsonl")},
        "text": "text",
        "label": "label",
        "max_length": 48,
        "num_workers": 1,
    }
    batch = batch_of(world_size, micro, 24 // micro // world_size) | {"balanced": balanced}
    classifier = {"task": "sequence-classification", "model__task": "sequence-classification"}
    ways = {"attention": "sdpa", "layout": "padded"}
    plan = plan_for(folder / "bert", data, world_size, 4, batch=batch, **classifier, **ways, **changes)
    return new_run(folder / name, plan)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp", "zero-2"])
def test_balanced_passes_give_the_numbers_of_equal_ones_and_resume_to_the_bit(
    engine: str, tmp_path: Path
) -> None:
    names = {str(number): number for number in range(3)}
    classes = {"id2label": {number: name for name, number in names.items()}, "label2id": names}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = "AutoModelForSequenceClassification"
    model_directory(tmp_path / "bert", "bert", bert, num_labels=3, **classes, **still)
    rows = [{"text": text, "label": str(number % 3)} for number, text in enumerate(texts(96))]
    write_rows(tmp_path / "rows.jsonl", rows)
    other = deepspeed(2) if engine == "zero-2" else {}
    equal = _run(tmp_path, "equal", 1, 24, balanced=False, **other)
    finish(equal, 1)
    balanced, stopped = (_run(tmp_path, name, 2, 6, balanced=True, **other) for name in ("whole", "stopped"))
    finish(balanced, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(balanced)
    assert_equal(state(stopped), state(balanced))
    for step, wanted in curve(equal).items():
        record = curve(balanced)[step]
        assert record["sample_ids"] == wanted["sample_ids"]
        numbers = [[each[key] for key in ("loss", "grad_norm")] for each in (record, wanted)]
        torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(numbers[1]), rtol=1e-5, atol=0)
