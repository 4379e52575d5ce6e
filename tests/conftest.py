"""Marks tests by the folder they are in, and leaves out what this machine cannot run."""

from __future__ import annotations

import operator
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Operators take minutes to compile; tests share them with runs, unlike everything else that is cached.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "launcher" / "extensions"))

# The same examples in every run: whoever looks for an unlucky one has time for it, and the next commit has not.
# To look: pytest --hypothesis-profile=default --hypothesis-seed=N
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MISSING = {
    "gpu": ("nvidia-smi", "no GPU here; LAUNCHER_GPU_REHEARSAL=1 goes through these tests on a CPU"),
    "slurm": ("sbatch", "no Slurm cluster here"),
}
_LONGEST = (
    "slurm/test_submit.py",
    "training/test_adapters.py",
    "distributed/test_script.py",
    "slurm/test_seeing.py",
    "training/test_engine.py",
    "training/test_tracing.py",
    "slurm/test_failing.py",
    "training/test_too_large.py",
    "slurm/test_doctor.py",
    "distributed/test_surroundings.py",
    "slurm/test_cluster.py",
    "distributed/test_local.py",
    "slurm/test_train_sbatch.py",
    "slurm/test_doors.py",
    "distributed/test_checkpoint_import.py",
    "training/test_deepspeed.py",
    "distributed/test_hangs.py",
    "distributed/test_own_task.py",
    "training/test_resume.py",
    "training/test_loss_check.py",
    "distributed/test_demo.py",
    "training/test_corruptions.py",
    "training/test_kills.py",
)
"""Files that take minutes, in this order before all others: so no process has one of them left when the
others are done. Those that mostly wait (for Slurm) stand between those that compute, so that they run beside
them and seldom beside each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(getattr(pytest.mark, folder if folder in ("unit", "gpu", "slurm") else "distributed"))
        for marker, (program, reason) in _MISSING.items():
            if marker == "gpu" and os.environ.get("LAUNCHER_GPU_REHEARSAL") == "1":
                continue
            if item.get_closest_marker(marker) and shutil.which(program) is None:
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("very_slow") and os.environ.get("RUN_VERY_SLOW") != "1":
            item.add_marker(
                pytest.mark.skip(
                    reason="many minutes of processor time, for which CI has no room; RUN_VERY_SLOW=1 runs it"
                )
            )
        if folder == "slurm":
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and os.environ.get("RUN_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="takes minutes; RUN_SLOW=1 runs it"))
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(
        key=lambda item: place.get(item.path.relative_to(Path(__file__).parent).as_posix(), len(place))
    )


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache, nor what was measured of the machine: before any process is
    started that others are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        # What a test starts runs this checkout, wherever it is started.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_figures(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit test plans by what a run of another test measured of this machine: it would expect another
    number in another order."""
    if request.node.get_closest_marker("unit"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path.parent / f"{tmp_path.name}-state"))


@pytest.fixture(autouse=True)
def _own_draws() -> None:
    """What a test draws without a seed is the same whatever ran before it in this process."""
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            operator.attrgetter(seed)(sys.modules[name])(0)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Leave the signals to the next test as they were: what a test calls may block or catch some."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
