"""Say which cases of a test `make test` runs without RUN_SLOW=1."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def slow_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark all cases for `parametrize` as slow but those kept.

    A case is a value, or a tuple with one for each argument. Of a mapping the keys are the names, and say
    which are kept.
    """
    named = cases.items() if isinstance(cases, Mapping) else ((None, case) for case in cases)
    marked = []
    for name, case in named:
        is_quick = (case if name is None else name) in kept
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, id=name, marks=() if is_quick else pytest.mark.slow))
    return marked
