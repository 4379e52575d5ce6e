"""Say which cases of a test `make test` runs without RUN_SLOW=1."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def slow_but(kept: Collection[Any], cases: Iterable[Any], very_slow: Collection[Any] = ()) -> list[Any]:
    """Mark all cases for `parametrize` as slow but those kept; some as very slow.

    A case is a value, or a tuple with one for each argument. Of a mapping the keys are the names, and say
    which are kept.
    """
    named = cases.items() if isinstance(cases, Mapping) else ((None, case) for case in cases)
    marked = []
    for name, case in named:
        key = case if name is None else name
        marks = pytest.mark.very_slow if key in very_slow else () if key in kept else pytest.mark.slow
        marked.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name, marks=marks))
    return marked
