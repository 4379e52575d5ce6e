"""Whether `auto` picks a plan that fits and is fast: random jobs with random limits of memory, every plan
that fits timed on two ranks.

    launcher bench && python -m tests.benchmarks.bench_auto --seed 3 --count 30

For each job the planner decides with that much memory a rank. Then every recomputation, micro-batch and cut
that the formulas let fit is run for a few steps on real gloo ranks, and the fastest of them again beside the
chosen one. The peak of live tensor bytes of the chosen one is measured in a run of its own. Writes
docs/benchmarks/auto.md. The speed model counts with what `launcher bench` has measured of this machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))

from _report import conditions, sentence, table, write

from launcher.job.schema import EngineName, Job
from launcher.launch.malloc_env import LEAN, ROOMY
from launcher.planner.candidates import other_cuts
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.calibration import rates_for
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.limits import RECOMPUTATIONS, keeps_freed, recomputations
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import divisors, with_batch
from launcher.planner.search import plan_job
from launcher.planner.target import USABLE, Target
from launcher.runs.machine import Machine
from tests.benchmarks.memory_pool import World

RANKS, NUM_FIRST, NUM_STEPS, NUM_AGAIN = 2, 1, 3, 8
"""Steps that are not counted, those that are, and those of the fastest when they are run again."""
ENGINES: dict[str, tuple[EngineName, ...]] = {"fsdp": ("fsdp",), "auto": ("fsdp", "deepspeed")}
AGAIN, ROUNDS = 3, 4
"""The fastest that are run again beside the chosen one, and how often."""
HOPELESS = 1.6
"""A plan whose step takes so many times the fastest so far is run no further."""
PREFACE = """# Plans that the planner picks, against all that fit

`tests/benchmarks/bench_auto.py`: random jobs (decoders, 2 ranks of the CPU, fp32) with a random limit of memory a rank, between what the
engine and cut that is taken where memory is plenty needs at the least, and what it needs without recomputation. What `auto` chose is run
beside every other recomputation, micro-batch and cut that fits, in any order, each in ranks of its own that are started as launcher starts
them: three steps after the first. Then the three fastest of them and the chosen one are run again, in turns, four times, eight steps
each. A plan's time is the fastest of its steps, as neighbours on the machine only ever add to it (the same plan's steps differ by up to
a half here), and "fastest" is the fastest of those plans. With `parallel.engine: auto` the others are FSDP's and those of ZeRO-1, 2 and 3.
"""


def job_of(r: random.Random, directory: Path, engine: EngineName | Literal["auto"]) -> Job:
    """A random job; its model's config is written to `directory`."""
    from transformers import AutoConfig

    heads, family = r.choice((4, 6)), r.choice(("llama", "qwen3", "gpt2"))
    hidden, layers, words = heads * r.choice((32, 48)), r.randint(3, 6), r.choice((1000, 8000))
    if family == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "vocab_size": words,
            "n_positions": 512,
        }
    else:
        sizes = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": words,
        }
        sizes |= {
            "intermediate_size": hidden * r.choice((2, 3, 4)),
            "num_key_value_heads": heads // 2,
            "head_dim": hidden // heads,
        }
    AutoConfig.for_model(family, **sizes).save_pretrained(directory)
    content = {
        "name": "auto",
        "model": {"name": str(directory), "weights": "random"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": r.choice((64, 128, 256))},
        "batch": {"global_batch_size": RANKS * r.choice((2, 4))},
        "training": {"max_steps": 10},
        "precision": "fp32",
        "parallel": {"engine": engine},
    }
    return Job.model_validate(content)


def all_plans(job: Job, made: Plan, limit: int) -> list[Plan]:
    """Every plan that the job leaves room for and that fits by the formulas."""
    per_rank, found = made.batch.micro_batch_size * made.batch.accumulation_steps, []
    for variant in (variant for engine in ENGINES[job.parallel.engine] for variant in _variants(job, engine)):
        for way in recomputations(variant):
            for micro in divisors(per_rank):
                plan = with_batch(variant, micro, way)
                said = forecast_of(plan, Target(limit))
                if said is not None and said.fits:
                    found.append(plan)
    return found


def _variants(job: Job, engine: EngineName) -> list[Plan]:
    """Every cut of an engine."""
    pinned = job.model_copy(update={"parallel": job.parallel.model_copy(update={"engine": engine})})
    made = plan_job(pinned, RANKS, Hardware(2, 1 << 40))
    mesh = made.mesh.model_copy(update={"dp_replicate": 1, "dp_shard": RANKS, "reshard_after_forward": True})
    zero = made.zero and made.zero.model_copy(update={"stage": 3})
    least = made.model_copy(update={"sharding": "full", "mesh": mesh, "zero": zero})
    return [least, *(cut.plan for cut in other_cuts(pinned, least))]


def key_of(plan: Plan) -> tuple[str, str, int]:
    """Cut, recomputation and micro-batch."""
    cut = f"ZeRO-{plan.zero.stage}" if plan.zero else f"FSDP {plan.sharding}"
    return cut, plan.activation_checkpointing, plan.batch.micro_batch_size


def needs(job: Job) -> tuple[int, int]:
    """Bytes of a rank of the cut that is taken where memory is plenty: at the least, and where everything is
    kept."""
    made = plan_job(job, RANKS, Hardware(2, 1 << 40))
    per_rank = made.batch.micro_batch_size * made.batch.accumulation_steps
    sizes = []
    for micro, way in ((1, RECOMPUTATIONS[-1]), (per_rank, RECOMPUTATIONS[0])):
        said = forecast_of(with_batch(made, micro, way), Target())
        assert said is not None
        sizes.append(said.footprint.highest.total)
    return sizes[0], sizes[1]


def seconds_of(plan: Plan, limit: int, num_steps: int, hopeless: float = inf) -> float:
    """Of the fastest of a few steps of a plan, on ranks of their own that are started as a run's are; of the
    first where it is hopeless."""
    from launcher.render.deepspeed import config as deepspeed_config
    from launcher.training.fresh import in_fresh_ranks

    said = forecast_of(plan, Target(limit))
    assert said is not None
    allocator = ROOMY if keeps_freed(max(phase.peak for phase in said.footprint.phases), limit) else LEAN
    ds_config = deepspeed_config(plan) if plan.engine == "deepspeed" else {}
    return min(in_fresh_ranks(steps, (plan, ds_config, num_steps, hopeless), RANKS, allocator))


def steps(plan: Plan, ds_config: dict[str, Any], num_steps: int, hopeless: float) -> list[float]:
    """Seconds of the steps that count, on the rank that took longer."""
    import torch
    from torch import distributed
    from transformers import AutoConfig

    from launcher.training import engines
    from launcher.training.model import attention
    from tests.benchmarks.memory_ranks import Request
    from tests.benchmarks.memory_tasks import Causal

    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = engines.build(plan, Causal(), config, ds_config)  # type: ignore[arg-type]
    batch = Causal.batch(Request(plan, (plan.data.max_length,) * plan.batch.micro_batch_size), config)
    found: list[float] = []
    for _ in range(NUM_FIRST + num_steps):
        begun = time.perf_counter()
        for index in range(plan.batch.accumulation_steps):
            engine.micro_step(batch, 1e-3, index == plan.batch.accumulation_steps - 1)
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-4, 0.5)
        taken = torch.tensor(time.perf_counter() - begun)
        distributed.all_reduce(taken, distributed.ReduceOp.MAX)
        found.append(float(taken))
        if len(found) > NUM_FIRST and found[-1] > hopeless:
            break
    return found[NUM_FIRST:]


def peak(plan: Plan) -> int:
    """Bytes of live tensors at the highest moment of this rank's second step."""
    from tests.benchmarks.memory_ranks import Request, measure

    return int(
        measure(Request(plan, (plan.data.max_length,) * plan.batch.micro_batch_size))["peaks"]["steady step"]
    )


def drawn(
    number: int, r: random.Random, scratch: Path, engine: EngineName | Literal["auto"]
) -> tuple[Job, int]:
    """A job, and the memory of a rank that it has."""
    job = job_of(r, scratch / str(number), engine)
    lean, rich = needs(job)
    return job, int(r.uniform(lean * 1.02, max(lean * 1.05, rich * 1.1)) / USABLE["cpu"])


def compared(patient: World, number: int, job: Job, limit: int, order: random.Random) -> dict[str, Any]:
    """The chosen plan beside those that fit too, each in ranks of its own, in any order; memory in ranks that
    wait for gloo's threads."""
    chosen = plan_job(job, RANKS, Hardware(2, limit * RANKS))
    plans = all_plans(job, chosen, limit)
    keys = [key_of(plan) for plan in plans]
    own = keys.index(key_of(chosen))
    times = [inf] * len(plans)
    for index in order.sample(range(len(plans)), len(plans)):
        times[index] = seconds_of(plans[index], limit, NUM_STEPS, HOPELESS * min(times))
    measured = max(patient.call(peak, chosen))
    slowest = max(times)
    finalists = sorted({own, *sorted(range(len(plans)), key=times.__getitem__)[:AGAIN]})
    again: dict[int, list[float]] = {index: [] for index in finalists}
    for _ in range(ROUNDS):
        for index in order.sample(finalists, len(finalists)):
            again[index].append(seconds_of(plans[index], limit, NUM_AGAIN))
    finals = {index: min(times[index], *found) for index, found in again.items()}
    best = min(finals, key=finals.__getitem__)
    names = [" ".join(map(str, key)) for key in keys]
    return {
        "number": number, "engine": job.parallel.engine, "limit": limit, "measured": measured,
        "fits": measured <= limit, "chosen": keys[own], "fastest": keys[best], "plans": len(plans),
        "seconds": finals[own], "best": finals[best], "ratio": finals[own] / finals[best],
        "slowest": slowest / finals[best],
        "once": {name: round(seconds, 4) for name, seconds in zip(names, times, strict=True)},
        "again": {names[index]: [round(one, 4) for one in found] for index, found in again.items()},
        "planned": {name: round(planned(plan, limit), 4) for name, plan in zip(names, plans, strict=True)},
    }  # fmt: skip


def planned(plan: Plan, limit: int) -> float:
    """Seconds of a step by the speed model."""
    said = forecast_of(plan, Target(limit, rates_for(plan, Hardware(2, limit * RANKS))))
    assert said is not None and said.speed is not None
    return said.speed.step


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--engine", choices=ENGINES, default="fsdp", help="what the jobs ask for")
    parser.add_argument("--minutes", type=float, default=120, help="begin no further job after so long")
    parser.add_argument(
        "--keep", type=Path, default=None, help="JSON lines of jobs run before, which are not run again"
    )
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if Machine.read().of("cpu") is None:
        sys.exit("run `launcher bench` first: nothing is known of this machine's speed")
    found, generator, rows = conditions("torch", "transformers"), random.Random(options.seed), []
    kept = options.keep.read_text().splitlines() if options.keep and options.keep.exists() else []
    before = {row["number"]: row for row in map(json.loads, kept)}
    patient = World(RANKS)
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.monotonic()
        for number in range(options.count):
            if time.monotonic() - begun > 60 * options.minutes:
                break
            job, limit = drawn(number, generator, Path(scratch), options.engine)
            rows.append(
                before[number]
                if number in before
                else compared(patient, number, job, limit, random.Random(number))
            )
            print(json.dumps(rows[-1]), flush=True)
            if options.keep and number not in before:
                with open(options.keep, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    patient.close()
    if not options.dry:
        title = f"Seed {options.seed}, {len(rows)} jobs, engine {options.engine}"
        print(
            write(
                "auto", title, describe(rows, sentence(found)), {"conditions": found, "rows": rows}, PREFACE
            )
        )


def describe(rows: list[dict[str, Any]], under: str) -> str:
    """The section of the page."""
    near = sum(row["ratio"] <= 1.1 for row in rows)
    ratios = [row["ratio"] for row in rows]
    lines = [
        [row["number"], f"{row['measured'] / 2**20:.0f} of {row['limit'] / 2**20:.0f} MiB",
        " ".join(map(str, row["chosen"])),
         " ".join(map(str, row["fastest"])), row["plans"], f"{row['seconds']:.3f} s", f"{row['ratio']:.2f}",
         f"{row['slowest']:.2f}"]
        for row in rows
    ]  # fmt: skip
    header = [
        "job",
        "peak of its limit",
        "chosen (cut, recomputation, micro-batch)",
        "fastest",
        "plans",
        "a step",
        "x fastest",
        "slowest x",
    ]
    return (
        f"{under}\n\nWithin the limit: {sum(row['fits'] for row in rows)} of {len(rows)}. Within 10% "
        "of the fastest plan that fits: "
        f"{near}; median {statistics.median(ratios):.2f}, most {max(ratios):.2f}.\n\n{table(header, lines)}"
    )


if __name__ == "__main__":
    main()
