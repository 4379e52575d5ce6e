"""Spoilt files of every kind before the commands that read them: an answer of launcher's own, and never a
traceback or a hang.

The long version, with other inputs each time, is `RUN_SLOW=1 RUN_VERY_SLOW=1 LAUNCHER_FUZZ_SECONDS=3600
pytest tests/unit/test_fuzz.py -s`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiers import slow_but
from tests.unit.fuzz_targets import TARGETS, check, check_replaced, content_of, make_folder, spoil

CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").iterdir())
"""What once gave a traceback or a hang, by target and seed."""
SECONDS = float(os.environ.get("LAUNCHER_FUZZ_SECONDS", "3600"))
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoilt")
    make_folder(folder)
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_spoilt_is_read(name: str, folder: Path) -> None:
    check(name, (folder / TARGETS[name].file).read_bytes(), folder)


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "device", "directory", "link to nothing", "link to itself"]
)
@pytest.mark.parametrize("name", TARGETS)
def test_something_else_in_the_place_of_a_file(name: str, kind: str, folder: Path) -> None:
    check_replaced(name, kind, folder)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found_once_is_answered_now(path: Path, folder: Path) -> None:
    check(path.name.rpartition("-")[0], path.read_bytes(), folder)


# A spoilt configuration of a model is of an unknown family, which a process with torch traces.
@pytest.mark.parametrize("name", slow_but([name for name in TARGETS if name != "config"], list(TARGETS)))
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=FIXTURES)
@given(generator=st.randoms(use_true_random=False))
def test_spoilt_files_are_answered(name: str, folder: Path, generator: random.Random) -> None:
    check(name, spoil(name, content_of(name, folder), generator), folder)


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.timeout(0)
def test_an_hour_of_spoilt_files(folder: Path) -> None:
    seed, counts, longest = random.SystemRandom().randrange(2**40), Counter[str](), 0.0
    began = time.monotonic()
    contents = {name: content_of(name, folder) for name in TARGETS}
    while time.monotonic() - began < SECONDS:
        generator = random.Random(seed)
        name = generator.choice(list(TARGETS))
        try:
            longest = max(longest, check(name, spoil(name, contents[name], generator), folder))
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}") from error
        counts[name] += 1
        seed += 1
    print(
        f"{sum(counts.values())} spoilt files in {SECONDS:.0f} s, the longest command {longest:.1f} s: "
        f"{dict(counts)}"
    )
