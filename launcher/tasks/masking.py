"""Which tokens of a sample are hidden from a masked LM, and what stands in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.lazy import Lazy
from launcher.tasks.task import IGNORE
from launcher.tasks.words import word_of_each, words_of

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_MASKED, _RANDOM = 0.8, 0.1
"""Of the hidden tokens, those replaced by the mask and by any other token (Devlin et al. 2019, arXiv
1810.04805, section 3.1)."""


def units_of(
    ids: Sequence[int], special: Sequence[int], text: str, offsets: Sequence[tuple[int, int]] | None
) -> np.ndarray:
    """Return which tokens are hidden together, int64 [tokens]: numbers in order, and -1 for special tokens.

    With the places of the tokens in the text, in characters, those of a word are; without, each is alone.
    """
    begins = np.ones(len(ids), dtype=bool)
    if offsets is not None:
        of = word_of_each(offsets, words_of(text))
        begins[1:] = (of[1:] != of[:-1]) | (of[1:] < 0)
    return np.where(np.isin(ids, list(special)), -1, np.cumsum(begins) - 1)


def num_hidden(units: np.ndarray, probability: float) -> int:
    """Return how many tokens of a sample are learned: known before the draw, as the loss is divided by it."""
    hideable = int((units >= 0).sum())
    return min(hideable, max(1, round(probability * hideable)))


def hide(
    ids: np.ndarray,
    units: np.ndarray,
    number: int,
    generator: np.random.Generator,
    mask: int,
    others: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens as the model sees them and the targets, int64 [tokens] each: a hidden token, or -100.

    Units are hidden as a whole, in the order that was drawn, until `number` tokens are. What the last unit
    has beyond that is hidden too, and not learned. `others` are the tokens that may stand in another's place.
    """
    seen, targets = ids.astype(np.int64), np.full(len(ids), IGNORE, dtype=np.int64)
    values, which = np.unique(units, return_inverse=True)
    order = generator.permutation(len(values))[which].astype(np.float64)
    order[units < 0] = np.inf
    chosen = np.argsort(order, kind="stable")[:number]
    targets[chosen] = seen[chosen]
    whole = np.flatnonzero(order <= order[chosen[-1]])
    draw = generator.random(len(whole))
    random = generator.choice(others, len(whole)) if len(others) else seen[whole]
    seen[whole] = np.where(draw < _MASKED, mask, np.where(draw < _MASKED + _RANDOM, random, seen[whole]))
    return seen, targets
