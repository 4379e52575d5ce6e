"""The run directory: every name in it, written atomically, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigurationError, Problem, RunInUseError

STEP_DIRECTORY = re.compile(r"^step-(\d{8})$")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one and never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class RunDirectory:
    """The names in one run directory. Making one touches nothing on disk."""

    path: Path

    @classmethod
    def find(cls, run: str | Path, root: Path = Path("runs")) -> RunDirectory:
        """The run directory meant by a path or, below `root`, a name. Raises ConfigurationError where there is none."""
        for candidate in (Path(run), root / run):
            if (candidate / "plan.json").is_file():
                return cls(candidate.resolve())
        known = sorted(p.parent.name for p in root.glob("*/plan.json")) if root.is_dir() else []
        hint = f"known runs under {root}/: {', '.join(known)}" if known else f"there are no runs under {root}/"
        raise ConfigurationError(Problem("RUN", str(run), f"no run directory with a plan.json there; {hint}"))

    @property
    def job_file(self) -> Path:
        return self.path / "job.yaml"

    @property
    def forecast_file(self) -> Path:
        """What was expected of the run before it began; missing where nothing was known of its model."""
        return self.path / "forecast.json"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rendered(self) -> Path:
        """ds_config.json, accelerate.yaml, torchrun.txt, submit.sbatch: the plan as others read it."""
        return self.path / "rendered"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def finished_file(self) -> Path:
        return self.path / "FINISHED"

    @property
    def run_id_file(self) -> Path:
        return self.path / "run_id"

    @property
    def finished(self) -> bool:
        return self.finished_file.exists()

    def checkpoint(self, step: int) -> Path:
        """Where the committed checkpoint of `step` is, or would be."""
        return self.checkpoints / f"step-{step:08d}"

    def attempt(self, number: int) -> Path:
        """The directory of one attempt: rank logs, failure.json, command.json."""
        return self.attempts / f"{number:04d}"

    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        numbers = [int(p.name) for p in self.attempts.glob("[0-9][0-9][0-9][0-9]")] if self.attempts.is_dir() else []
        return max(numbers, default=0)

    def run_id(self) -> str:
        """The run's identity, made up once. Checkpoints carry it, so that another run's shard is known as such."""
        if not self.run_id_file.exists():
            # Linked into place whole: a crash leaves no empty identity, and of two makers one wins.
            made = self.run_id_file.with_name(f".run_id.{secrets.token_hex(4)}")
            made.write_text(secrets.token_hex(8), encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(made, self.run_id_file)
            made.unlink()
        return self.run_id_file.read_text(encoding="utf-8").strip()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunInUseError, naming the holder, where another one has it."""
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunInUseError(f"{self.path} is in use by {holder}; two at once would mix their files") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            yield
            file.truncate(0)
