"""Random augmentation of images by kornia, with each image's own draws: no other image affects it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.image_columns import Augmentation
from launcher.tasks.task import Finding, finding

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

BY_KORNIA = ("color_jitter", "rand_augment", "random_erasing")
"""The augmentations that need the package."""
_GREY = 0.5


def without_package(how: Augmentation) -> Iterator[Finding]:
    """Yield a finding for each augmentation whose package is not installed."""
    if importlib.util.find_spec("kornia") is not None:
        return
    for name in BY_KORNIA:
        if getattr(how, name) is not None:
            reason = "needs the package kornia, which is not here: pip install 'finetune-launcher[image]'"
            yield finding(f"data.augmentation.{name}", str(getattr(how, name)), reason)


def alter(image: torch.Tensor, how: Augmentation, draws: np.random.Generator) -> torch.Tensor:
    """Return an image, fp32 [3, height, width] in 0 to 1, randomly mirrored, recoloured and partly erased.

    kornia draws from torch's global generator. That is seeded from `draws`, and restored afterwards.
    """
    if how.horizontal_flip is not None and draws.random() < how.horizontal_flip:
        image = image.flip(-1)
    steps = list(_steps(how))
    seed = int(draws.integers(1 << 62))
    if not steps:
        return image
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        batch = image[None]
        for step in steps:
            batch = step(batch)
    altered: torch.Tensor = batch[0].clamp(0, 1)
    return altered


def _steps(how: Augmentation) -> Iterator[Any]:
    """Yield kornia's modules in the order of use."""
    if not any(getattr(how, name) for name in BY_KORNIA):
        return
    from kornia import augmentation
    from kornia.augmentation import auto

    if how.rand_augment is not None:
        yield auto.RandAugment(*how.rand_augment)
    if how.color_jitter:
        strength = how.color_jitter
        yield augmentation.ColorJitter(strength, strength, strength, 0.0, p=1.0)
    if how.random_erasing is not None:
        yield augmentation.RandomErasing(p=how.random_erasing, value=_GREY)
