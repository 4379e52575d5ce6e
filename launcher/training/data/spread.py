"""The distribution of prepared samples: their lengths, their classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from launcher.training.data.dataset import Dataset

_BINS = 12
_ROUND = (1, 2, 5)
"""The allowed widths of a bin, times a power of ten."""
_MOST_LENGTHS = 1_000_000
"""The most samples to look at: of more, every n-th is taken, which keeps the shares."""
_MOST_CLASSES = 100
"""The most classes in an event, the most frequent first."""


def shape(dataset: Dataset) -> dict[str, Any]:
    """Return `lengths` and `balance` of a data set, small enough for an event; empty without samples."""
    lengths = dataset.sample_lengths
    if not len(lengths):
        return {}
    told = balance(dataset)
    if told and len(classes := told.get("classes", {})) > _MOST_CLASSES:
        most = sorted(classes.items(), key=lambda one: -one[1])[:_MOST_CLASSES]
        told = {"classes": dict(most), "others": len(classes) - _MOST_CLASSES}
    return {"lengths": spread(lengths[:: -(-len(lengths) // _MOST_LENGTHS)]), "balance": told}


def spread(values: np.ndarray) -> dict[str, Any]:
    """Return the minimum, median, mean and maximum of numbers, and a histogram of at most 12 bins of equal,
    round width.

    A bin is [low, high, count], from `low` up to but not including `high`; if all numbers are whole, so are
    its ends.
    """
    low, high = float(values.min()), float(values.max())
    whole = np.issubdtype(values.dtype, np.integer)
    least = max((high - low) / (_BINS - 1), 1.0 if whole else 1e-9)
    tens = 10.0 ** np.floor(np.log10(least))
    width = next(step * tens for step in (*_ROUND, 10) if step * tens >= least)
    first = np.floor(low / width)
    counts = np.bincount((np.floor(values / width) - first).astype(np.int64))
    ends = [float((first + number) * width) for number in range(len(counts) + 1)]
    edges = [round(end) for end in ends] if whole else ends
    bins = [[edges[number], edges[number + 1], int(count)] for number, count in enumerate(counts)]
    return {
        "shortest": low,
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "longest": high,
        "bins": bins,
    }


def balance(dataset: Dataset) -> dict[str, Any] | None:
    """Return the number of samples of each class, in the order of the classes; for a regression the spread of
    the numbers."""
    flat = dataset.column("label")
    if flat is None:
        return None
    names = dataset.report.labels
    if names is None:
        return {"numbers": spread(flat.astype(np.float64))}
    if np.issubdtype(flat.dtype, np.floating):  # several classes at once, each 0 or 1
        counts = flat.reshape(-1, len(names)).sum(axis=0)
    else:
        counts = np.bincount(flat, minlength=len(names))
    return {"classes": {name: int(count) for name, count in zip(names, counts.tolist(), strict=True)}}
