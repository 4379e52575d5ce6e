"""The chunked loss equals the plain one, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from launcher.planner import limits
from launcher.training.loss import LogitTransform, chunked_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)],
)
def test_value_and_gradients_equal_the_plain_loss(transform: LogitTransform, biased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(401, 24, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(67, 24, generator=generator, requires_grad=True)
    bias = torch.randn(67, generator=generator, requires_grad=True) if biased else None
    targets = torch.randint(0, 67, (401,), generator=generator)
    targets[::3] = -100
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]

    ours = chunked_cross_entropy(hidden, weight, targets, bias=bias, transform=transform, count_correct=True)
    our_gradients = torch.autograd.grad(ours.loss_sum * 0.7, leaves)
    logits = functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    plain = functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    plain_gradients = torch.autograd.grad(plain * 0.7, leaves)

    torch.testing.assert_close(ours.loss_sum, plain, rtol=1e-6, atol=0)
    assert int(ours.num_correct) == int((logits.argmax(-1) == targets).sum())
    for ours_gradient, plain_gradient in zip(our_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours_gradient, plain_gradient, rtol=1e-4, atol=1e-5)


def test_nothing_supervised_is_zero_with_zero_gradients() -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(7, 8, requires_grad=True)
    output = chunked_cross_entropy(hidden, weight, torch.full((5,), -100))
    output.loss_sum.backward()
    assert float(output.loss_sum) == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("biased", [False, True])
def test_where_nobody_asks_for_gradients_none_are_computed(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation has the same loss, and multiplies nothing with the logits' gradients."""
    monkeypatch.setattr("launcher.training.loss._accumulate", lambda *_: pytest.fail("the weight's gradient"))
    hidden, weight = torch.randn(401, 24), torch.randn(67, 24, requires_grad=True)
    bias = torch.randn(67, requires_grad=True) if biased else None
    targets = torch.randint(0, 67, (401,))
    with torch.no_grad():
        ours = chunked_cross_entropy(hidden, weight, targets, bias=bias)
    plain = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="sum")
    torch.testing.assert_close(ours.loss_sum, plain.detach(), rtol=1e-6, atol=0)


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest tensor with a vocabulary dimension has a chunk's rows."""
    seen: list[int] = []
    original = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor,
        "logsumexp",
        lambda self, *a, **k: (seen.append(self.shape[0]), original(self, *a, **k))[1],
    )
    hidden = torch.randn(1000, 8, requires_grad=True)
    chunked_cross_entropy(hidden, torch.randn(50, 8), torch.zeros(1000, dtype=torch.long)).loss_sum.backward()
    assert len(seen) == 8 and max(seen) == 128


def test_bf16_is_close_to_fp32() -> None:
    hidden = torch.randn(64, 16)
    weight = torch.randn(40, 16)
    targets = torch.randint(0, 40, (64,))
    full = chunked_cross_entropy(hidden, weight, targets).loss_sum
    half = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).loss_sum
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)
