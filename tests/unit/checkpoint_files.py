"""Checkpoints made of random bytes, with true manifests: what the torch-free half works on."""

from __future__ import annotations

import random
from pathlib import Path

from launcher.runs.checkpoints import FileRecord, Manifest, Progress, hash_file
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import commit

SIZES = {".metadata": 700, "__0_0.distcp": 20_000, "__1_0.distcp": 9_000}


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.checkpoints.mkdir(parents=True)
    run.run_id()
    return run


def write_checkpoint(run: RunDirectory, step: int, metrics: dict[str, float] | None = None) -> Path:
    """A whole checkpoint whose bytes follow from the run's name and the step."""
    generator = random.Random(f"{run.path.name} {step}")
    attempt = run.checkpoints / f".attempt-{step:08d}-test"
    attempt.mkdir()
    for name, size in SIZES.items():
        (attempt / name).write_bytes(generator.randbytes(size))
    manifest = Manifest(
        run_id=run.run_id(),
        step=step,
        engine="fsdp",
        world_size=2,
        mesh={"replicate": 1, "shard": 2},
        plan_digest="0123456789abcdef",
        created=1.5,
        progress=Progress(step=step, samples=8 * step, tokens=9 * step),
        metrics=metrics or {},
        files={
            name: FileRecord(bytes=size, xxh3_128=hash_file(attempt / name)) for name, size in SIZES.items()
        },
    )
    return commit(run, attempt, manifest)
