"""What checkpoints cost: verification speed, DCP's own writer beside ours (as it is, and with a stream that
hashes), and the wall time training loses to a plain and to an asynchronous save.

    PYTHONPATH=. python -m torch.distributed.run --nproc-per-node 2 tests/benchmarks/bench_checkpoint.py

Each rank runs a loop of matrix products with an all-reduce per step (as sharded training does), first without
saving, then with plain saves, then with asynchronous ones, in alternating rounds. Lost per save = (time of
the loop with saves - time of the loop without) / saves, so that the slower steps beside a background save
count, and so does waiting for the last one. Prints one JSON object and, with --write,
docs/benchmarks/checkpoints.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from launcher.runs.checkpoints import Progress, newest_valid, verify
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.checkpointer import Checkpointer
from tests.distributed.checkpoint_world import make_plan

FIGURES = Path(__file__).parents[2] / "docs" / "benchmarks" / "checkpoints.md"


class HashedStream:
    """A file that is hashed as it is written."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest = stream, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._stream.write(data)

    def close(self) -> None:
        """Leave the file open: DCP closes each tensor's stream, which is the file's where nothing transforms
        it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class HashingFiles(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield HashedStream(stream) if "w" in mode else stream


class HashingWriter(FileSystemWriter):
    """DCP's own writer with files that are hashed, as a checkpoint of ours has to be."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fs = HashingFiles()


@dataclass(frozen=True)
class Settings:
    megabytes: int
    """Of the whole checkpoint."""
    steps: int
    saves: int
    rounds: int
    width: int
    products: int


def make_tensors(settings: Settings, world_size: int) -> dict[str, torch.Tensor]:
    """A model and two moments, cut along rows; 100 tensors each."""
    mesh = init_device_mesh("cpu", (world_size,))
    rows = max(world_size, settings.megabytes * 10**6 // 300 // 4 // 1024 // world_size * world_size)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(100):
        for name in (f"model.{number}", f"optimizer.{number}.exp_avg", f"optimizer.{number}.exp_avg_sq"):
            tensors[name] = DTensor.from_local(torch.randn(rows // world_size, 1024), mesh, [Shard(0)])
    return tensors


def loop(
    settings: Settings,
    saver: Checkpointer | None,
    tensors: dict[str, torch.Tensor],
    wait: bool,
    first_step: int,
) -> float:
    """Seconds of the loop, the last save waited for."""
    matrix = torch.randn(settings.width, settings.width)
    gradient = torch.zeros(1 << 20)
    every = settings.steps // settings.saves
    dist.barrier()
    begin = time.perf_counter()
    for step in range(settings.steps):
        for _ in range(settings.products):
            matrix @ matrix
        dist.all_reduce(gradient)
        if (
            saver is not None and step % every == every // 4
        ):  # with steps left for the last one to hide behind
            number = first_step + step
            saver.save(tensors, Progress(step=number, samples=number, tokens=number), wait=wait)
    if saver is not None:
        saver.finish()
    dist.barrier()
    return time.perf_counter() - begin


def measure(settings: Settings, run: RunDirectory) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = make_tensors(settings, world_size)
    saver = Checkpointer(run, make_plan(world_size, keep_last=1), rank, world_size).open()
    loop(settings, saver, tensors, wait=False, first_step=0)
    seconds: dict[str, list[float]] = {"none": [], "plain": [], "async": []}
    for number in range(settings.rounds):
        first_step = (number + 1) * 10 * settings.steps
        seconds["none"].append(loop(settings, None, tensors, False, 0))
        seconds["plain"].append(loop(settings, saver, tensors, True, first_step))
        seconds["async"].append(loop(settings, saver, tensors, False, first_step + settings.steps))
    lost = {
        kind: [
            (with_saves - without) / settings.saves
            for with_saves, without in zip(seconds[kind], seconds["none"], strict=True)
        ]
        for kind in ("plain", "async")
    }
    middle = {kind: statistics.median(values) for kind, values in lost.items()}
    return {
        "loop_seconds": seconds,
        "lost_seconds_per_save": lost,
        "median_lost_plain": middle["plain"],
        "median_lost_async": middle["async"],
        "async_share_of_plain": middle["async"] / middle["plain"],
    }


def measure_writers(settings: Settings, run: RunDirectory) -> dict[str, Any]:
    """Seconds, and seconds of this rank's processor, of a whole save by our writer, which hashes what it
    writes, by DCP's own, which does not, and by a subclass of it that does; all synced to the disk."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = make_tensors(settings, world_size)
    saver = Checkpointer(run, make_plan(world_size, keep_last=1), rank, world_size).open()
    writers = {
        "ours": None,
        "dcp": FileSystemWriter(run.path / "dcp", sync_files=True, overwrite=True),
        "hashing": HashingWriter(run.path / "hashing", sync_files=True, overwrite=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    processor: dict[str, list[float]] = {name: [] for name in writers}
    for number in range(settings.rounds + 1):  # the first one warms all up
        names = [*writers][number % 3 :] + [*writers][: number % 3]
        for name in names:
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            if writers[name] is None:
                step = 10**6 + number
                saver.save(tensors, Progress(step=step, samples=step, tokens=step), wait=True)
            else:
                dcp.save(tensors, storage_writer=writers[name])
            busy = time.process_time() - busy
            dist.barrier()
            if number:
                seconds[name].append(time.perf_counter() - begin)
                processor[name].append(busy)
    saver.finish()
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[name], strict=True)]
        for name in ("dcp", "hashing")
    }
    return {
        "seconds": seconds,
        "processor_seconds": {name: statistics.median(values) for name, values in processor.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
    }


def measure_verification(run: RunDirectory, rounds: int) -> dict[str, Any]:
    chosen = newest_valid(run).chosen
    assert chosen is not None and chosen.manifest is not None
    gigabytes = chosen.manifest.total_bytes / 1e9
    speeds: dict[str, float] = {}
    for threads in (1, 2):
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            assert verify(chosen.directory, run.run_id(), threads) == []
            times.append(time.perf_counter() - begin)
        speeds[f"gigabytes_per_second_{threads}_threads"] = gigabytes / statistics.median(times)
    return {"gigabytes": gigabytes, **speeds}


def each_round(writers: dict[str, Any]) -> str:
    names = {"ours": "ours", "dcp": "DCP's own", "hashing": "DCP's own, hashing"}
    return "\n".join(
        f"- {words}: {', '.join(f'{value:.2f}' for value in writers['seconds'][name])} s"
        f" ({writers['processor_seconds'][name]:.2f} s)"
        for name, words in names.items()
    )


def report(result: dict[str, Any]) -> str:
    settings, verification = result["settings"], result["verification"]
    return f"""# Checkpoints: what they cost

Written by `tests/benchmarks/bench_checkpoint.py`; conditions: {result["machine"]}, torch {torch.__version__},
{result["world_size"]} gloo ranks, a checkpoint of {verification["gigabytes"]:.2f} GB in 300 tensors, {settings["saves"]} saves in
{settings["steps"]} steps of matrix products and an all-reduce, {settings["rounds"]} alternating rounds, medians.

| | measured |
|---|---|
| verification, one thread, files in the page cache | {verification["gigabytes_per_second_1_threads"]:.1f} GB/s |
| verification, two threads | {verification["gigabytes_per_second_2_threads"]:.1f} GB/s |
| wall time lost to a plain save, with fsync | {result["median_lost_plain"]:.2f} s |
| wall time lost to an asynchronous save, next steps and the last wait included | {result["median_lost_async"]:.2f} s |
| asynchronous as a share of plain | {result["async_share_of_plain"]:.2f} |
| DCP's own writer on the same state, synced, nothing hashed: times our plain save | {result["writers"]["ratio"]["dcp"]:.2f} |
| a subclass of it that hashes what it writes: times our plain save | {result["writers"]["ratio"]["hashing"]:.2f} |

A save alone, each round (and the median of a rank's processor time):

{each_round(result["writers"])}

Each round in the loop: plain {", ".join(f"{value:.2f}" for value in result["lost_seconds_per_save"]["plain"])} s;
asynchronous {", ".join(f"{value:.2f}" for value in result["lost_seconds_per_save"]["async"])} s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--products", type=int, default=8, help="matrix products of one step")
    parser.add_argument("--directory", type=Path, help="where to save; a temporary directory by default")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/checkpoints.md")
    options = vars(parser.parse_args())
    write, directory = options.pop("write"), options.pop("directory")
    settings = Settings(**options)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shared: list[Any] = [tempfile.mkdtemp(dir=directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    run = RunDirectory(Path(shared[0]))
    try:
        result = measure(settings, run)
        result["writers"] = measure_writers(settings, run)
        if dist.get_rank() == 0:
            result["verification"] = measure_verification(run, settings.rounds)
            machine = (
                f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, Linux {platform.release()}"
            )
            result |= {"settings": asdict(settings), "world_size": dist.get_world_size(), "machine": machine}
            print(json.dumps(result, indent=2))
            if write:
                FIGURES.parent.mkdir(parents=True, exist_ok=True)
                FIGURES.write_text(report(result), encoding="utf-8")
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(run.path)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
