"""Adam with moments in bf16: computed in fp32 by PyTorch's own step, then rounded stochastically."""

from __future__ import annotations

from typing import Any

import torch

from launcher.job.schema import Training
from launcher.planner.limits import WIDENED_MOMENTS
from launcher.training.model.loading import local_part
from launcher.training.narrow_moments import AdamOfNarrowMoments, step_in_fp32


class AdamOfHalfMoments(AdamOfNarrowMoments):
    """PyTorch's Adam or AdamW over fp32 parameters, with half the bytes of state.

    In a step the second moment moves by a thousandth of its distance to the new square (beta2 0.999). A bf16
    number can only move by 1/256 of itself or more: rounded to nearest, it would never change. So each number is
    rounded up or down at random, with the right mean (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551).
    The random numbers depend on seed, step and tensor alone: a resumed run and each replica of a shard draw the
    same.
    """

    def __init__(self, groups: list[dict[str, Any]], training: Training) -> None:
        super().__init__(groups, training)
        self._seed, self._numbers = training.seed, dict[torch.Tensor, int]()

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Step one tensor piece by piece, so that the fp32 copies stay small."""
        if len(self._numbers) < len(self.state):
            self._numbers = {one: number for number, one in enumerate(self.state)}
        state, draws = self.state[parameter], torch.Generator(local_part(parameter).device)
        before = state["step"].clone()
        # int() waits for the device once per tensor. That costs little here: the backward pass is over, as its
        # gradient norm was already read.
        draws.manual_seed(hash((self._seed, int(before), self._numbers[parameter])) % (1 << 63))
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        pieces = (local_part(one).view(-1).split(WIDENED_MOMENTS) for one in tensors)  # type: ignore[arg-type]
        for weights, gradient, first, second in zip(*pieces, strict=True):
            wide = first.float(), second.float()
            step_in_fp32(weights, gradient, wide, before.clone(), group)
            noise = torch.empty_like(wide[0], dtype=torch.int32)
            for narrow, widened in zip((first, second), wide, strict=True):
                put_back(narrow, widened, noise.random_(0, 1 << 16, generator=draws))
        state["step"].add_(1)


def put_back(narrow: torch.Tensor, wide: torch.Tensor, noise: torch.Tensor) -> None:
    """Round `wide` (fp32) stochastically into `narrow` (bf16), changing both. `noise` is int32 in [0, 65536), of
    the same shape.

    bf16 is the upper half of fp32. The lower half, over 65536, is the probability of rounding away from zero.
    """
    bits = wide.view(torch.int32)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    narrow.copy_(wide)
