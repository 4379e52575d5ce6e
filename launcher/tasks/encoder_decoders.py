"""The common part of tasks in which a decoder generates text from an encoder's text or image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import IGNORE, AnswerOptions, Better, Output, Sample
from launcher.tasks.token_losses import likelihood
from launcher.tasks.writing import LOSSES, WritingTask

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class EncoderDecoderTask(WritingTask):
    """A task whose samples have `labels`, the tokens of a text, int32 [n], all supervised."""

    keeps_losses = True

    @property
    def metrics(self) -> Mapping[str, Better]:
        return {**LOSSES, **self.written_metrics}

    def chance_loss(self, config: Any) -> float | None:
        return math.log(config.get_text_config(decoder=True).vocab_size)

    @property
    def generates(self) -> bool:
        return self.for_prediction or self.evaluation.generate is not None

    @property
    def end_tokens(self) -> Sequence[int]:
        # A decoder made from a BERT ends with its separator. In others, that may separate parts of a text.
        end, separator = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
        if separator in (None, end):
            return super().end_tokens
        written_last = self.tokenizer("")["input_ids"][-1:] == [separator]
        return [separator] if end is None else [separator, end] if written_last else [end]

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the text generated for each sample; without generation, the log-probability of the target,
        the number of its tokens and its perplexity."""
        if output.generated is not None:
            return self.texts_of(output)
        assert output.losses is not None
        losses = output.losses.double().view(batch["targets"].shape).cpu()
        return [likelihood(*one) for one in zip(losses, batch["targets"].cpu(), strict=True)]


def written_texts(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return `labels` int64 [B, longest text], padded with -100; and `targets`: the same with -100 in all of
    a padding sample.

    The decoder still needs inputs for a padding sample.
    """
    lengths = np.array([len(sample["labels"]) for sample in samples])
    real = np.arange(lengths.max()) < lengths[:, None]
    labels = np.full(real.shape, IGNORE, dtype=np.int64)
    labels[real] = np.concatenate([sample["labels"] for sample in samples])
    counted = np.array([sample.weight for sample in samples])[:, None] > 0
    return {
        "labels": torch.from_numpy(labels),
        "targets": torch.from_numpy(np.where(counted, labels, IGNORE)),
    }
