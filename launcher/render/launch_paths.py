"""The paths and names in rendered scripts, checked and quoted."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
ENTRY = "launcher.training.entry"
AGENT = "launcher.launch.agent"
NODE = "launcher.launch.slurm.node"
AFTER = "launcher.launch.slurm.after_job"
PREPARE = r"""# The run directory, made of the files beside this one where it is not there yet; plan.json comes last and makes it a run.
if [ ! -e "$run/plan.json" ]; then
  mkdir -p -- "$run/rendered"
  for file in ds_config.json accelerate.yaml torchrun.txt submit.sbatch; do
    if [ -e "$rendered/$file" ]; then cp -- "$rendered/$file" "$run/rendered/$file"; fi
  done
  cp -- "$rendered/plan.json" "$run/plan.json"
fi
"""  # noqa: E501
"""The shell lines that create the run directory, with the variables $run and $rendered."""


@dataclass(frozen=True)
class Place:
    """The paths of a rendered script. Raises ConfigurationError for a path that no script can contain."""

    run: str
    """The absolute path of the run directory on every node."""
    rendered: str
    """The absolute path of the directory of rendered files on every node."""
    python: str = "python"
    """The interpreter on the nodes."""
    code: str = ""
    """A directory with a copy of launcher's own package; empty for the package that the interpreter has."""

    def __post_init__(self) -> None:
        for key, value in (
            ("run directory", self.run),
            ("directory of the files", self.rendered),
            ("python", self.python),
        ):
            if _CONTROL.search(value):
                raise ConfigurationError(
                    Problem(
                        key,
                        value,
                        "has a control character in it, which no script can carry; name another one",
                    )
                )
        for key, value in (("run directory", self.run), ("directory of the files", self.rendered)):
            if not PurePosixPath(value).is_absolute():
                raise ConfigurationError(
                    Problem(
                        key, value, "is relative, and means something else on another node; name it from / on"
                    )
                )


def quoted(words: list[str]) -> str:
    """Return the words as one shell line, quoted if necessary."""
    return " ".join(shlex.quote(word) for word in words)


def variables(plan: Plan) -> dict[str, str]:
    """Return the environment variables of the ranks, however they are started."""
    return {
        "OMP_NUM_THREADS": str(plan.mesh.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
