"""The layout of the run directory: every name in it, atomic writes, and its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigurationError, Problem, RunInUseError, StorageError
from launcher.runs.aside import within
from launcher.runs.lease import NO_LOCKS, Lease
from launcher.runs.processes import Identity

STEP_DIRECTORY = re.compile(r"^step-(\d{8,})$")
"""The name of a checkpoint: eight digits, so that names sort; more from a hundred million steps on."""
LEFTOVER = re.compile(r"^\..+\.[0-9a-f]{8}$")
"""The name of a file that is being written, or that a crash left half written."""
_RELEASE_SECONDS = 2.0
"""The time for a disk to release the lock; the kernel does it anyway when the process ends."""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one but never a part; durable
    when it returns.

    Raises OSError, with the file's name, and then leaves no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, if the file system supports it. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return  # a directory that may be written but not read
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, all durably. Raises OSError."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync_directory(directory.parent)


def runs_folder() -> Path:
    """Return the folder in which runs are kept and looked up by name: LAUNCHER_RUNS, else runs/ below the
    working directory. Raises ConfigurationError for a ~ without a home directory."""
    folder = os.environ.get("LAUNCHER_RUNS") or "runs"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        reason = "its ~ stands for no home directory here; write the whole path"
        raise ConfigurationError(Problem("LAUNCHER_RUNS", folder, reason)) from None


@dataclass(frozen=True)
class RunDirectory:
    """The names in one run directory. The constructor does not touch the disk."""

    path: Path

    @classmethod
    def find(cls, run: str | Path, root: Path | None = None) -> RunDirectory:
        """Return the run directory at a path or, by its name, below `root` (default: `runs_folder`). Raises
        ConfigurationError if there is none."""
        root = root or runs_folder()
        for candidate in (Path(run), root / run):
            if (candidate / "plan.json").is_file():
                return cls(candidate.resolve())
        known = sorted(p.parent.name for p in root.glob("*/plan.json")) if root.is_dir() else []
        hint = (
            f"known runs under {root}/: {', '.join(known)}" if known else f"there are no runs under {root}/"
        )
        raise ConfigurationError(Problem("RUN", str(run), f"no run directory with a plan.json there; {hint}"))

    @property
    def job_file(self) -> Path:
        return self.path / "job.yaml"

    @property
    def forecast_file(self) -> Path:
        """Return the file with the forecast made before the run began; missing if its model was not known."""
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
        """Return the folder of ds_config.json, accelerate.yaml, torchrun.txt and submit.sbatch: the plan in the
        form that other tools read."""
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
    def request_file(self) -> Path:
        """Return the file with the request of a command such as evaluate or predict to the ranks."""
        return self.path / "request.json"

    @property
    def is_scratch(self) -> bool:
        """Return whether it is the temporary directory of such a command, which cannot be resumed."""
        return self.request_file.is_file()

    @property
    def run_id_file(self) -> Path:
        return self.path / "run_id"

    @property
    def finished(self) -> bool:
        return self.finished_file.exists()

    def checkpoint(self, step: int) -> Path:
        """Return the directory of the committed checkpoint of `step`, which need not exist."""
        return self.checkpoints / f"step-{step:08d}"

    def evaluation(self, step: int) -> Path:
        """Return the file with the step, metrics and details (more than numbers) of the evaluation at `step`;
        missing if it has no details."""
        return self.path / "evaluations" / f"step-{step:08d}.json"

    def newest_evaluation(self, step: int) -> Path | None:
        """Return the newest evaluation file up to a step; None if there is none."""
        steps = [path.stem.removeprefix("step-") for path in (self.path / "evaluations").glob("step-*.json")]
        newest = max((int(one) for one in steps if one.isdecimal() and int(one) <= step), default=None)
        return None if newest is None else self.evaluation(newest)

    def attempt(self, number: int) -> Path:
        """Return the directory of one attempt: rank logs, failure.json, command.json."""
        return self.attempts / f"{number:04d}"

    def last_attempt(self) -> int:
        """Return the number of the newest attempt; 0 before the first."""
        numbers = (
            [int(p.name) for p in self.attempts.glob("[0-9]*") if p.name.isdecimal()]
            if self.attempts.is_dir()
            else []
        )
        return max(numbers, default=0)

    def clear_leftovers(self) -> None:
        """Remove files that a crash left half written in the run directory itself. The caller holds the lock,
        and no rank is running."""
        for path in self.path.glob(".*.*"):
            if LEFTOVER.match(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)

    def run_id(self) -> str:
        """Return the run's random identity, created once. Checkpoints carry it, so that another run's shard is
        recognised."""
        if not self.run_id_file.exists():
            # Linked into place when complete: a crash leaves no empty identity, and one of two writers wins.
            new = self.run_id_file.with_name(f".run_id.{secrets.token_hex(4)}")
            new.write_text(secrets.token_hex(8), encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(new, self.run_id_file)
            new.unlink()
        return self.run_id_file.read_text(encoding="utf-8").strip()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process: by flock, or by a lease if the file system has no locks.

        Raises RunInUseError, which names the holder, if another process has the lock, and StorageError if the
        file cannot be opened or locked.
        """
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"{self.path / '.lock'}: {error.strerror}") from None
        lease = self._hold(descriptor)
        with contextlib.suppress(OSError):  # a full disk must not prevent it: the command may free space
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(Identity.of_this_process()).encode(), 0)
        try:
            yield
        finally:
            within(_RELEASE_SECONDS, lambda: _let_go(descriptor, lease))

    def _hold(self, descriptor: int) -> Lease | None:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            return Lease(self.path / ".lease")
        except BlockingIOError:
            who = Identity.parse(os.pread(descriptor, 1000, 0).decode(errors="replace"))
            os.close(descriptor)
            holder = who.name if who else "another process"
            raise RunInUseError(
                f"{self.path} is in use by {holder}; two at once would mix their files"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{self.path / '.lock'} cannot be locked: {error.strerror}") from None


def _let_go(descriptor: int, lease: Lease | None) -> None:
    try:
        os.ftruncate(descriptor, 0)
        if lease:
            lease.release()
    finally:
        os.close(descriptor)
