from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.errors import CheckpointError
from launcher.runs import events
from launcher.runs.checkpoints import newest_valid, verify
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint import checkpointer as module
from launcher.training.checkpoint.reader import CheckpointReader
from tests.distributed.checkpoint_world import (
    assert_holds,
    checkpointer,
    full_tensors,
    progress,
    run_ranks,
    shard_tensors,
    sharded_llama,
    whole,
)
from tests.tiers import slow_but

SIZES = [1, 2, 3, 4]


def named(run: Path, event: str) -> list[dict[str, object]]:
    return [record for record in events.read(run / "events.jsonl") if record["event"] == event]


def save_on(
    rank: int, world_size: int, run: Path, steps: list[int], wait: bool = True, **settings: object
) -> None:
    saver = checkpointer(run, rank, world_size, **settings)
    for step in steps:
        assert saver.save(
            shard_tensors(full_tensors(step), world_size), progress(step), {"loss": 1.0 / step}, wait=wait
        )
    assert saver.finish()


def load_on(rank: int, world_size: int, runs: list[Path]) -> None:
    for run in runs:
        tensors = shard_tensors(
            {name: torch.zeros_like(tensor) for name, tensor in full_tensors(7).items()}, world_size
        )
        assert checkpointer(run, rank, world_size).load(tensors) == progress(7)
        assert_holds(tensors, full_tensors(7))


@pytest.mark.slow
def test_saved_on_any_number_of_ranks_loads_on_any_other_to_the_bit(tmp_path: Path) -> None:
    runs = [tmp_path / str(size) for size in SIZES]
    for size, run in zip(SIZES, runs, strict=True):
        run_ranks(size, save_on, run, [7])
        assert verify(run / "checkpoints" / "step-00000007") == []
    for size in SIZES:
        run_ranks(size, load_on, runs)


def save_llama(rank: int, world_size: int, run: Path) -> dict[str, torch.Tensor] | None:
    tensors = sharded_llama(world_size, seed=3)
    checkpointer(run, rank, world_size).save(tensors, progress(1), wait=True)
    found = {name: whole(tensor).detach().clone() for name, tensor in tensors.items()}
    return {name: tensor.numpy() for name, tensor in found.items()} if rank == 0 else None


def load_llama(rank: int, world_size: int, run: Path) -> dict[str, torch.Tensor]:
    tensors = sharded_llama(world_size, seed=4)
    assert checkpointer(run, rank, world_size).load(tensors) == progress(1)
    return {name: whole(tensor).detach().clone().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("savers", "loaders"), slow_but([(2, 3)], [(2, 3), (4, 2), (3, 1)]))
def test_a_model_and_its_optimizer_under_fsdp2_move_between_rank_counts(
    tmp_path: Path, savers: int, loaders: int
) -> None:
    saved = run_ranks(savers, save_llama, tmp_path)[0]
    for loaded in run_ranks(loaders, load_llama, tmp_path):
        assert loaded.keys() == saved.keys()
        assert all(loaded[name].tobytes() == saved[name].tobytes() for name in saved)


def save_while_changing(rank: int, world_size: int, run: Path) -> None:
    saver = checkpointer(run, rank, world_size, keep_last=9)
    tensors = shard_tensors(full_tensors(1), world_size)
    for step in (1, 2, 3):
        for tensor, source in zip(
            tensors.values(), shard_tensors(full_tensors(step), world_size).values(), strict=True
        ):
            tensor.copy_(source)
        saver.save(tensors, progress(step))
        for tensor in tensors.values():
            tensor.zero_()
    assert saver.finish()


def test_a_save_in_the_background_holds_what_the_tensors_were_when_it_was_asked_for(tmp_path: Path) -> None:
    plain, background = tmp_path / "plain", tmp_path / "background"
    run_ranks(2, save_on, plain, [1, 2, 3], True)
    run_ranks(2, save_while_changing, background)
    for step in (1, 2, 3):
        reader = CheckpointReader(RunDirectory(background).checkpoint(step))
        assert_holds({name: reader.read(name) for name in reader.names}, full_tensors(step))
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        files = [RunDirectory(run).checkpoint(3) / name for run in (plain, background)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_pytorchs_own_tools_read_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(3, save_on, tmp_path, [7])
    directory, out = RunDirectory(tmp_path).checkpoint(7), tmp_path / "out.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.checkpoint.format_utils",
        "dcp_to_torch",
        str(directory),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert_holds(torch.load(out, weights_only=True), full_tensors(7))


def test_one_rank_without_a_process_group(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, 0, 1)
    tensors = full_tensors(5)
    assert saver.load(tensors) is None
    saver.save(tensors, progress(5))
    assert saver.finish()
    loaded = full_tensors(6)
    assert saver.load(loaded) == progress(5)
    assert_holds(loaded, full_tensors(5))


def fail_on_last_rank(rank: int, world_size: int, run: Path, asynchronous: bool) -> list[bool]:
    saver = checkpointer(run, rank, world_size, **{"async": asynchronous})
    outcomes = []
    for step in (1, 2, 3):
        original = module.write_hashed
        if step == 2 and rank == world_size - 1:
            module.write_hashed = lambda path, blocks: (path / "no such file").stat()
        saver.save(shard_tensors(full_tensors(step), world_size), progress(step))
        outcomes.append(saver.finish())
        module.write_hashed = original
    return outcomes


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on(
    tmp_path: Path, asynchronous: bool
) -> None:
    assert run_ranks(3, fail_on_last_rank, tmp_path, asynchronous) == [[True, False, True]] * 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
    ]
    (failed,) = named(tmp_path, "save_failed")
    assert failed["step"] == 2
    assert "rank 2" in str(failed["reason"])
    assert "No such file" in str(failed["reason"])


def fill_the_disk(rank: int, world_size: int, run: Path, ballast: Path | None) -> list[bool]:
    saver = checkpointer(run, rank, world_size, keep_last=9)
    tensors = {"model.a": torch.arange(200_000, dtype=torch.float32)}
    outcomes = [saver.save(tensors, progress(1), wait=True)]
    if rank == 0 and ballast is not None:
        free = os.statvfs(run).f_bavail * os.statvfs(run).f_frsize
        ballast.write_bytes(bytes(free - 300_000))
    elif ballast is None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    dist.barrier()
    tensors["model.a"] += 1
    saver.save(tensors, progress(2))
    outcomes.append(saver.finish())
    return outcomes


def check_full_disk(run: Path, reason: str) -> None:
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    (failed,) = named(run, "save_failed")
    assert failed["step"] == 2
    assert reason in str(failed["reason"])
    chosen = newest_valid(RunDirectory(run)).chosen
    assert chosen is not None and chosen.step == 1


def test_a_file_size_limit_during_a_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(2, fill_the_disk, tmp_path, None) == [[True, False]] * 2
    check_full_disk(tmp_path, "File too large")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 4 MB. Needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip(
            "a small file system cannot be mounted here; the file size limit above is the same failure "
            "at the same call"
        )
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_during_a_save_leaves_the_older_checkpoint(small_disk: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    assert run_ranks(2, fill_the_disk, run, small_disk / "ballast") == [[True, False]] * 2
    check_full_disk(run, "No space left on device")


def several_saves(
    rank: int, world_size: int, run: Path, steps: tuple[int, ...], settings: dict[str, Any]
) -> list[bool]:
    """Checkpoints of 1.2 MB each; what became of each save."""
    saver = checkpointer(run, rank, world_size, **settings)
    outcomes = []
    for step in steps:
        tensors = shard_tensors({"model.large": torch.full((600, 500), float(step))}, world_size)
        saver.save(tensors, progress(step), {"loss": float(step)})
        outcomes.append(saver.finish())
    return outcomes


@pytest.mark.parametrize(
    ("settings", "outcomes", "kept", "given_up"),
    [
        (
            {"keep_last": 3},
            [True] * 5,
            [3, 4, 5],
            [[1], [2]],
        ),  # the disk holds three and not a fourth beside them
        ({"keep_last": 4}, [True] * 5, [3, 4, 5], [[1], [2]]),
        ({"keep_last": 3, "keep_best": 3}, [True, True, True, False, False], [1, 2, 3], []),
    ],
)
def test_the_oldest_is_given_up_where_there_is_room_for_so_many_and_no_more(
    small_disk: Path,
    settings: dict[str, Any],
    outcomes: list[bool],
    kept: list[int],
    given_up: list[list[int]],
) -> None:
    run = small_disk / "run"
    run.mkdir()
    assert run_ranks(2, several_saves, run, (1, 2, 3, 4, 5), settings) == [outcomes] * 2
    assert [record["removed"] for record in named(run, "made_room")] == given_up
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in kept
    ]
    assert not any(verify(RunDirectory(run).checkpoint(step)) for step in kept)


def test_the_only_one_is_never_given_up_nor_any_where_that_is_not_enough(small_disk: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    assert run_ranks(2, several_saves, run, (1, 2), {"keep_last": 1}) == [[True, False]] * 2
    check_full_disk(run, "No space left on device")
    assert not named(run, "made_room")


def killed_while_saving(rank: int, world_size: int, run: Path, moment: str) -> None:
    saver = checkpointer(run, rank, world_size)
    saver.save(shard_tensors(full_tensors(1), world_size), progress(1), wait=True)

    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write" and rank == 1:
        original = module.write_hashed
        module.write_hashed = lambda path, blocks: (original(path, blocks), end())
    elif moment == "commit":
        module.retention.commit = end
    elif moment == "rename":
        module.retention.sync_directory = end
    saver.save(shard_tensors(full_tensors(2), world_size), progress(2), wait=True)
    end()


@pytest.mark.parametrize("moment", ["write", "commit", "rename"])
def test_a_save_killed_before_its_rename_is_never_chosen_and_cleared_away(
    tmp_path: Path, moment: str
) -> None:
    run_ranks(2, killed_while_saving, tmp_path, moment, killed=True)
    run = RunDirectory(tmp_path)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    if moment == "write":
        assert [name for name in names if name.startswith("step-")] == ["step-00000001"]
    else:
        assert len(names) == 2 and names[0].startswith(".attempt-00000002-") and names[1] == "step-00000001"
    choice = newest_valid(run)
    assert choice.chosen is not None and choice.chosen.step == 1 and choice.rejected == ()
    tensors = full_tensors(9)
    assert checkpointer(tmp_path, 0, 1).load(tensors) == progress(1)
    assert_holds(tensors, full_tensors(1))
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


def load_past_damage(rank: int, world_size: int, run: Path) -> list[str]:
    loader = checkpointer(run, rank, world_size)
    tensors = shard_tensors(full_tensors(9), world_size)
    with pytest.raises(CheckpointError) as refused:
        loader.load(tensors, step=3)
    with pytest.raises(CheckpointError) as missing:
        loader.load(tensors, step=5)
    assert_holds(tensors, full_tensors(9))
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert loader.load(tensors) == progress(2)
    assert ("step-00000003 is not whole" in printed.getvalue()) == (rank == 0)
    assert_holds(tensors, full_tensors(2))
    assert loader.load(tensors, step=1) == progress(1)
    assert_holds(tensors, full_tensors(1))
    return [str(refused.value), str(missing.value)]


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    run_ranks(2, save_three, tmp_path)
    shard = RunDirectory(tmp_path).checkpoint(3) / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for refused, missing in run_ranks(2, load_past_damage, tmp_path):
        assert (
            "step 3" in refused
            and "__1_0.distcp is not what was written" in refused
            and "the newest good one is step 2" in refused
        )
        assert "there is no such checkpoint" in missing and "the newest good one is step 2" in missing
    rejections = named(tmp_path, "rejected")
    assert {record["checkpoint"] for record in rejections} == {"step-00000003"}
    assert "__1_0.distcp" in str(rejections[-1]["reason"])


def save_three(rank: int, world_size: int, run: Path) -> None:
    save_on(rank, world_size, run, [1, 2, 3], keep_last=9)


def load_nothing_whole(rank: int, world_size: int, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is whole"):
        checkpointer(run, rank, world_size).load(shard_tensors(full_tensors(9), world_size))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    run_ranks(2, save_three, tmp_path)
    for step in (1, 2, 3):
        (RunDirectory(tmp_path).checkpoint(step) / ".metadata").unlink()
    run_ranks(2, load_nothing_whole, tmp_path)


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, 0, 1)
    saver.save({"model.a": torch.zeros(3)}, progress(1), wait=True)
    for tensors, reason in [
        ({"model.a": torch.zeros(4)}, r"model.a is \(3,\)"),
        ({"model.a": torch.zeros(3).double()}, "float64 here"),
        ({"model.b": torch.zeros(3)}, "model.b is missing"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            saver.load(tensors)


def test_what_is_no_tensor_fails_the_save_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = checkpointer(tmp_path, 0, 1)
    assert not saver.save({"model.a": torch.zeros(3), "optimizer.lr": 0.1}, progress(1), wait=True)  # type: ignore[dict-item]
    assert "optimizer.lr is a float" in capsys.readouterr().err
    assert saver.save({"model.a": torch.zeros(3)}, progress(2), wait=True)


def test_progress_that_json_cannot_hold_fails_the_save(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, 0, 1)
    bad = progress(1).model_copy(update={"extra": {"tensor": torch.zeros(1)}})
    assert not saver.save({"model.a": torch.zeros(3)}, bad, wait=True)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_retention_follows_the_settings_and_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, 0, 1, keep_last=1, keep_best=1)
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.7), (4, 0.9), (4, 0.8)]:
        saver.save({"model.a": torch.full((3,), loss)}, progress(step), {"loss": loss})
    assert saver.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    tensors = {"model.a": torch.zeros(3)}
    saver.load(tensors)
    assert torch.equal(tensors["model.a"], torch.full((3,), 0.8))


def test_looking_on_leaves_a_live_writers_attempt_alone(tmp_path: Path) -> None:
    attempt = tmp_path / "checkpoints" / ".attempt-00000001-x"
    attempt.mkdir(parents=True)
    module.Checkpointer(RunDirectory(tmp_path), saver_plan(), 0, 1).open(read_only=True)
    assert attempt.is_dir()
    module.Checkpointer(RunDirectory(tmp_path), saver_plan(), 0, 1).open()
    assert not attempt.exists()


def saver_plan() -> module.Plan:
    from tests.distributed.checkpoint_world import make_plan

    return make_plan(1)


def test_saved_events_say_how_long_and_how_much(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, 0, 1)
    saver.save({"model.a": torch.zeros(1000)}, progress(1), wait=True)
    (saved,) = named(tmp_path, "saved")
    assert saved["step"] == 1
    files = [path for path in RunDirectory(tmp_path).checkpoint(1).iterdir() if path.name != "manifest.json"]
    assert saved["bytes"] == sum(path.stat().st_size for path in files) > 4000
    manifest = json.loads((RunDirectory(tmp_path).checkpoint(1) / "manifest.json").read_text())
    assert manifest["progress"]["extra"] == {"loss_scale": 1024.0, "patience": [1, None]}
