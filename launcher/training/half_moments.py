"""Adam with moments in bf16: computed in fp32 by PyTorch's own step, and rounded by chance afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam

from launcher.job.schema import Training
from launcher.planner.limits import WIDENED_MOMENTS
from launcher.training.model.loading import local_part


class AdamOfHalfMoments(torch.optim.Adam):
    """PyTorch's Adam or AdamW over fp32 parameters, with a state of half as many bytes.

    The second moment moves by a thousandth of its distance in a step (beta2 0.999), and a number in bf16 by
    1/256 of itself at least: rounded to the nearest it would stand still. So each number is rounded up or down
    by chance, such that it is right in the mean (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551). What
    is drawn follows from the seed, the step and the tensor: a resumed run draws the same, and so does each copy
    of a shard.
    """

    def __init__(self, groups: list[dict[str, Any]], training: Training) -> None:
        super().__init__(
            groups,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            decoupled_weight_decay=training.optimizer == "adamw",
        )
        self._seed, self._numbers = training.seed, dict[torch.Tensor, int]()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that are there. All tensors have their state already."""
        if len(self._numbers) < len(self.state):
            self._numbers = {one: number for number, one in enumerate(self.state)}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Step one tensor, piece by piece: what is widened at a time is bounded."""
        state, draws = self.state[parameter], torch.Generator(local_part(parameter).device)
        before = state["step"].clone()
        # A look at the device for each tensor. It has come to the end of its backward pass by now: the norm
        # was read.
        draws.manual_seed(hash((self._seed, int(before), self._numbers[parameter])) % (1 << 63))
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        pieces = (local_part(one).view(-1).split(WIDENED_MOMENTS) for one in tensors)  # type: ignore[arg-type]
        for weights, gradient, first, second in zip(*pieces, strict=True):
            wide = first.float(), second.float()
            adam(
                [weights], [gradient], [wide[0]], [wide[1]], [], [before.clone()],
                fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )  # fmt: skip
            noise = torch.empty_like(wide[0], dtype=torch.int32)
            for narrow, widened in zip((first, second), wide, strict=True):
                put_back(narrow, widened, noise.random_(0, 1 << 16, generator=draws))
        state["step"].add_(1)


def put_back(narrow: torch.Tensor, wide: torch.Tensor, noise: torch.Tensor) -> None:
    """Round fp32 to bf16 by chance, in place of both: `noise` is from [0, 65536), int32, of the same shape.

    bf16 is the upper half of fp32. The lower half over 65536 is the chance of the next number away from zero.
    """
    bits = wide.view(torch.int32)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    narrow.copy_(wide)
