"""Noise on embeddings: its size is transformers' own, and it hangs on seed, step and sample alone."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from launcher.tasks.sample import Sample
from launcher.training.noise import EmbeddingNoise
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
    state,
)
from tests.training.test_distillation import batches
from tests.training.test_resume import compare
from tests.training.tiny import model_of

NUM_STEPS = 4
ALPHA = 5.0


def noise_of(batch: dict[str, Any], items: Any, step: int, seed: int = 3) -> torch.Tensor:
    """What is added to the embeddings of a batch."""
    model = model_of("llama").train()
    embeddings = model.get_input_embeddings()
    plain = embeddings(batch["input_ids"]).detach()
    noise = EmbeddingNoise(model, ALPHA, seed)
    noise.expect(step, items)
    return (embeddings(batch["input_ids"]) - plain).detach()


def test_a_sample_has_its_own_noise_in_any_company() -> None:
    lengths = (40, 9, 64)
    ids = [torch.arange(3, 3 + length) for length in lengths]
    samples = [Sample({"input_ids": one.numpy()}, id=7 + i, length=len(one)) for i, one in enumerate(ids)]
    items = [[sample] for sample in samples]
    joined = noise_of(batch_of_samples(ids), items, 2)[0].split(lengths)
    padded = noise_of(batch_of_samples(ids, "padded"), items, 2)
    for index, length in enumerate(lengths):
        torch.testing.assert_close(joined[index], padded[index, :length], rtol=0, atol=1e-6)
        assert not padded[index, length:].any(), "padding has none"
        [alone] = noise_of(batch_of_samples([ids[index]]), [items[index]], 2)
        torch.testing.assert_close(alone, joined[index], rtol=0, atol=1e-6)
        bound = ALPHA / math.sqrt(length * 48)
        assert 0.9 * bound < float(alone.abs().max()) <= bound + 1e-6
        assert float(alone.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    other_step, other_seed = (noise_of(batch_of_samples(ids), items, *one)[0] for one in ((3,), (2, 4)))
    for other in (other_step, other_seed):
        assert (other - torch.cat(joined)).abs().max() > 0.05


def test_its_size_is_that_of_transformers() -> None:
    table = torch.nn.Embedding(131, 48).train()
    table.neftune_noise_alpha = ALPHA
    ids = torch.arange(3, 43)[None]
    theirs = neftune_post_forward_hook(table, None, table(ids)) - torch.nn.Embedding.forward(table, ids)
    bound = ALPHA / math.sqrt(40 * 48)
    assert 0.99 * bound < float((theirs - 0).abs().max().detach()) <= bound + 1e-6


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_has_the_numbers_of_a_plain_loop_on_any_ranks_and_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = model_directory(tmp_path / "model", num_hidden_layers=2)
    make = functools.partial(
        plan_for,
        model,
        causal_data(tmp_path / "data"),
        num_steps=NUM_STEPS,
        training={"neftune_noise_alpha": ALPHA},
    )
    own = make(world_size=2, batch=batch_of(2, 2))
    whole, stopped = (new_run(tmp_path / name, own) for name in ("whole", "stopped"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    moved = new_run(tmp_path / "moved", make(world_size=1, batch=batch_of(1, 1, 4)))
    finish(moved, 1)
    compare(moved, whole, 1e-5)
    losses = losses_with_noise(whole, own, model)
    torch.testing.assert_close([one["loss"] for one in curve(whole).values()], losses, rtol=2e-5, atol=0)
    quiet = new_run(tmp_path / "quiet", make(world_size=1, batch=batch_of(1, 4), training={}))
    finish(quiet, 1, stop_at=1)
    assert evaluations(quiet)[0]["loss"] == pytest.approx(evaluations(whole)[0]["loss"], rel=1e-6)
    assert curve(quiet)[1]["loss"] != pytest.approx(curve(whole)[1]["loss"], rel=1e-3)


def losses_with_noise(run: Any, own: Any, directory: Path) -> list[float]:
    """A loop in plain PyTorch over single samples, which gives the model their embeddings with noise."""
    _, steps = batches(run, own)
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    noise = EmbeddingNoise(model_of("llama"), ALPHA, own.training.seed)

    def loss_of(step: int) -> torch.Tensor:
        total, batch = torch.zeros(()), steps.step(step)
        for sample in (sample for items in batch.micro_batches for item in items for sample in item):
            ids = torch.tensor(sample["input_ids"], dtype=torch.int64)[None]
            noise.expect(step, [[sample]])
            embeddings = model.get_input_embeddings()(ids)
            added = torch.zeros(embeddings.shape)
            noise._fill(added[0], sample)
            logits = model(inputs_embeds=embeddings + added).logits[0, :-1]
            total = total + functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        return total / batch.num_supervised

    return plain_losses(model.parameters(), NUM_STEPS, loss_of)


@pytest.mark.distributed
@pytest.mark.very_slow
def test_zero_adds_the_same_noise(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    model = model_directory(tmp_path / "model", num_hidden_layers=2)
    data, training = causal_data(tmp_path / "data"), {"neftune_noise_alpha": ALPHA}
    runs = []
    for name, engine in (("fsdp", {}), ("zero3", deepspeed(3))):
        own = plan_for(model, data, 2, NUM_STEPS, training=training, batch=batch_of(2, 2), **engine)
        runs.append(new_run(tmp_path / name, own))
        finish(runs[-1], 2)
    compare(runs[1], runs[0], 1e-5)
