"""What a rank of the CPU takes for a step, and holds, by how its memory is given and taken back.

    python -m tests.benchmarks.bench_allocator --rounds 2

A model as wide as SmolLM2-135M, of 6 layers with random weights, FSDP on two ranks, fp32, 256 tokens: each
way in fresh ranks, all ways in turns, every other round backwards. Writes docs/benchmarks/allocator.md.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _report import conditions, sentence, table, write

from launcher.launch.malloc_env import LEAN, ROOMY
from launcher.planner.plan import Plan
from launcher.training.fresh import in_fresh_ranks
from tests.training.plans import plan_of

RANKS, LENGTH, NUM_STEPS = 2, 256, 2
HUGE = "THP_MEM_ALLOC_ENABLE"
WAYS = {
    "given back": {name: value for name, value in LEAN.items() if name != HUGE},
    "given back, huge pages": LEAN,
    "kept": {name: value for name, value in ROOMY.items() if name != HUGE},
    "kept, huge pages": ROOMY,
}
PREFACE = """# Memory of ranks on a CPU: what giving it back costs

`tests/benchmarks/bench_allocator.py`: a model as wide as SmolLM2-135M, of 6 layers with random weights, FSDP on 2 ranks of the CPU,
fp32, 256 tokens a pass, 2 passes a step. "Given back": glibc returns blocks from 2 MiB on when they are freed; "kept": those below 4 MiB
stay with the rank, and what is given back goes later (`launcher/launch/malloc_env.py`). "Huge pages": PyTorch asks the system for
pages of 2 MiB under tensors of 2 MiB and more, which does something where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise`.
Each way runs in fresh ranks, all ways in turns. A page fault is one page that the system had to find and zero.
"""


def steps(plan: Plan, num_steps: int) -> list[list[float]]:
    """Of each step after the first: its seconds and this rank's page faults; last, the rank's highest
    resident bytes."""
    from transformers import AutoConfig

    from launcher.training import engines
    from launcher.training.model import attention
    from tests.benchmarks.memory_ranks import Request
    from tests.benchmarks.memory_tasks import Causal

    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = engines.build(plan, Causal(), config, {})  # type: ignore[arg-type]
    batch = Causal.batch(Request(plan, (LENGTH,)), config)
    found = []
    for _ in range(num_steps + 1):
        faults, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for index in range(plan.batch.accumulation_steps):
            engine.micro_step(batch, 1e-3, index == plan.batch.accumulation_steps - 1)
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-4, 0.5)
        found.append(
            [time.perf_counter() - begun, float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)]
        )
    highest = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return [*found[1:], [1024.0 * int(highest.split()[1])]]


def plan_with(directory: Path, recomputing: str) -> Plan:
    """The plan of two ranks."""
    changes = {
        "batch__micro_batch_size": 1, "batch__accumulation_steps": 2, "batch__global_batch_size": 2 * RANKS,
        "model__weights": "random",
        "activation_checkpointing": recomputing, "sharding": "full", "data__max_length": LENGTH,
        "precision": "fp32",
    }  # fmt: skip
    return plan_of(directory, RANKS, **changes)


def main() -> None:
    """Run, print, write."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found, raw = conditions("torch", "transformers"), {}
    sizes = {
        "hidden_size": 576,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    }
    with tempfile.TemporaryDirectory() as scratch:
        AutoConfig.for_model("llama", vocab_size=49152, tie_word_embeddings=True, **sizes).save_pretrained(
            scratch
        )
        for recomputing in ("full", "none"):
            plan = plan_with(Path(scratch), recomputing)
            for turn in range(options.rounds):
                for name in list(WAYS)[:: -1 if turn % 2 else 1]:
                    raw.setdefault(f"{recomputing}, {name}", []).append(
                        in_fresh_ranks(steps, (plan, NUM_STEPS), RANKS, WAYS[name])
                    )
                    print(recomputing, name, raw[f"{recomputing}, {name}"][-1], flush=True)
    title = f"{options.rounds} rounds of {NUM_STEPS} steps"
    print(write("allocator", title, f"{sentence(found)}\n\n{_table(raw)}", {"steps": raw} | found, PREFACE))


def _table(raw: dict[str, list[Any]]) -> str:
    rows = []
    for name, rounds in raw.items():
        recomputing, way = name.split(", ", 1)
        seconds = statistics.median(step[0] for one in rounds for step in one[:-1])
        first = statistics.median(
            step[0] for one in raw[f"{recomputing}, {next(iter(WAYS))}"] for step in one[:-1]
        )
        faults = statistics.median(step[1] for one in rounds for step in one[:-1])
        highest = max(one[-1][0] for one in rounds) / 2**30
        rows.append(
            [
                recomputing,
                way,
                f"{seconds:.2f} s",
                f"{seconds / first:.2f}",
                f"{faults:,.0f}",
                f"{highest:.2f} GiB",
            ]
        )
    return table(
        [
            "recomputation",
            "freed memory is",
            "a step, median",
            "x the first",
            "page faults",
            "rank 0's peak, resident",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
