"""What our loop costs over a bare PyTorch loop that does the same mathematics on the same batches.

    python -m tests.benchmarks.bare_loop --data train.jsonl --pairs 20

Both loops run in the same two ranks, over the same FSDP2 model, batches and optimizer, a step of one and a
step of the other in turns (who is first changes each time): the speed of a machine that others share changes
by more than what is looked for between two runs. The learning rate is 0, so that both compute on the same
parameters, and their losses and gradient norms have to agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _report import ROOT, conditions, sentence, table, write

PREFACE = """# What the loop costs

`python -m tests.benchmarks.bare_loop`: the trainer's own step, whole (batches read and put together, heartbeat, records, agreement over
all ranks, fp64 norms), and a bare PyTorch step (batches made beforehand, `clip_grad_norm_`, nothing recorded, saved or agreed upon) take
turns in the same ranks, over the same model, batches and optimizer. The cost is the median of the pairs' ratios; the interval holds 95% of
the medians of 10,000 resamplings of the pairs.
"""
RESULT = "pairs.json"


def main() -> None:
    """Prepare a run, have its ranks take turns, and write the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="JSON lines with prompt and completion, or question and answer",
    )
    parser.add_argument(
        "--model", default=None, help="a model's directory; SmolLM2-135M where it is left out"
    )
    for name, value in {"pairs": 20, "max-length": 512, "micro-batch": 2, "accumulation": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    options.steps, options.set, options.launcher_micro_batch = 4, ["training.max_steps=4"], None
    found = conditions("torch", "transformers")
    pairs = compare(options)
    text = describe(pairs, sentence(found))
    print(text)
    if not options.dry:
        model = Path(options.model).name if options.model else "SmolLM2-135M"
        title = (
            f"{model}, {options.precision}, {options.micro_batch} x {options.accumulation} packs of "
            f"{options.max_length} tokens a rank"
        )
        print(write("loop", title, text, {"conditions": found, "pairs": pairs}, PREFACE))


def compare(options: Namespace) -> list[dict[str, float]]:
    """Run the ranks, and give what rank 0 has measured."""
    from bench_speed import SIDES, launcher_command, prompts_and_completions

    from launcher.launch import local, run_setup
    from launcher.training.demo.models import model_directory

    options.model = options.model or str(model_directory("smollm2-135m"))
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["LOOP_PAIRS"] = str(options.pairs)
    with tempfile.TemporaryDirectory() as scratch:
        data = prompts_and_completions(options.data, Path(scratch) / "rows.jsonl", 2000)
        launcher_command(SIDES["launcher-packed"], options, data, Path(scratch))
        run, plan = run_setup.open_run(Path(scratch) / "job.yaml", options.set, None, Path(scratch) / "run")
        local.run(run, plan, entry="tests.benchmarks.bare_loop_ranks")
        return list(json.loads((run.path / RESULT).read_text(encoding="utf-8")))


def take_turns(run: Any, plan: Any, attempt: int, stop: Any, *, stop_at: int | None = None) -> None:
    """What each rank does in place of training."""
    from torch import distributed

    from launcher.training.devices import start_process_group
    from launcher.training.trainer import Trainer, TrainingInputs

    material = TrainingInputs.prepare(run, plan)
    device = start_process_group(plan)
    rank = distributed.get_rank()
    trainer = Trainer(run, plan, material, device, stop, stop_at, run.attempt(attempt))
    trainer.schedule = SimpleNamespace(at=lambda step: 0.0)  # type: ignore[assignment]
    steps = [trainer.batches.step(number) for number in range(trainer.num_steps)]
    batches = [[material.task.collate(items) for items in step.micro_batches] for step in steps]
    heard: dict[str, float] = {}
    _hear(trainer, heard)
    pairs = []
    for number in range(int(os.environ["LOOP_PAIRS"]) + 1):
        index = number % len(steps)
        sides = {
            "ours": lambda i=index: _ours(trainer, i, heard),
            "bare": lambda i=index: _bare(trainer, steps[i], batches[i]),
        }
        pair: dict[str, float] = {}
        for name in sorted(sides, reverse=number % 2 == 0):
            distributed.barrier()
            begun, used = time.perf_counter(), time.process_time()
            loss, norm = sides[name]()
            pair |= {f"{name}_processor": time.process_time() - used}
            distributed.barrier()
            pair |= {name: time.perf_counter() - begun, f"{name}_loss": loss, f"{name}_norm": norm}
        pairs.append(pair)
    if rank == 0:
        (run.path / RESULT).write_text(
            json.dumps(pairs[1:]), encoding="utf-8"
        )  # the first one made the optimizer's state
        run.finished_file.touch()
    distributed.barrier()


def _hear(trainer: Any, heard: dict[str, float]) -> None:
    """Note what the trainer's step makes of loss and gradient norm."""
    judge = trainer.divergence.judge

    def noting(step: int, loss: float, norm: float, scale: Any) -> Any:
        heard.update(loss=loss, norm=norm)
        return judge(step, loss, norm, scale)

    trainer.divergence.judge = noting


def _ours(trainer: Any, number: int, heard: dict[str, float]) -> tuple[float, float]:
    trainer.state.step = number
    trainer._step()
    return heard["loss"], heard["norm"]


def _bare(trainer: Any, step: Any, batches: list[Any]) -> tuple[float, float]:
    """Forward, backward, clipping and AdamW by PyTorch itself."""
    import torch
    from torch import distributed
    from torch.distributed.tensor import DTensor

    model, optimizer = trainer.engine.model, trainer.engine._optimizer
    parameters = list(model.parameters())
    loss_sum = torch.zeros(())
    for index, batch in enumerate(batches):
        model.set_requires_gradient_sync(index == len(batches) - 1)
        output = model(batch)
        (output.loss_sum * (distributed.get_world_size() / step.num_supervised)).backward()
        loss_sum += output.loss_sum.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, trainer.plan.training.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    model.zero_grad(set_to_none=True)
    distributed.all_reduce(loss_sum)
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(loss_sum) / step.num_supervised, float(whole)


def describe(pairs: list[dict[str, float]], under: str) -> str:
    """The section: medians, the interval, and whether both computed the same."""
    rows = []
    for title, ending in (("time", ""), ("processor time of a rank", "_processor")):
        ours, bare = ([pair[side + ending] for pair in pairs] for side in ("ours", "bare"))
        ratios = [one / other for one, other in zip(ours, bare, strict=True)]
        low, high = interval(ratios)
        more = statistics.median(one - other for one, other in zip(ours, bare, strict=True))
        rows.append(
            [title, f"{statistics.median(ours):.3f} s", f"{statistics.median(bare):.3f} s",
            f"{1000 * more:+.0f} ms",
             f"{statistics.median(ratios) - 1:+.2%}", f"{low - 1:+.2%} to {high - 1:+.2%}"]
        )  # fmt: skip
    apart = [
        max(abs(pair[f"ours_{what}"] / pair[f"bare_{what}"] - 1) for pair in pairs)
        for what in ("loss", "norm")
    ]
    header = ["of a step", "launcher", "bare", "difference", "cost", "95% interval"]
    return (
        f"{under} {len(pairs)} pairs; largest relative difference of a loss {apart[0]:.1e}, of a "
        f"gradient norm {apart[1]:.1e}."
        f"\n\n{table(header, rows)}"
    )


def interval(ratios: list[float], resamplings: int = 10_000) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the median under resampling."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(resamplings))
    return medians[round(0.025 * resamplings)], medians[round(0.975 * resamplings) - 1]


if __name__ == "__main__":
    main()
