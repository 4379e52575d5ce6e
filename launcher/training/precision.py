"""The compute dtype of a run, and the loss scale of fp16 (Micikevicius et al. 2018, arXiv 1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from launcher.tasks.written_logits import TEACHER_LOGITS, TEACHER_STATES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The compute dtype for each value of the plan's `precision`."""
_AS_THEY_ARE = ("labels", "weights", TEACHER_LOGITS, TEACHER_STATES)
"""Floating-point entries of a batch that are no inputs of the model."""
_GROWTH_INTERVAL = 2000
_LARGEST, _SMALLEST = 2.0**24, 1.0


def as_computed(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch with the model's floating-point inputs (images, sounds) cast to its compute dtype. Labels,
    weights and what was written of a teacher are left as they are."""
    return {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and key.rpartition("/")[2] not in _AS_THEY_ARE
        else value
        for key, value in batch.items()
    }


@dataclass
class LossScale:
    """A loss scale that doubles after 2,000 good steps and halves on overflow; constant 1 if not `used`."""

    used: bool
    value: float = 2.0**16
    good_steps: int = 0

    def __post_init__(self) -> None:
        if not self.used:
            self.value = 1.0

    def good(self) -> None:
        """Record a step with finite gradients."""
        if not self.used:
            return
        self.good_steps += 1
        if self.good_steps == _GROWTH_INTERVAL:
            self.value, self.good_steps = min(_LARGEST, self.value * 2), 0

    def overflow(self) -> bool:
        """Record a step with gradients that were not finite. Return whether a smaller scale may help; otherwise
        the model itself diverges."""
        if not self.used or self.value <= _SMALLEST:
            return False
        self.value, self.good_steps = max(_SMALLEST, self.value / 2), 0
        return True
