"""Mix-up and cut-mix: an image is mixed with another one of its step, and their labels likewise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.lazy import Lazy
from launcher.tasks.image_columns import ImageAugmentation, ImageColumns
from launcher.tasks.task import Finding, finding

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


def mixes(data: ImageColumns) -> bool:
    """Return whether a job mixes its images."""
    how = data.augmentation
    return how is not None and (how.mixup_alpha is not None or how.cutmix_alpha is not None)


def mixing_contradictions(data: ImageColumns) -> Iterator[Finding]:
    """Yield keys that contradict mixing, or that set its options without mixing."""
    how = data.augmentation
    if how is not None and how.mix_probability is not None and not mixes(data):
        reason = "says how likely an image is mixed, and no way is named; add mixup_alpha or cutmix_alpha"
        yield finding("data.augmentation.mix_probability", how.mix_probability, reason)
    if how is None or not mixes(data):
        return
    name = "mixup_alpha" if how.mixup_alpha is not None else "cutmix_alpha"
    key, value = f"data.augmentation.{name}", getattr(how, name)
    if data.problem == "regression":
        reason = "mixes classes, and a regression has none; leave it out"
        yield finding(key, value, reason, "data.problem")
    if data.focal_gamma is not None:
        reason = "gives an image two classes, and the focal loss goes by the one right class; leave one out"
        yield finding(key, value, reason, "data.focal_gamma")


def mix(
    pixels: np.ndarray, partner: np.ndarray, how: ImageAugmentation, draws: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return an image randomly mixed with its partner, float32 [3, height, width] each, and the share of its
    own label.

    Mix-up (Zhang et al. 2018, arXiv 1710.09412) adds the two with that share, drawn from Beta(alpha, alpha).
    Cut-mix (Yun et al. 2019, arXiv 1905.04899) replaces a part of the image by the partner's; the share is
    the remaining area. If a job names both, they are equally likely.
    """
    stays, by_mixup = draws.random(2)
    if stays >= (1.0 if how.mix_probability is None else how.mix_probability):
        return pixels, 1.0
    adds = how.mixup_alpha is not None and (how.cutmix_alpha is None or by_mixup < 0.5)
    alpha = how.mixup_alpha if adds else how.cutmix_alpha
    assert alpha is not None
    drawn = float(draws.beta(alpha, alpha))
    if adds:
        share = float(np.float32(drawn))
        return pixels * np.float32(share) + partner * np.float32(1 - share), share
    height, width = pixels.shape[1:]
    upper, lower, left, right = _box(height, width, drawn, draws)
    pixels = pixels.copy()
    pixels[:, upper:lower, left:right] = partner[:, upper:lower, left:right]
    return pixels, 1 - (lower - upper) * (right - left) / (height * width)


def _box(height: int, width: int, share: float, draws: np.random.Generator) -> tuple[int, int, int, int]:
    """Return the upper, lower, left and right edge, in pixels, of a part of an image with a random middle.

    It covers all but `share` of the image, less what the image's edges cut off.
    """
    half = 0.5 * math.sqrt(1 - share)
    edges = []
    for size in (height, width):
        middle, reach = int(draws.integers(size)), int(half * size)
        edges += [max(middle - reach, 0), min(middle + reach, size)]
    return edges[0], edges[1], edges[2], edges[3]
