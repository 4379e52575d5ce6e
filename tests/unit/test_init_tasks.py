"""`launcher init` offers every task, by each way in which its columns may be named."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from launcher import tasks
from launcher.cli.main import main
from launcher.job.load import load

WAYS = [(name, way) for name in tasks.TASKS for way in tasks.find(name).column_ways]


@pytest.mark.parametrize(("name", "way"), WAYS, ids=[f"{name} {'+'.join(way)}" for name, way in WAYS])
def test_each_way_makes_a_job_that_holds(
    name: str, way: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    columns = [part for role in way for part in ("--column", f"{role}=my_{role}")]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["init", "--model", "org/model", "--task", name, "--train", "train.jsonl", *columns])
    job = load(tmp_path / "job.yaml")
    assert job.model.task == name
    assert {role: getattr(job.data, role) for role in way} == {role: f"my_{role}" for role in way}


def test_tasks_of_installed_packages_are_offered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = metadata.EntryPoints([metadata.EntryPoint("own", "package:Own", tasks.GROUP)])
    monkeypatch.setattr(metadata, "entry_points", lambda **selected: own)
    assert tasks.names() == [*tasks.TASKS, "own"]
