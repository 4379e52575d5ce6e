"""NEFTune: noise on the embeddings of training samples (Jain et al. 2023, arXiv 2310.05914).

A sample's noise depends only on the seed, the step and the sample. So it is the same for any number of ranks,
any batching, and after a resume. It is scaled by alpha / sqrt(length x width) with the sample's own length.
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
    """Noise on the output of a model's input embeddings, in training passes whose samples were announced."""

    def __init__(self, model: PreTrainedModel, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._samples: Sequence[Sample] = ()
        self._step = 0
        embeddings: Any = model.get_input_embeddings()
        embeddings.register_forward_hook(self._add)

    def expect(self, step: int, items: Sequence[Sequence[Sample]]) -> None:
        """Announce the samples of the next micro-batch, in the order of `collate`."""
        self._step, self._samples = step, [sample for item in items for sample in item]

    def _add(self, module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        """Return embeddings with noise: [1, positions, width] if packed, or [samples, longest, width]."""
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
        """Fill `part` with a sample's noise, [length, width]."""
        place = f"{self._seed}/{self._step}/{sample.id}/{sample.window}"
        generator = torch.Generator(part.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big"))
        part.uniform_(-1.0, 1.0, generator=generator)
        part *= self._alpha / math.sqrt(part.numel())
