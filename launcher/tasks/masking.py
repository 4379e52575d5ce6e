"""The choice of the tokens that a masked LM must predict, and their replacement."""

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
"""The shares of hidden tokens that are replaced by the mask and by a random token (Devlin et al. 2019, arXiv
1810.04805, section 3.1)."""


def units_of(
    ids: Sequence[int], special: Sequence[int], text: str, offsets: Sequence[tuple[int, int]] | None
) -> np.ndarray:
    """Return the unit of each token, int64 [tokens], counted from 0, and -1 for special tokens.

    With `offsets`, in characters, a unit is a word; without, each token is one.
    """
    begins = np.ones(len(ids), dtype=bool)
    if offsets is not None:
        of = word_of_each(offsets, words_of(text))
        begins[1:] = (of[1:] != of[:-1]) | (of[1:] < 0)
    return np.where(np.isin(ids, list(special)), -1, np.cumsum(begins) - 1)


def num_hidden(units: np.ndarray, probability: float) -> int:
    """Return how many tokens of a sample are supervised: fixed before the draw, because the loss is divided
    by it."""
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
    """Return the input tokens and the targets, int64 [tokens] each; a target is the hidden token, or -100.

    Whole units are hidden in random order until `number` tokens are. Further tokens of the last unit are
    hidden too, but not supervised. `others` are the tokens that may replace a hidden one.
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
