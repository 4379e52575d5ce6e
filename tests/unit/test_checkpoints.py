from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from launcher.metrics import Better
from launcher.runs import retention
from launcher.runs.checkpoints import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    file_problem,
    hash_file,
    list_checkpoints,
    newest_valid,
    verify,
)
from launcher.runs.layout import RunDirectory
from tests.unit.checkpoint_corruption import KINDS, damage
from tests.unit.checkpoint_files import make_run, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "run")


def steps(run: RunDirectory) -> list[int]:
    return [stored.step for stored in list_checkpoints(run)]


def test_a_whole_checkpoint_has_no_problem(run: RunDirectory) -> None:
    directory = write_checkpoint(run, 3)
    assert verify(directory, run.run_id()) == []
    (stored,) = list_checkpoints(run)
    assert stored.manifest is not None and stored.manifest.total_bytes == 29_700 and stored.problems == ()


def test_a_manifest_survives_its_text(run: RunDirectory) -> None:
    text = (write_checkpoint(run, 3, {"loss": 0.1, "accuracy": float("inf")}) / MANIFEST_NAME).read_text()
    assert Manifest.parse(text).to_json() == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: text.replace("\n", " \n", 1), "not as it was written"),
        (lambda text: text.replace('"step": 3', '"step": 4'), "hash of itself"),
        (lambda text: "[]\n", "not as it was written"),
    ],
)
def test_a_manifest_that_is_not_as_written_is_refused(run: RunDirectory, change: object, reason: str) -> None:
    text = (write_checkpoint(run, 3) / MANIFEST_NAME).read_text()
    with pytest.raises(ValueError, match=reason):
        Manifest.parse(change(text))  # type: ignore[operator]


def test_a_manifest_of_a_later_format_is_refused_by_key(run: RunDirectory) -> None:
    manifest = Manifest.parse((write_checkpoint(run, 3) / MANIFEST_NAME).read_text())
    with pytest.raises(ValueError, match="format"):
        Manifest.parse(manifest.model_copy(update={"format": 2}).to_json())


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_each_kind_of_damage_is_named(run: RunDirectory, tmp_path: Path) -> None:
    whole = write_checkpoint(run, 3)
    other = make_run(tmp_path / "other")

    def problems_after(change: object) -> str:
        copy = run.checkpoint(9)
        shutil.copytree(whole, copy)
        change(copy)  # type: ignore[operator]
        copy.rename(run.checkpoints / "step-00000004")
        found = "; ".join(verify(run.checkpoint(4), run.run_id()))
        shutil.rmtree(run.checkpoint(4))
        return found

    assert "manifest says step 3" in problems_after(lambda copy: None)
    assert "__1_0.distcp is missing" in problems_after(lambda copy: (copy / "__1_0.distcp").unlink())
    assert "extra does not belong to it" in problems_after(lambda copy: (copy / "extra").touch())
    assert "has 5 bytes, 20,000 were written" in problems_after(
        lambda copy: os.truncate(copy / "__0_0.distcp", 5)
    )
    assert "is not a plain file" in problems_after(
        lambda copy: [(copy / ".metadata").unlink(), (copy / ".metadata").mkdir()]
    )
    assert "it was never finished" in problems_after(lambda copy: (copy / MANIFEST_NAME).unlink())
    foreign = write_checkpoint(other, 3)
    assert any("belongs to another run" in problem for problem in verify(foreign, run.run_id()))
    assert verify(foreign) == []
    assert verify(run.checkpoint(77), run.run_id()) != []


def test_a_file_that_cannot_be_read_is_a_problem(run: RunDirectory) -> None:
    directory = write_checkpoint(run, 3)
    assert "cannot be read" in str(file_problem(directory, "gone", FileRecord(bytes=1, xxh3_128="")))
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (problem,) = verify(directory, run.run_id())
    assert (
        problem.startswith(".metadata is not what was written")
        and hash_file(directory / ".metadata") in problem
    )


def test_the_newest_whole_checkpoint_is_chosen_and_newer_ones_are_rejected_with_reasons(
    run: RunDirectory,
) -> None:
    for step in (1, 2, 3):
        write_checkpoint(run, step)
    os.truncate(run.checkpoint(3) / ".metadata", 9)
    choice = newest_valid(run)
    assert choice.chosen is not None and choice.chosen.step == 2
    assert [(stored.step, stored.problems) for stored in choice.rejected] == [
        (3, (".metadata has 9 bytes, 700 were written",))
    ]
    for step in (1, 2):
        (run.checkpoint(step) / MANIFEST_NAME).unlink()
    assert newest_valid(run).chosen is None
    assert len(newest_valid(run).rejected) == 3


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_valid(RunDirectory(tmp_path)).chosen is None
    assert retention.prune(RunDirectory(tmp_path), 1, 0, "loss") == []
    assert retention.remove_leftovers(RunDirectory(tmp_path)) == []


def check_damage(run: RunDirectory, others: list[Path], count: int) -> None:
    """Damage the newest of two checkpoints `count` times: always noticed, the other chosen, a reason given."""
    good, target = run.checkpoint(1), run.checkpoint(2)
    pristine = run.path / "pristine"
    shutil.copytree(target, pristine)
    generator = random.Random(17)
    for number in range(count):
        what = damage(target, [good, *others], generator)
        choice = newest_valid(run, num_threads=1)
        assert choice.chosen is not None and choice.chosen.step == 1, f"{number}: {what}"
        assert [stored.step for stored in choice.rejected] == [2] and all(choice.rejected[0].problems), (
            f"{number}: {what}"
        )
        shutil.rmtree(target)
        shutil.copytree(pristine, target)
    assert verify(target, run.run_id()) == []


def test_random_damage_is_always_noticed(run: RunDirectory, tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(run, step)
    foreign = make_run(tmp_path / "foreign")
    check_damage(run, [write_checkpoint(foreign, 2)], 300)


def test_every_kind_of_damage_is_made(run: RunDirectory, tmp_path: Path) -> None:
    write_checkpoint(run, 1)
    for kind in KINDS:
        directory = write_checkpoint(run, 2)
        kind(directory, run.checkpoint(1), random.Random(3))
        assert verify(directory, run.run_id()) != [], kind.__name__
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "metric", "left"),
    [
        (1, 0, "loss", [5]),
        (2, 0, "loss", [4, 5]),
        (1, 1, "loss", [2, 5]),
        (1, 2, "accuracy", [1, 4, 5]),
        (9, 0, "loss", [1, 2, 3, 4, 5]),
    ],
)
def test_retention_keeps_the_last_and_the_best(
    run: RunDirectory, keep_last: int, keep_best: int, metric: str, left: list[int]
) -> None:
    better: Better = "lower" if metric == "loss" else "higher"
    losses = {1: 0.9, 2: 0.1, 3: float("nan"), 4: 0.8, 5: 0.2}
    for step, loss in losses.items():
        write_checkpoint(run, step, {"loss": loss, "accuracy": loss})
    doomed = [stored.step for stored in retention.to_prune(run, keep_last, keep_best, metric, better)]
    assert steps(run) == [1, 2, 3, 4, 5]
    assert [stored.step for stored in retention.prune(run, keep_last, keep_best, metric, better)] == doomed
    assert steps(run) == left
    assert len(list(run.checkpoints.iterdir())) == len(left)


def test_retention_never_takes_the_last_good_one_nor_what_is_newer(run: RunDirectory) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step)
    for step in (3, 4):
        path = run.checkpoint(step) / "__0_0.distcp"
        path.write_bytes(bytes(20_000))
    retention.prune(run, 1, 0, "loss")
    assert steps(run) == [2, 3, 4]
    (run.checkpoint(2) / ".metadata").unlink()
    retention.prune(run, 1, 0, "loss")
    assert steps(run) == [2, 3, 4]
    retention.prune(run, 1, 0, "loss", known_good={4})
    assert steps(run) == [4]


def test_leftovers_go_and_a_checkpoint_set_aside_gets_its_name_back(run: RunDirectory) -> None:
    for step in (1, 2):
        write_checkpoint(run, step)
    run.checkpoint(2).rename(run.checkpoints / ".replaced-step-00000002-ab12")
    shutil.copytree(run.checkpoint(1), run.checkpoints / ".replaced-step-00000001-cd34")
    for name in (".attempt-00000003-x", ".removed-step-00000000-y"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / ".keep").mkdir()
    cleared = retention.remove_leftovers(run)
    assert cleared == [".attempt-00000003-x", ".removed-step-00000000-y", ".replaced-step-00000001-cd34"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        ".keep",
        "step-00000001",
        "step-00000002",
    ]
    assert verify(run.checkpoint(2), run.run_id()) == []


def test_a_commit_that_fails_changes_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(run, 1, {"loss": 1.0})
    text = (before / MANIFEST_NAME).read_text()
    original = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".attempt"):
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(run, 1, {"loss": 2.0})
    assert (before / MANIFEST_NAME).read_text() == text
    assert steps(run) == [1]
