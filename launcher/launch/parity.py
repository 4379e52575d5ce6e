"""The same training steps in one process and under every engine, for comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigurationError, LauncherError
from launcher.job.load import load
from launcher.launch import local
from launcher.launch.screen import Watcher
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.render.files import NAMES, files
from launcher.render.launch_paths import Place
from launcher.render.write import write
from launcher.runs import events
from launcher.runs.failure import read
from launcher.runs.layout import RunDirectory, write_atomically

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""The allowed relative difference of loss and gradient norm, by precision."""
CASES: dict[str, list[str]] = {
    "FSDP": ["parallel.engine=fsdp", "parallel.shard=full"],
    "ZeRO-1": ["parallel.engine=deepspeed", "parallel.shard=optimizer"],
    "ZeRO-2": ["parallel.engine=deepspeed", "parallel.shard=gradients"],
    "ZeRO-3": ["parallel.engine=deepspeed", "parallel.shard=full"],
    "ZeRO-3 with CPU offload": [
        "parallel.engine=deepspeed",
        "parallel.shard=full",
        "memory.offload=optimizer",
    ],
}
SINGLE = "one process"
_COMMON = [
    "data.evaluation=null",
    "training.evaluate_every=null",
    "training.early_stopping=null",
    "training.epochs=null",
    "checkpoint.keep_best=0",
    "trackers=[]",
    "parallel.replicate=1",
    "parallel.secondary_shard=1",
    "parallel.quantized_weights=false",
    "parallel.quantized_gradients=false",
    "memory.offload_to=cpu",
    "model.compile=false",
]


@dataclass(frozen=True)
class Outcome:
    """The losses and gradient norms of one case by step, or why there are none."""

    name: str
    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    problem: str = ""

    def off_by(self, reference: Outcome) -> tuple[float, float]:
        """Return the largest relative differences of loss and gradient norm."""
        return _largest(self.losses, reference.losses), _largest(
            self.gradient_norms, reference.gradient_norms
        )


def _largest(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(one - other) / max(abs(other), 1e-12) for one, other in zip(ours, theirs, strict=True))


def outcomes(
    job: Path, num_ranks: int, num_steps: int, overrides: list[str], watcher: Watcher
) -> Iterator[Outcome]:
    """Yield the reference on one rank first, then each case on `num_ranks`, each a separate run in a scratch
    directory.

    Raises ConfigurationError if the job itself cannot run; a case that cannot is an outcome with the reason.
    """
    settings = [*overrides, *_COMMON, f"training.max_steps={num_steps}"]
    # Micro-batch and precision are decided once, so that every case computes the same.
    first = plan_job(load(job, [*settings, *CASES["FSDP"], "memory.offload=none"]), num_ranks)
    settings += [f"batch.micro_batch_size={first.batch.micro_batch_size}", f"precision={first.precision}"]
    if first.activation_checkpointing == "selective":
        settings.append("memory.activation_checkpointing=full")
    single = [*settings, "parallel.engine=fsdp", "parallel.shard=none", "memory.offload=none"]
    yield _outcome(SINGLE, plan_job(load(job, single), 1), watcher)
    for name, keys in CASES.items():
        try:
            plan = plan_job(load(job, [*settings, "memory.offload=none", *keys]), num_ranks)
        except ConfigurationError as error:
            yield Outcome(name, problem="; ".join(str(problem) for problem in error.problems))
            continue
        yield _outcome(name, plan, watcher)


def _outcome(name: str, plan: Plan, watcher: Watcher) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="launcher-parity-") as directory:
        run = RunDirectory(Path(directory))
        rendered = files(plan, Place(str(run.path), str(run.rendered), "python"))
        write(run.rendered, {name: text for name, text in rendered.items() if name != "plan.json"}, NAMES)
        write_atomically(run.plan_file, plan.to_json())
        code = local.run(run, plan, watcher, entry="launcher.training.parity_entry")
        if code == 0:
            records = [record for record in events.read(run.metrics_file) if record["kind"] == "train"]
            return Outcome(name, tuple(r["loss"] for r in records), tuple(r["grad_norm"] for r in records))
        failure = read(run.attempt(run.last_attempt()) / "failure.json")
        if failure is None:
            raise KeyboardInterrupt
        if failure.failure_class == LauncherError.failure_class and not failure.cause:
            raise KeyboardInterrupt
        return Outcome(name, problem=f"rank {failure.rank}: {failure.cause}")
