"""A loop in plain PyTorch, whose losses a run's curve is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def plain_losses(
    parameters: Iterable[torch.nn.Parameter],
    num_steps: int,
    loss_of: Callable[[int], torch.Tensor],
    learning_rate: float = 1e-3,
) -> list[float]:
    """The losses of AdamW without decay, gradients clipped at 1. `loss_of` computes the loss of a step."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        loss = loss_of(step)
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses
