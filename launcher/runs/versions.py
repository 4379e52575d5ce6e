"""The versions of installed packages, without importing them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterable

import launcher

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "deepspeed")
"""The packages on which a run's numbers may depend."""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python, launcher and these packages by name; empty if not installed."""
    by_name = {"python": platform.python_version(), "launcher": launcher.__version__}
    for name in packages:
        by_name[name] = ""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_name[name] = importlib.metadata.version(name)
    return by_name
