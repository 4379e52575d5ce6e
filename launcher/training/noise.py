"""NEFTune: noise on the embeddings of samples that are learned from (Jain et al. 2023, arXiv 2310.05914).

The noise of a sample hangs on the seed, the step and the sample alone: equal on any number of ranks, however
samples share a pass, and after a resume. It counts alpha / sqrt(length x width) times, by the sample's own
length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from launcher.tasks.sample import Sample


class EmbeddingNoise:
    """Adds noise to what a model's input embeddings give, in the training passes that it was told the samples
    of."""

    def __init__(self, model: PreTrainedModel, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._samples: Sequence[Sample] = ()
        self._step = 0
        embeddings: Any = model.get_input_embeddings()
        embeddings.register_forward_hook(self._add)

    def expect(self, step: int, items: Sequence[Sequence[Sample]]) -> None:
        """Take the samples of the micro-batch that comes next, in the order in which `collate` has them."""
        self._step, self._samples = step, [sample for item in items for sample in item]

    def _add(self, module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        """Return embeddings [1, positions, width] of samples end to end, or [samples, longest, width], with
        noise."""
        if not module.training:
            return output
        noise = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        joined = len(output) == 1
        begin = 0
        for row, sample in enumerate(self._samples):
            part = noise[0, begin : begin + sample.length] if joined else noise[row, : sample.length]
            begin += sample.length
            self._fill(part, sample)
        return output + noise.to(output.dtype)

    def _fill(self, part: torch.Tensor, sample: Sample) -> None:
        """Write a sample's noise, [length, width]."""
        place = f"{self._seed}/{self._step}/{sample.id}/{sample.window}"
        generator = torch.Generator(part.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big"))
        part.uniform_(-1.0, 1.0, generator=generator)
        part *= self._alpha / math.sqrt(part.numel())
