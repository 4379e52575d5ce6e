"""Packages imported at their first use, so that planning does not wait for those that only training uses."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """A placeholder for a package, which imports the package when one of its attributes is first read.

    Unlike importlib.util.LazyLoader it never enters sys.modules, where a package that imports itself (torch)
    would find it half initialised.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value
