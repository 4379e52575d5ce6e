"""Scores of predicted tokens: loss, perplexity and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import IGNORE, Evaluator, Output

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


class TokenLosses(Evaluator):
    """`loss` and `perplexity` per supervised token, and `accuracy`, the share predicted correctly.

    The router loss of a mixture of experts is part of `loss`, as in transformers, but not of `perplexity`.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(4)

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        router = 0.0 if output.router_loss_sum is None else float(output.router_loss_sum)
        num_supervised = int((batch["targets"] != IGNORE).sum())
        self._sums += [float(output.loss_sum), float(output.num_correct), num_supervised, router]

    def state(self) -> list[np.ndarray]:
        return [self._sums]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum, num_correct, num_supervised, router_loss_sum = np.sum(
            [sums for sums, *_ in states], axis=0
        ).tolist()
        num_tokens = max(num_supervised, 1)
        entropy = (loss_sum - router_loss_sum) / num_tokens
        perplexity = math.exp(entropy) if entropy < 700 else math.inf
        return {"loss": loss_sum / num_tokens, "perplexity": perplexity, "accuracy": num_correct / num_tokens}


def likelihood(losses: Any, targets: Any) -> dict[str, Any]:
    """Return the `log_probability` of a sample's targets, the number of its `tokens`, and its `perplexity`.

    `losses` float and `targets` int, of one shape: arrays or tensors; a loss is 0 at unsupervised positions.
    """
    total, tokens = float(losses.sum()), int((targets != IGNORE).sum())
    perplexity = math.exp(min(total / max(tokens, 1), 700.0))
    return {"log_probability": -total, "tokens": tokens, "perplexity": perplexity}
