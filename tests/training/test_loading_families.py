"""Cut over two ranks, every model that launcher trains has each parameter and buffer as transformers alone
loads it."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.planner.model.model_support import read_table
from launcher.training.engines.fsdp import FsdpEngine
from launcher.training.model import loading as models
from launcher.training.model import pretrained
from tests.families import tiny
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.distributed
CONVERTED = ["hrm_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid"]
"""Whose files have apart what the model has in one, or the other way round, along the axis of the cut."""
APART = {
    "albert": "refused: one layer, used again and again, cannot be cut layer by layer",
    "funnel": "refused: fully_shard cannot cut a block that is a plain list",
    "emu3": "saved with the config of its text part, which the Auto class does not take",
    "mllama": "as Emu3",
    "youtu": "transformers writes zeros over the row of the padding token that it has just read",
}
AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def differences(task: str, kinds: list[str], directory: Path) -> dict[str, list[str]]:
    """What of each type is not as transformers alone loads it, for those of which anything is not."""
    transformers.logging.set_verbosity_error()
    return {kind: found for kind in kinds if (found := _of_one(task, kind, directory / kind))}


def _of_one(task: str, kind: str, directory: Path) -> list[str]:
    if distributed.get_rank() == 0:
        tiny.model_of(kind, task).save_pretrained(directory)
    distributed.barrier()
    plain = AUTO[task].from_pretrained(directory, dtype=torch.float32)
    plan = plan_of(directory, distributed.get_world_size(), attention="eager", task=task, model__task=task)
    try:
        cutter = FsdpEngine.__new__(FsdpEngine)
        cutter._plan = plan
        loaded = models.load(plan, AUTO[task], pretrained.read_config(plan), cutter._shard)
    except Exception:
        return [traceback.format_exc()]
    wanted = dict(plain.named_parameters(remove_duplicate=False)) | dict(
        plain.named_buffers(remove_duplicate=False)
    )
    own = dict(loaded.model.named_parameters(remove_duplicate=False)) | dict(
        loaded.model.named_buffers(remove_duplicate=False)
    )
    found = [f"{name} is there once only" for name in sorted(wanted.keys() ^ own.keys())]
    for name in sorted(wanted.keys() & own.keys()):
        ours = own[name].full_tensor() if isinstance(own[name], DTensor) else own[name]
        theirs = wanted[name]
        if ours.shape != theirs.shape or not torch.equal(ours.to(theirs.dtype), theirs):
            found.append(f"{name}: {ours.flatten()[:3].tolist()} and not {theirs.flatten()[:3].tolist()}")
    return found


def test_what_is_joined_or_divided_while_it_is_read(tmp_path: Path) -> None:
    assert on_ranks(2, differences, "causal-lm", CONVERTED, tmp_path) == [{}, {}]


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.parametrize("task", AUTO)
def test_every_parameter_and_buffer_is_as_transformers_loads_it(task: str, tmp_path: Path) -> None:
    kinds = [kind for kind, entry in read_table()[task].items() if "ways" in entry and kind not in APART]
    assert on_ranks(2, differences, task, kinds, tmp_path) == [{}, {}]
