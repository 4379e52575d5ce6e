"""Rows that become several samples: overlapping windows of what is too long for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.rows import RowProblem
from launcher.planner.plan import BatchPlan
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.task import Draws, Encoded, Sample, sample_at
from launcher.training.data import encode
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.data.prepare import prepare
from launcher.training.devices import to_device
from tests.distributed.data_world import byte_tokenizer, jsonl, plan_of

TOKENIZER = byte_tokenizer()
TEXTS = [{"text": "the cat sat on the mat . " * (1 + number % 4)} for number in range(12)]
WIDTH, STEP = 8, 6


class Windowed(CausalLM):
    """Windows of 8 tokens, of which 2 are shared; a text that begins with "nothing" makes none."""

    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> list[Encoded | tuple[Encoded, ...] | RowProblem]:  # type: ignore[override]
        whole = super().encode(rows, processor)
        made: list[Encoded | tuple[Encoded, ...] | RowProblem] = []
        for row, one in zip(rows, whole, strict=True):
            made.append(
                ()
                if row["text"].startswith("nothing")
                else one
                if isinstance(one, RowProblem)
                else self.windows(one)
            )
        return made

    def windows(self, one: Encoded) -> tuple[Encoded, ...]:
        starts = range(0, max(1, one.length - WIDTH + STEP), STEP)
        cut = [{name: array[start : start + WIDTH] for name, array in one.arrays.items()} for start in starts]
        return tuple(Encoded(arrays, 1, len(arrays["input_ids"]), cut=one.cut) for arrays in cut)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(tmp_path: Path, rows: list[Any] = TEXTS, num_workers: int = 1, **settings: Any) -> Dataset:
    data = CausalColumns(train=jsonl(tmp_path / "a.jsonl", rows), text="text", **settings)
    plan = plan_of(data, num_workers=num_workers)
    task = Windowed(data)
    task.layout = plan.layout
    return prepare(data.train, "train", plan, task, TOKENIZER)


def numbers(dataset: Dataset) -> list[tuple[int, int]]:
    return [
        (sample.id, sample.window) for index in range(dataset.num_items) for sample in dataset.item(index)
    ]


def test_the_windows_of_a_row_share_its_number(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    found = numbers(dataset)
    assert [row for row, window in found if window == 0] == list(range(12))
    assert found == sorted(found) and len(found) == dataset.num_samples == dataset.num_items > 24
    for (row, window), (after, next_window) in zip(found, found[1:], strict=False):
        assert (after, next_window) in ((row, window + 1), (row + 1, 0))
    assert dataset.report.rows_used == dataset.report.rows_read == 12
    assert f"12 of 12 rows used, {dataset.num_items} windows" in dataset.report.summary()
    assert dataset.first_ids(3) == [0, 1, 2]
    found_again = dataset.find(3)
    assert found_again is not None and (found_again[1].id, found_again[1].window) == (3, 0)


def test_workers_and_a_second_reading_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path)
    again = made(tmp_path)
    assert again.report.cached and numbers(again) == numbers(first)
    monkeypatch.setattr(encode, "FEWEST_ROWS_FOR_WORKERS", 1)
    monkeypatch.setattr(encode, "CHUNK_ROWS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    shared = made(tmp_path, num_workers=2)
    assert not shared.report.cached and numbers(shared) == numbers(first)
    assert shared.report.samples_hash == first.report.samples_hash


def test_packs_hold_every_window_once(tmp_path: Path) -> None:
    assert sorted(numbers(made(tmp_path, packing=True, max_length=64))) == numbers(made(tmp_path))


def test_a_row_without_a_window_is_dropped_and_said(tmp_path: Path) -> None:
    dataset = made(tmp_path, [*TEXTS, {"text": "nothing at all"}])
    assert dataset.report.dropped == {"nothing left to learn": 1} and dataset.report.rows_used == 12
    assert (
        dataset.report.examples[-1]["detail"] == "the task makes no sample of it"
        and dataset.report.examples[-1]["line"] == 13
    )


def test_a_row_that_is_cut_counts_once(tmp_path: Path) -> None:
    dataset = made(tmp_path, max_length=20)
    assert 0 < dataset.report.num_cut == len({sample["line"] for sample in dataset.report.examples}) < 12


def test_ranks_share_windows_as_they_share_samples(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    order = Order(3, dataset.num_items, shuffle=True)
    seen: dict[int, list[tuple[int, int]]] = {}
    for size in (1, 2):
        batch = BatchPlan(
            global_batch_size=4, micro_batch_size=4 // size, accumulation_steps=1, data_parallel_size=size
        )
        items = [
            item
            for step in range(-(-dataset.num_items // 4))
            for rank in range(size)
            for item in Batches(dataset, order, batch, rank, dataset.num_items).step(step).micro_batches[0]
        ]
        seen[size] = sorted((sample.id, sample.window) for item in items for sample in item if sample.weight)
    assert seen[1] == seen[2] == numbers(dataset)


def test_each_window_draws_its_own_random_numbers() -> None:
    samples = [Sample({}, id, 1, window=window) for id in (0, 1) for window in (0, 1)]
    drawn = [Draws(17, 4).of(sample).integers(1 << 30) for sample in samples]
    assert len(set(drawn)) == 4
    assert [Draws(17, 4).of(sample).integers(1 << 30) for sample in reversed(samples)] == drawn[::-1]


def test_filler_and_shortened_samples_keep_their_window() -> None:
    sample = Sample({"input_ids": np.arange(9)}, 4, 9, window=2)
    assert (sample.as_filler().window, sample.as_filler().weight) == (2, 0)
    assert (sample_at(sample, np.array([0, 8])).window, sample_at(sample, np.array([0, 8])).id) == (2, 4)


def test_what_is_aside_stays_on_the_host() -> None:
    batch = {"input_ids": torch.zeros(2), "lengths": [1, 2], "aside": {"texts": ["a"]}}
    assert set(to_device(batch, "cpu")) == {"input_ids", "lengths"} and "aside" in batch
