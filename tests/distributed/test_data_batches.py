from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import tasks
from launcher.data.section import Source
from launcher.planner.plan import BatchPlan
from launcher.tasks.causal_lm import CausalColumns
from launcher.training.data.batches import Batches, StepBatch, deal
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.data.prepare import prepare
from tests.distributed.data_world import SHARED, batch_of, byte_tokenizer, jsonl, plan_of, word_tokenizer

# Every way to cut a global batch of 12 among ranks and accumulation steps.
LAYOUTS = [
    (m, a, r)
    for m in (1, 2, 3, 4, 6, 12)
    for a in (1, 2, 3, 4, 6, 12)
    for r in (1, 2, 3, 4, 6, 12)
    if m * a * r == 12
]


@pytest.fixture(scope="module", params=["packed", "plain", "classes"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    rows = [
        {"text": "the cat " * int(generator.integers(1, 12)) + str(n), "label": str(n % 3)}
        for n in range(100)
    ]
    source = jsonl(directory / "a.jsonl", rows)
    classes = request.param == "classes"
    task = "sequence-classification" if classes else "causal-lm"
    data = tasks.find(task).Columns.model_validate(
        {"train": source, "text": "text", "max_length": 64, "packing": request.param == "packed"}
        | ({"label": "label"} if classes else {})
    )
    tokenizer = word_tokenizer() if classes else byte_tokenizer()
    plan = plan_of(data, task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        return prepare(source, "train", plan, tasks.build(plan, tokenizer), tokenizer)


def on_all_ranks(
    dataset: Dataset, layout: tuple[int, int, int], step: int, num_items_total: int, balanced: bool = False
) -> list[StepBatch]:
    order, batch = Order(17, dataset.num_items), batch_of(*layout, balanced)
    return [Batches(dataset, order, batch, rank, num_items_total).step(step) for rank in range(layout[2])]


def real_ids(batches: list[StepBatch]) -> Counter[int]:
    return Counter(
        sample.id
        for batch in batches
        for micro in batch.micro_batches
        for item in micro
        for sample in item
        if sample.weight
    )


def supervised(batches: list[StepBatch]) -> int:
    samples = [
        sample for batch in batches for micro in batch.micro_batches for item in micro for sample in item
    ]
    return sum(s.weight * int((s["targets"] >= 0).sum()) if "targets" in s else s.weight for s in samples)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_has_the_same_global_batches(
    dataset: Dataset, layout: tuple[int, int, int], balanced: bool
) -> None:
    num_items_total = 2 * dataset.num_items + 5
    num_steps = -(-num_items_total // 12)
    order = Order(17, dataset.num_items)
    for step in range(num_steps):
        batches = on_all_ranks(dataset, layout, step, num_items_total, balanced)
        items = order.indices(step * 12, min(12, num_items_total - step * 12))
        expected = Counter(dataset.sample_ids(items).tolist())
        assert real_ids(batches) == expected
        [single] = on_all_ranks(dataset, (12, 1, 1), step, num_items_total)
        for batch in batches:
            sizes = [len(micro) for micro in batch.micro_batches]
            if balanced and not dataset.padding_free:
                assert len(sizes) == layout[1] and min(sizes) >= 1 and max(sizes) <= 2 * layout[0]
            else:
                assert sizes == [layout[0]] * layout[1]
            counts = (
                batch.num_items,
                batch.num_samples,
                batch.num_tokens,
                batch.num_supervised,
                batch.sample_ids,
            )
            assert counts == (
                single.num_items,
                single.num_samples,
                single.num_tokens,
                single.num_supervised,
                single.sample_ids,
            )
        assert batches[0].num_samples == expected.total()
        assert batches[0].num_items == len(items)
        assert batches[0].num_supervised == supervised(batches)
        assert batches[0].num_tokens == sum(dataset.length(int(item)) for item in items)


def test_an_epoch_has_every_sample_once_and_the_next_begins_where_it_ends(dataset: Dataset) -> None:
    total = 3 * dataset.num_items
    seen: list[int] = []
    for step in range(-(-total // 12)):
        seen += (
            Batches(dataset, Order(17, dataset.num_items), batch_of(12, 1, 1), 0, total)
            .indices(step)
            .tolist()
        )
    epochs = np.array(seen).reshape(3, dataset.num_items)
    assert all(sorted(epoch) == list(range(dataset.num_items)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_hash_tells_order_from_order(dataset: Dataset) -> None:
    batch = batch_of(4, 1, 1)
    hashes = [
        Batches(dataset, Order(seed, dataset.num_items, seed > 0), batch, 0, 4).step(0).sample_ids
        for seed in range(5)
    ]
    assert len(set(hashes)) == 5


def test_the_last_batch_is_filled_with_what_counts_for_nothing(dataset: Dataset) -> None:
    batches = on_all_ranks(dataset, (2, 2, 3), 1, 13)
    assert batches[0].num_items == 1
    fillers = [
        item for batch in batches for micro in batch.micro_batches for item in micro if not item[0].weight
    ]
    assert len(fillers) == 11
    assert not any(sample.weight for item in fillers for sample in item)
    assert supervised(batches) == batches[0].num_supervised


def test_steps_past_the_end_and_ranks_that_are_not_there(dataset: Dataset) -> None:
    order = Order(17, dataset.num_items)
    batches = Batches(dataset, order, batch_of(12, 1, 1), 0, 13)
    assert batches.num_steps == 2
    for step in (-1, 2):
        with pytest.raises(IndexError, match=r"not in 0\.\.1"):
            batches.step(step)
    with pytest.raises(ValueError, match="rank = 2: must be below data_parallel_size = 2"):
        Batches(dataset, order, batch_of(6, 1, 2), 2, 13)
    with pytest.raises(ValueError, match="the order has 3 items"):
        Batches(dataset, Order(17, 3), batch_of(12, 1, 1), 0, 13)


layouts = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))


@given(layout=layouts, seed=st.integers(0, 1000), padding_free=st.booleans(), balanced=st.booleans())
@settings(max_examples=150, deadline=None)
def test_dealing_gives_every_place_once(
    layout: tuple[int, int, int], seed: int, padding_free: bool, balanced: bool
) -> None:
    batch = batch_of(*layout, balanced)
    lengths = np.random.default_rng(seed).integers(1, 100, batch.global_batch_size)
    passes = deal(lengths, batch, padding_free)
    assert len(passes) == layout[1] * layout[2]
    assert padding_free or balanced or {len(places) for places in passes} == {layout[0]}
    assert np.array_equal(np.sort(np.concatenate(passes)), np.arange(batch.global_batch_size))


def duration(lengths: np.ndarray, passes: list[np.ndarray], padding_free: bool, ranks: int = 4) -> int:
    """Tokens computed by the slowest rank of each accumulation step, summed: what a step's time goes by."""
    costs = [
        int(lengths[places].sum() if padding_free else lengths[places].max() * len(places))
        for places in passes
    ]
    return sum(max(costs[begin : begin + ranks]) for begin in range(0, len(costs), ranks))


@pytest.mark.parametrize("seed", range(3))
def test_dealing_by_length_shortens_the_step(seed: int) -> None:
    batch = batch_of(4, 8, 4)
    lengths = np.random.default_rng(seed).lognormal(5, 0.7, batch.global_batch_size).astype(int) + 1
    as_they_come = np.split(np.arange(batch.global_batch_size), 32)
    assert duration(lengths, deal(lengths, batch, True), True) < 0.8 * duration(lengths, as_they_come, True)
    assert duration(lengths, deal(lengths, batch, True), True) < 1.06 * lengths.sum() / 4
    equal = duration(lengths, deal(lengths, batch, False), False)
    assert equal < 0.6 * duration(lengths, as_they_come, False)


@pytest.mark.parametrize("seed", range(3))
def test_a_balanced_batch_lets_ranks_wait_less(seed: int) -> None:
    """32 pairs of sentences on two ranks: where each takes 16, one has all the long ones."""
    lengths = np.random.default_rng(seed).normal(23, 8, 32).clip(8).astype(int)
    equal, balanced = (
        duration(lengths, deal(lengths, batch_of(16, 1, 2, balances), False), False, ranks=2)
        for balances in (False, True)
    )
    assert balanced < 0.85 * equal


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_gsm8k_packs_at_least_98_percent_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Source(path=str(SHARED / "gsm8k" / "train.jsonl"))
    data = CausalColumns(train=source, prompt="question", completion="answer", max_length=1024, packing=True)
    plan = plan_of(
        data,
        batch=BatchPlan(global_batch_size=1, micro_batch_size=1, accumulation_steps=1, data_parallel_size=1),
    )
    tokenizer = byte_tokenizer()
    dataset = prepare(source, "train", plan, tasks.build(plan, tokenizer), tokenizer)
    assert dataset.num_samples == 7473
    assert dataset.report.fill is not None
    assert dataset.report.fill > 0.98
