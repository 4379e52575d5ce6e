"""Mix-up and cut-mix: who is mixed with whom, by how much, and the loss of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from launcher.planner.plan import BatchPlan
from launcher.tasks.image_classification import ImageClassification
from launcher.tasks.image_columns import ImageAugmentation
from launcher.tasks.mixing import mix
from launcher.tasks.task import Draws
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.data.prepare import prepare
from launcher.training.model.pretrained import read_processor
from launcher.training.tracing.make_profile import example_batch
from tests.training.pictures import folder_of, model_of, plan_of
from tests.training.runs import batch_of

BOTH = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
DRAWS = Draws(3, 1, training=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 pictures: with steps of 12 the second one has 3 and filler."""
    return folder_of(tmp_path_factory.mktemp("pictures"), 5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared(vit: Path, pictures: Path, augmentation: dict[str, Any], **data: Any) -> Any:
    plan = plan_of(vit, pictures, columns={"augmentation": augmentation} | data)
    task, processor = ImageClassification(plan.data), read_processor(plan)
    return task, prepare(plan.data.train, "train", plan, task, processor)


def seen(
    task: ImageClassification, dataset: Dataset, ranks: int, micro: int, accumulation: int, step: int = 1
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and label of each sample of a step, by its id, over all ranks and passes."""
    batch, order = BatchPlan(**batch_of(ranks, micro, accumulation)), Order(17, dataset.num_items)
    results = {}
    for rank in range(ranks):
        share = Batches(dataset, order, batch, rank, dataset.num_items, task.mixes).step(step)
        for items in share.micro_batches:
            made = task.collate(items, DRAWS)
            for place, [sample] in enumerate(items):
                if sample.weight:
                    results[sample.id] = made["pixel_values"][place], made["labels"][place]
    return results


def test_neither_ranks_nor_micro_batches_change_a_mixture(vit: Path, pictures: Path) -> None:
    task, dataset = prepared(vit, pictures, BOTH | {"random_crop": 0.5, "random_erasing": 0.5})
    whole = {step: seen(task, dataset, 1, 12, 1, step) for step in (0, 1)}
    assert [len(one) for one in whole.values()] == [12, 3]
    for layout in ((2, 3, 2), (3, 4, 1), (1, 1, 12)):
        for step, expected in whole.items():
            for number, parts in seen(task, dataset, *layout, step).items():
                assert all(map(torch.equal, parts, expected[number])), (layout, step, number)
    mixed = [label for _, label in whole[0].values() if 0 < label.max() < 1]
    assert len(mixed) > 3 and all(torch.isclose(one.sum(), torch.tensor(1.0)) for one in mixed)


def test_a_partner_comes_before_in_the_order_and_is_as_altered_as_in_its_own_place(
    vit: Path, pictures: Path
) -> None:
    task, dataset = prepared(vit, pictures, {"mixup_alpha": 1.0, "horizontal_flip": 0.5, "random_crop": 0.5})
    plain, _ = prepared(vit, pictures, {"horizontal_flip": 0.5, "random_crop": 0.5})
    plain.labels = task.labels
    ids = dataset.sample_ids(Order(17, dataset.num_items).indices(0, 12)).tolist()
    alone, mixed = seen(plain, dataset, 1, 12, 1, 0), seen(task, dataset, 1, 12, 1, 0)
    for place, number in enumerate(ids):
        (own, label), (other, other_label) = alone[number], alone[ids[place - 1]]
        [draws] = np.random.default_rng((3, 1, number, 0)).spawn(1)
        draws.random(2)  # whether, and which way
        share = float(draws.beta(1.0, 1.0))
        torch.testing.assert_close(mixed[number][0], own * share + other * (1 - share))
        classes = torch.eye(3)
        torch.testing.assert_close(
            mixed[number][1], share * classes[label] + (1 - share) * classes[other_label]
        )


def test_cut_mix_takes_a_part_and_the_share_is_what_is_left() -> None:
    own, partner = np.zeros((3, 20, 30), np.float32), np.ones((3, 20, 30), np.float32)
    how = ImageAugmentation(cutmix_alpha=1.0)
    shares = []
    for number in range(300):
        image, share = mix(own, partner, how, np.random.default_rng(number))
        shares.append(share)
        assert np.isclose(share, 1 - image.mean()), number
        rows, columns = np.nonzero(image[0])
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) if len(rows) else share == 1
    assert not own.any() and min(shares) < 0.25 and max(shares) > 0.95
    # Beta(1, 1) has mean 1/2; what is cut off at the edges leaves more of the image's own.
    assert 0.5 < np.mean(shares) < 0.75


def test_the_chance_and_the_kinds_are_those_of_the_job() -> None:
    own, partner = np.zeros((3, 8, 8), np.float32), np.ones((3, 8, 8), np.float32)
    how = ImageAugmentation(**BOTH, mix_probability=0.5)
    results = [mix(own, partner, how, np.random.default_rng(number)) for number in range(1000)]
    added = sum(bool(((image > 0) & (image < 1)).any()) for image, _ in results)
    same = sum(share == 1 for _, share in results)
    assert 180 < added < 300 and 480 < same < 580


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weights": {"red": 3.0}}])
def test_the_loss_is_torchs_own_of_shares(options: dict[str, Any], vit: Path, pictures: Path) -> None:
    task, dataset = prepared(vit, pictures, BOTH, **options)
    task.learn_from(dataset.column)
    model = AutoModelForImageClassification.from_pretrained(vit, num_labels=3, ignore_mismatched_sizes=True)
    items = (
        Batches(dataset, Order(17, 15), BatchPlan(**batch_of(1, 12)), 0, 15, True).step(0).micro_batches[0]
    )
    batch = task.collate(items, DRAWS)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (12, 3)
    weight = torch.tensor([1.0, 1.0, 3.0]) if options else None
    own = torch.nn.functional.cross_entropy(
        model(batch["pixel_values"]).logits,
        batch["labels"],
        weight=weight,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="sum",
    )
    model.train()  # a ViT of no dropout
    output = task.loss(model, batch)
    torch.testing.assert_close(output.loss_sum, own)
    assert 0 <= output.num_correct <= 12
    gradients = [torch.autograd.grad(one, list(model.parameters())) for one in (output.loss_sum, own)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_mixed_but_what_is_learned_from(vit: Path, pictures: Path) -> None:
    task, dataset = prepared(vit, pictures, BOTH)
    plain, _ = prepared(vit, pictures, {"horizontal_flip": 0.5})
    items = (
        Batches(dataset, Order(17, 15), BatchPlan(**batch_of(1, 12)), 0, 15, True).step(0).micro_batches[0]
    )
    for draws in (None, Draws(3, 1)):
        batch, expected = task.collate(items, draws), plain.collate(items, draws)
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["labels"], expected["labels"]) and batch["labels"].dtype == torch.int64
    [[alone]] = (
        Batches(dataset, Order(17, 15), BatchPlan(**batch_of(1, 1)), 0, 15, True).step(0).micro_batches
    )
    assert alone[0].partner is None
    assert task.collate([alone], DRAWS)["labels"].max() == 1


def test_a_trace_computes_with_shares(vit: Path, pictures: Path) -> None:
    """So that the memory of their loss is planned."""
    task, _ = prepared(vit, pictures, BOTH)
    config = AutoModelForImageClassification.from_pretrained(
        vit, num_labels=3, ignore_mismatched_sizes=True
    ).config
    assert example_batch(task, config, [1, 1])["labels"].shape == (2, 3)
