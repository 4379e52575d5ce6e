"""Build DeepSpeed's compiled operators once on a machine, before the ranks meet.

DeepSpeed compiles an operator where it first needs it, in the middle of loading, in every rank; a rank that
is killed meanwhile leaves a lock behind that all later ones wait for. So one process builds beforehand, says
so, and clears such a lock first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.runs import cache

Report = Callable[[int, int], None]
_FOR_FILES = ("PinMemoryBuilder", "AsyncIOBuilder")
_VARIABLE = "TORCH_EXTENSIONS_DIR"


def build_operators(plan: Plan, report: Report) -> None:
    """Build what the plan's engine compiles on first use, and report how many of them are done; minutes the
    first time, seconds later.

    They lie in XDG_CACHE_HOME/launcher/extensions; the user's own TORCH_EXTENSIONS_DIR goes before it.

    Raises ConfigurationError where one cannot be built, with what the compiler said in the rank's log.
    """
    if plan.engine != "deepspeed" or plan.offload_to == "cpu":
        return
    os.environ.setdefault(_VARIABLE, str(cache.root() / "extensions"))
    os.environ.setdefault("DS_ACCELERATOR", plan.mesh.device)
    # ninja comes with DeepSpeed, beside the Python that runs this, which need not be on the path.
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
            shown = str(error).strip().splitlines()
            reason = (
                f"DeepSpeed's {name.removesuffix('Builder')} operator could not be built: "
                f"{shown[0] if shown else type(error).__name__}"
            )
            raise ConfigurationError(Problem("memory.offload_to", None, f"{reason}; write cpu")) from error
        report(number + 1, len(_FOR_FILES))
