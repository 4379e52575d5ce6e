"""The loss of each sample of a training batch, by which that of each source is known: as of each sample alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from launcher.tasks.task import KEEPS_LOSSES, Sample
from launcher.training.by_source import losses_of_samples
from launcher.training.model import attention
from launcher.training.tracing.make_profile import prepared_task
from tests.training.plans import plan_of
from tests.training.test_no_waits import LENGTHS, SMALL, TASKS

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = TASKS | {
    "sequence-to-sequence": (
        "bart",
        {"source": "source", "target": "target", "max_target_length": 16},
        {"layout": "padded"},
    ),
    "causal-lm, forward": ("llama", {"text": "text"}, {"head": "forward"}),
    "causal-lm, padded": ("llama", {"text": "text"}, {"layout": "padded"}),
    "masked-lm": ("bert", {"text": "text"}, {"layout": "padded"}),
    "question-answering": ("bert", {"question": "q", "context": "c", "answers": "a"}, {"layout": "padded"}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_samples_loss_is_its_own(kind: str, tmp_path: Path) -> None:
    family, columns, changes = KINDS[kind]
    name = kind.partition(",")[0]
    data = {"train": {"path": "t"}, "max_length": 32, **columns}
    plan = plan_of(tmp_path, task=name, model__task=name, data=data, **changes)
    joined = changes.get("layout") != "padded"
    implementation = attention.register("packed" if joined else "sdpa")
    config = AutoConfig.for_model(family, **SMALL, attn_implementation=implementation)
    task = prepared_task(plan, config)
    torch.manual_seed(0)
    # Without dropout, but with gradients: as a training pass.
    model = task.auto_class.from_config(config, attn_implementation=implementation).float().eval()
    generator = np.random.default_rng(0)
    samples = [task.example(length) for length in LENGTHS]
    for number, sample in enumerate(samples):
        sample.id = number
        sample["input_ids"] = generator.integers(3, 99, len(sample["input_ids"])).astype(np.int32)
    samples.append(Sample(samples[0], 3, samples[0].length, weight=0))
    batch = task.collate([[sample] for sample in samples])
    batch |= {"told": 0} if "told" in batch else {}
    plain = task.loss(model, batch)
    output = task.loss(model, batch | {KEEPS_LOSSES: True})
    torch.testing.assert_close(output.loss_sum, plain.loss_sum)
    losses = losses_of_samples(output, batch, samples)
    assert losses[-1] == 0, "filler does not count"
    for sample, loss in zip(samples[:-1], losses.tolist(), strict=False):
        alone = task.collate([[sample]])
        alone |= {"told": 0} if "told" in alone else {}
        assert loss == pytest.approx(task.loss(model, alone).loss_sum.item(), rel=1e-4)
    (weight,) = [one for one in model.parameters() if one.requires_grad][:1]
    gradients = [torch.autograd.grad(one.loss_sum, weight)[0] for one in (plain, output)]
    torch.testing.assert_close(gradients[0], gradients[1])
