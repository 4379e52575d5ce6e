"""What the speed benchmarks compute: the trainer's own causal head on random tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from launcher.training import heads


def _ids(length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (length,))


class Causal:
    """Samples one after another in one row."""

    auto_class = AutoModelForCausalLM
    companions: ClassVar[dict[str, Any]] = {}
    loss = staticmethod(heads.causal_lm)

    @staticmethod
    def batch(request: Any, config: Any) -> dict[str, Any]:
        lengths = torch.tensor(request.lengths)
        ids = [_ids(length, config.vocab_size) for length in request.lengths]
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(length) for length in request.lengths])[None],
            "targets": torch.cat([torch.cat([sample[1:], torch.tensor([-100])]) for sample in ids]),
            "cu_seq_lens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
            "max_length": max(request.lengths),
        }
