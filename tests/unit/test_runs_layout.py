"""The run directory's identity and names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import ConfigurationError
from launcher.runs.layout import RunDirectory


def test_the_identity_is_made_once_and_by_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(lambda _: RunDirectory(tmp_path).run_id(), range(64)))
    assert len(set(identities)) == 1 and len(identities[0]) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["run_id"]


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    assert RunDirectory.find(run, tmp_path / "runs").path == RunDirectory.find("first", tmp_path / "runs").path == run


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there are no runs"):
        RunDirectory.find("second", tmp_path / "runs")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "plan.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"known runs.*first"):
        RunDirectory.find("second", tmp_path / "runs")
