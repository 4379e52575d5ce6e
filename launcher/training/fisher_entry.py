"""The ranks of `launcher evaluate --fisher`: the diagonal of a sharded model's Fisher information."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from launcher.errors import ConfigurationError, Problem, StorageError
from launcher.plain_files import read_json
from launcher.planner.plan import BatchPlan, Plan
from launcher.runs.layout import RunDirectory, make_directory, write_atomically
from launcher.runs.places import here
from launcher.tasks.task import Draws
from launcher.training import entry
from launcher.training.checkpoint.export import write_safetensors
from launcher.training.checkpoint.weights import Entry
from launcher.training.data.ahead import Loader
from launcher.training.data.batches import Batches
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order
from launcher.training.devices import start_process_group, to_device
from launcher.training.engines.around import part_of
from launcher.training.engines.engine import Engine
from launcher.training.evaluate_entry import Measuring
from launcher.training.evaluation import Interrupted
from launcher.training.model import adapters
from launcher.training.signals import StopRequest
from launcher.training.subject import Subject

_ONE = BatchPlan(global_batch_size=1, micro_batch_size=1, accumulation_steps=1, data_parallel_size=1)


class Fisher:
    """The squared gradient of each sample's loss, averaged over samples: fp32, sharded like the weights.

    The loss is the task's evaluation loss, summed over the sample's supervised positions. If it is the negative
    log-likelihood of the labels (texts, tags, one class of several), the mean is the empirical Fisher
    information. It is not for other losses: question answering averages start and end, multi-label
    classification averages over the labels, regression squares the error, several tasks share one loss, mixtures
    of experts add the routers' loss, and BLIP smooths as its config says.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap a loaded engine whose gradients are sharded (FSDP)."""
        self._engine = engine
        named = adapters.named_parameters(engine.model)
        self._trained = {name: one for name, one in named if one.requires_grad}
        self.means = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in self._trained.items()}

    def take(self, batch: Any, num_ranks: int, num_rows: int) -> None:
        """Add one sample of `num_rows`, the same on all ranks. Gradients are summed over ranks, so those of
        different samples could not be squared separately."""
        self._engine.micro_step(batch, 1 / num_ranks, last=True)
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                part_of(self.means[name]).add_(part_of(parameter.grad).float().square(), alpha=1 / num_rows)
        self._engine.zero_grad()

    def check(self) -> None:
        """Raise ConfigurationError on all ranks if a value is not finite. Called by all ranks together."""
        ends = [part_of(one).isfinite().all() for one in self.means.values()]
        finite = torch.stack(ends).all().to(torch.int32)
        distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        if not finite:
            reason = "a squared gradient is not finite: nothing is written; --set precision=fp32 may do"
            raise ConfigurationError(Problem("--fisher", None, reason))

    def entries(self) -> list[Entry]:
        """Return the entries of the file, in file order."""
        return [Entry(name, tuple(one.shape), torch.float32) for name, one in sorted(self.means.items())]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield one full tensor on the CPU. Called by all ranks together."""
        mean = self.means[name]
        yield (mean.full_tensor() if isinstance(mean, DTensor) else mean).cpu()

    def write(self, path: Path) -> None:
        """Write all means to one safetensors file. Called by all ranks together. Raises StorageError."""
        if distributed.get_rank() != 0:
            for one in self.entries():
                next(self.pieces(one.name))
            return
        try:
            make_directory(path.parent)
            temporary = path.with_name(f".{path.name}.new")
            with open(temporary, "wb") as file:
                write_safetensors(file, self, self.entries())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None


def estimate(own: Measuring, subject: Subject, engine: Engine, dataset: Dataset, num_rows: int) -> Fisher:
    """Return the Fisher information of a model over samples drawn with the job's seed. Raises Interrupted."""
    plan = subject.plan
    batches = Batches(dataset, Order(plan.training.seed, dataset.num_items), _ONE, 0, num_rows)
    loader = Loader(subject.task, batches, plan, lambda step: Draws(plan.training.seed, 0))
    fisher = Fisher(engine)
    engine.model.eval()  # no dropout, and the task's evaluation loss
    here.at("evaluating", total=num_rows)
    for row in range(num_rows):
        if own.stops():
            raise Interrupted
        batch = loader.batch(row, 0, batches.step(row).micro_batches[0])
        fisher.take(to_device(batch, plan.mesh.device), plan.batch.data_parallel_size, num_rows)
        here.moved(row + 1)
    return fisher


def measure(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Write the Fisher information of the model in request.json to the file named there, and fisher.json."""
    request = read_json(scratch.path / "request.json")
    if plan.data.evaluation is None:
        reason = "no rows to estimate on; name held-out rows in the job file, or a file with --on"
        raise ConfigurationError(Problem("data.evaluation", None, reason))
    run, model = (Path(request["run"]) if request["run"] else None), request["model"]
    # Gradients are squared per sample, and a packed sequence has several.
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"packing": False})})
    own, subject = Measuring(scratch, stop, 0, plan.training.seed), Subject.of(plan, run, model)
    dataset = own.dataset(subject, os.environ.get("RANK", "0") == "0")
    start_process_group(plan)
    num_rows, step, file = min(request["rows"], dataset.num_items), None, Path(request["file"])
    try:
        engine = own.engine(subject, dataset)
        if run is not None:
            step = subject.load(run, engine, request["step"])
            file = file.with_name(file.name.replace("STEP", f"{step:08d}"))
        if file.exists():
            reason = "is there already, maybe by other rows; move it away first"
            raise ConfigurationError(Problem("--fisher", str(file), reason))
        fisher = estimate(own, subject, engine, dataset, num_rows)
        fisher.check()
        fisher.write(file)
    except Interrupted:
        own.event(
            "stopped", step=0, line="stopped before all samples were seen; the same command begins anew"
        )
    else:
        if distributed.get_rank() == 0:
            result = {
                "file": str(file),
                "step": step,
                "rows": num_rows,
                "parameters": sum(one.numel() for one in fisher.means.values()),
            }
            write_atomically(scratch.path / "fisher.json", json.dumps(result) + "\n")
        own.event("finished", step=0, metrics={})
    distributed.barrier()


if __name__ == "__main__":
    entry.main(train=measure)
