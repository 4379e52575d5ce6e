"""Adam whose moments are stored in fewer than four bytes each: stepped in fp32 by PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam

from launcher.job.schema import Training


class AdamOfNarrowMoments(torch.optim.Adam):
    """PyTorch's Adam or AdamW over fp32 parameters; a subclass says how moments become fp32 and narrow again."""

    def __init__(self, groups: list[dict[str, Any]], training: Training) -> None:
        super().__init__(
            groups,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            decoupled_weight_decay=training.optimizer == "adamw",
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step for all parameters with a gradient. Every tensor must have its state already."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Step one tensor and its count of steps."""
        raise NotImplementedError


def step_in_fp32(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    step: torch.Tensor,
    group: dict[str, Any],
) -> None:
    """Take PyTorch's fused step of contiguous fp32 tensors of one shape, in place. `step` (fp32 scalar) is the
    number of steps before it, and grows by 1."""
    adam(
        [weights], [gradient], [moments[0]], [moments[1]], [], [step],
        fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )  # fmt: skip
