"""What a run computes in, and the loss scale of fp16 (Micikevicius et al. 2018, arXiv 1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from launcher.tasks.written_logits import TEACHER_LOGITS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What the computation runs in, by the plan's word."""
_AS_THEY_ARE = ("labels", "weights", TEACHER_LOGITS)
"""Numbers of a batch that are compared and counted, and that no model reads."""
_GROWTH_INTERVAL = 2000
_LARGEST, _SMALLEST = 2.0**24, 1.0


def as_computed(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch with the numbers that a model reads, as images and sounds, in what it computes in; labels,
    weights and a teacher's logits as they are."""
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
    """Doubles after 2,000 good steps, halves after an overflow; stays 1 where `used` is False."""

    used: bool
    value: float = 2.0**16
    good_steps: int = 0

    def __post_init__(self) -> None:
        if not self.used:
            self.value = 1.0

    def good(self) -> None:
        """Note a step whose gradients were finite."""
        if not self.used:
            return
        self.good_steps += 1
        if self.good_steps == _GROWTH_INTERVAL:
            self.value, self.good_steps = min(_LARGEST, self.value * 2), 0

    def overflow(self) -> bool:
        """Note a step whose gradients were not finite. True where a smaller scale may help, so that it is no
        fault of the model."""
        if not self.used or self.value <= _SMALLEST:
            return False
        self.value, self.good_steps = max(_SMALLEST, self.value / 2), 0
        return True
