"""One row of a task's data as it is encoded."""

from __future__ import annotations

from typing import Any

import numpy as np

from launcher.data.rows import RowProblem
from launcher.tasks.task import Task


def arrays_of(task: Task, row: dict[str, Any], processor: Any) -> dict[str, np.ndarray]:
    """Return the arrays of one row. Raises RowProblem where it cannot be used."""
    [result] = task.encode([row], processor)
    if isinstance(result, RowProblem):
        raise result
    return result.arrays
