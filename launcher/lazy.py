"""Import packages at their first use, so that planning need not wait for those that only training uses."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """Stands for a package by its name until an attribute of it is asked for.

    Unlike importlib.util.LazyLoader it never enters sys.modules, where a package that imports itself (torch)
    would meet it half made.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value
