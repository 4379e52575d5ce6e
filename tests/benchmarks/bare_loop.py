"""What our loop costs over a bare PyTorch loop that does the same mathematics on the same batches.

    python tests/benchmarks/bare_loop.py --data train.jsonl --rounds 3

`launcher run` and the bare loop (FSDP2 by hand, batches made beforehand, nothing recorded, saved or agreed upon) take turns. The losses of
both are compared as well: a loop that computes something else proves nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from _report import ROOT, conditions, sentence, table, write

PREFACE = """# What the loop costs

`tests/benchmarks/bare_loop.py` runs `launcher run` and a bare PyTorch loop over the same batches in turns, and compares the median
seconds of a step after the warm-up.
"""


def main() -> None:
    """Run both in turns and write the section; or, with --child, be a rank of the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion, or question and answer")
    parser.add_argument("--model", default=None, help="a model's directory; SmolLM2-135M where it is left out")
    for name, value in {"rounds": 3, "steps": 8, "warmup": 2, "max-length": 512, "micro-batch": 2, "accumulation": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--child", type=Path, metavar="RUN", help="used by the script itself")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if options.child:
        bare(options.child, options.steps)
    else:
        compare(options)


def compare(options: Namespace) -> None:
    """Alternate the two, check that their losses agree, and report the ratio of their times."""
    from bench_speed import NUM_RANKS, SIDES, launcher_command, prompts_and_completions

    from launcher.training.demo.models import model_directory

    options.model, options.set = options.model or str(model_directory("smollm2-135m")), []
    found, pairs = conditions("torch", "transformers"), []
    with tempfile.TemporaryDirectory() as scratch:
        data = prompts_and_completions(options.data, Path(scratch) / "rows.jsonl", 2000)
        for number in range(options.rounds):
            directory = Path(scratch) / str(number)
            directory.mkdir()
            subprocess.run(launcher_command(SIDES["launcher"], options, data, directory), check=True, cwd=ROOT, capture_output=True)
            ours = recorded(directory / "run" / "metrics.jsonl")
            torchrun = [
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={NUM_RANKS}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0",
            ]
            child = [sys.executable, *torchrun, __file__, f"--child={directory / 'run'}", f"--steps={options.steps}"]
            threads = str(max(1, (os.cpu_count() or 2) // NUM_RANKS))
            done = subprocess.run(
                child, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
            )
            theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
            worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            seconds = [median(side["seconds"][options.warmup - 1 :]) for side in (ours, theirs)]
            pairs.append({"launcher": seconds[0], "bare": seconds[1], "overhead": seconds[0] / seconds[1] - 1, "loss_difference": worst})
            print(json.dumps(pairs[-1]), flush=True)
    rows = [
        [number, f"{p['launcher']:.3f}", f"{p['bare']:.3f}", f"{p['overhead']:+.1%}", f"{p['loss_difference']:.1e}"]
        for number, p in enumerate(pairs, 1)
    ]
    cost = median(pair["overhead"] for pair in pairs)
    header = ["round", "launcher s/step", "bare s/step", "cost", "largest relative difference of a loss"]
    text = f"{sentence(found)}\n\n{table(header, rows)}\nMedian cost of the loop: {cost:+.1%}."
    if not options.dry:
        print(write("loop", f"{options.precision}, {found['date']}", text, {"conditions": found, "rounds": pairs}, PREFACE))


def recorded(metrics: Path) -> dict[str, list[float]]:
    """Losses, and the seconds from each step's end to the next's."""
    from launcher.runs.events import steps

    records = [record for _, record in sorted(steps(metrics).items())]
    times = [record["time"] for record in records]
    return {"losses": [record["loss"] for record in records], "seconds": [later - earlier for earlier, later in pairwise(times)]}


def bare(run: Path, num_steps: int) -> None:
    """FSDP2, AdamW and clipping by PyTorch itself, over the batches that the run's plan gives this rank."""
    import torch
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    from launcher.planning.plan import Plan
    from launcher.runs.layout import RunDirectory
    from launcher.training import attention, heads
    from launcher.training.data.batches import Batches
    from launcher.training.data.order import Order
    from launcher.training.schedule import Schedule
    from launcher.training.trainer import Material

    plan = Plan.read(run / "plan.json")
    material = Material.prepare(RunDirectory(run), plan)
    torch.set_num_threads(plan.mesh.threads_per_rank)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    order = Order(plan.training.seed, material.train.num_items, shuffle=True)
    source = Batches(material.train, order, plan.batch, rank, num_steps * plan.batch.global_batch_size)
    steps = [source.step(step) for step in range(num_steps)]
    batches = [[material.task.collate(items) for items in step.micro_batches] for step in steps]

    model = AutoModelForCausalLM.from_pretrained(
        plan.model.name, dtype=torch.float32, attn_implementation=attention.register(plan.attention)
    ).train()
    policy = MixedPrecisionPolicy({"bf16": torch.bfloat16, "fp32": torch.float32}[plan.precision], torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy, reshard_after_forward=plan.mesh.reshard_after_forward)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    model.forward = functools.partial(heads.causal_lm, model)
    parameters = list(model.parameters())
    settings = plan.training
    optimizer = torch.optim.AdamW(parameters, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True)
    schedule = Schedule.of(settings, num_steps)

    result: dict[str, Any] = {"losses": [], "seconds": []}
    ended = 0.0
    for number, (step, micro_batches) in enumerate(zip(steps, batches, strict=True)):
        loss_sum = torch.zeros(())
        for index, batch in enumerate(micro_batches):
            model.set_requires_gradient_sync(index == len(micro_batches) - 1)
            output = model(batch)
            (output.loss_sum * (size / step.num_supervised)).backward()
            loss_sum += output.loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(loss_sum)
        result["losses"].append(float(loss_sum) / step.num_supervised)
        result["seconds"] += [time.perf_counter() - ended] if ended else []
        ended = time.perf_counter()
    if rank == 0:
        print(json.dumps(result), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
