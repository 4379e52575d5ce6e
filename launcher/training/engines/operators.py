"""The build of DeepSpeed's compiled operators, once per machine, before the process group starts.

DeepSpeed compiles an operator at its first use, in the middle of loading, in every rank. A rank that is killed
meanwhile leaves a lock behind, for which all later ranks wait. So one process removes such locks, builds the
operators in advance, and reports its progress.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from launcher.errors import ConfigurationError, Problem, first_line
from launcher.planner.plan import Plan
from launcher.runs import cache

Report = Callable[[int, int], None]
_FOR_FILES = ("PinMemoryBuilder", "AsyncIOBuilder")
_VARIABLE = "TORCH_EXTENSIONS_DIR"


def build_operators(plan: Plan, report: Report) -> None:
    """Build the operators that the plan's engine compiles on first use, and report how many are done. This takes
    minutes the first time, seconds later.

    They are stored in XDG_CACHE_HOME/launcher/extensions, or in the user's TORCH_EXTENSIONS_DIR if it is set.

    Raises ConfigurationError if one cannot be built; the compiler's output is in the rank's log.
    """
    if plan.engine != "deepspeed" or plan.offload_to == "cpu":
        return
    os.environ.setdefault(_VARIABLE, str(cache.root() / "extensions"))
    os.environ.setdefault("DS_ACCELERATOR", plan.mesh.device)
    # DeepSpeed installs ninja in the folder of this Python, which may not be on the path.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    directory = Path(os.environ[_VARIABLE])
    cache.hold_until_the_end(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".launcher.lock"):
        for stale in directory.glob("**/lock"):
            stale.unlink(missing_ok=True)
        _build(report)


def _build(report: Report) -> None:
    from deepspeed.accelerator import get_accelerator

    report(0, len(_FOR_FILES))
    for number, name in enumerate(_FOR_FILES):
        try:
            get_accelerator().get_op_builder(name)().load(verbose=False)
        except Exception as error:
            reason = (
                f"DeepSpeed's {name.removesuffix('Builder')} operator could not be built: {first_line(error)}"
            )
            raise ConfigurationError(Problem("memory.offload_to", None, f"{reason}; write cpu")) from error
        report(number + 1, len(_FOR_FILES))
