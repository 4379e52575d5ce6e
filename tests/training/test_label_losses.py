"""Losses of classes held to torch's own, to the published definition of focal loss, and to scikit-learn's weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from launcher.tasks.label_losses import LabelLoss, balanced

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
WEIGHTS = [0.5, 2.0, 1.25]


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [9, 3], a class of each, and several classes of each."""
    torch.manual_seed(seed)
    return torch.randn(9, 3) * 3, torch.randint(0, 3, (9,)), torch.randint(0, 2, (9, 3)).float()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(weights: list[float] | None, smoothing: float) -> None:
    logits, labels, _ = drawn()
    tensor = None if weights is None else torch.tensor(weights)
    expected = functional.cross_entropy(
        logits, labels, weight=tensor, label_smoothing=smoothing, reduction="sum"
    )
    torch.testing.assert_close(
        LabelLoss("single-label", weights, smoothing).of(logits, labels).sum(), expected, **CLOSE
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_several_classes_are_torchs_binary_cross_entropy(weights: list[float] | None) -> None:
    logits, _, labels = drawn()
    tensor = None if weights is None else torch.tensor(weights)
    for smoothing in (0.0, 0.1):
        targets = torch.where(labels > 0, 1 - smoothing / 2, smoothing / 2)
        expected = functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=tensor, reduction="none"
        ).mean(dim=1)
        torch.testing.assert_close(
            LabelLoss("multi-label", weights, smoothing).of(logits, labels), expected, **CLOSE
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_is_the_published_one(gamma: float) -> None:
    """-alpha_t (1 - p_t)^gamma log p_t, in float64."""
    logits, labels, several = drawn()
    right = logits.double().softmax(dim=1)[torch.arange(9), labels]
    expected = -torch.tensor(WEIGHTS).double()[labels] * (1 - right) ** gamma * right.log()
    torch.testing.assert_close(
        LabelLoss("single-label", WEIGHTS, gamma=gamma).of(logits, labels).double(),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )
    yes = logits.double().sigmoid()
    right = torch.where(several > 0, yes, 1 - yes)
    alpha = torch.where(several > 0, torch.tensor(WEIGHTS).double(), 1.0)
    expected = (-alpha * (1 - right) ** gamma * right.log()).mean(dim=1)
    torch.testing.assert_close(
        LabelLoss("multi-label", WEIGHTS, gamma=gamma).of(logits, several).double(),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("problem", ["single-label", "multi-label"])
def test_focal_loss_has_a_gradient_where_the_model_is_sure(problem: str) -> None:
    logits = torch.tensor([[90.0, -90.0], [-90.0, 90.0]], requires_grad=True)
    labels = torch.tensor([0, 0]) if problem == "single-label" else torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    LabelLoss(problem, gamma=0.5).of(logits, labels).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[1].abs().sum() > 0


def test_without_options_it_is_transformers_own() -> None:
    logits, labels, several = drawn()
    for problem, wanted in (
        ("single-label", labels),
        ("multi-label", several),
        ("regression", labels.float()),
    ):
        plain = LabelLoss(problem, WEIGHTS, 0.1).plain()
        assert plain == LabelLoss(problem)
        given = logits[:, :1] if problem == "regression" else logits
        losses = {
            "single-label": functional.cross_entropy,
            "multi-label": functional.binary_cross_entropy_with_logits,
        }
        own = losses.get(problem, functional.mse_loss)
        torch.testing.assert_close(plain.of(given, wanted).mean(), own(given.squeeze(-1), wanted), **CLOSE)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 0, 0])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced(labels, 3) == pytest.approx(expected.tolist())
    assert balanced(labels, 4) == pytest.approx([*expected.tolist(), 1.0])  # a head with a class more
    several = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=np.float32)
    assert balanced(several, 3) == pytest.approx([1 / 3, 3.0, 1.0])
