"""What it saves to leave parameters whole between the micro-batches of a step, under FSDP on two ranks of the
CPU.

    python -m tests.benchmarks.bench_gathering

The engine as it is, and with each pass letting go of everything as FSDP does by itself, in turns on the same
ranks. Writes docs/benchmarks/gathering.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _report import conditions, sentence, table, write

from launcher.launch.malloc_env import LEAN
from launcher.planner.plan import Plan
from tests.benchmarks.memory_pool import World
from tests.training.plans import plan_of

RANKS, LENGTH, ACCUMULATION = 2, 128, 4
PREFACE = """# Parameters left whole between micro-batches

`python -m tests.benchmarks.bench_gathering`: a Llama of 6 layers of 384 and 8,000 words, fp32, two ranks of the CPU, 4 micro-batches of 128
tokens a step. "each pass" lets go of all parameters after every backward pass, as FSDP does by itself; "once a step" is what launcher's
engine does. Medians of steps taken in turns.
"""


def seconds(plan: Plan, rounds: int) -> list[list[float]]:
    """Of steps on this rank: letting go after each pass, and once a step."""
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
    kept = type(engine.model).set_reshard_after_backward
    found: list[list[float]] = [[], []]
    for turn in range(2 * rounds + 2):
        way = turn % 2
        type(engine.model).set_reshard_after_backward = kept if way else lambda *arguments, **options: None
        began = time.perf_counter()
        for index in range(ACCUMULATION):
            engine.micro_step(batch, 1e-3, index == ACCUMULATION - 1)
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-4, 0.5)
        if turn > 1:
            found[way].append(time.perf_counter() - began)
    return found


def plans(directory: Path) -> dict[str, Plan]:
    """Full sharding, and parameters that stay whole."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1024,
    }
    AutoConfig.for_model("llama", vocab_size=8000, **sizes).save_pretrained(directory)
    batch = {
        "micro_batch_size": 1,
        "accumulation_steps": ACCUMULATION,
        "global_batch_size": RANKS * ACCUMULATION,
    }
    changes = {f"batch__{key}": value for key, value in batch.items()} | {"model__weights": "random"}
    return {
        cut: plan_of(directory, RANKS, sharding=cut, mesh__reshard_after_forward=cut == "full", **changes)
        for cut in ("full", "gradients")
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.environ.update(LEAN)
    found, rows, raw = conditions("torch", "transformers"), [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for cut, plan in plans(Path(scratch)).items():
            world = World(RANKS, times=True)
            each, once = world.call(seconds, plan, options.rounds)[0]
            world.close()
            raw[cut] = {"each pass": each, "once a step": once}
            ratios = sorted(a / b for a, b in zip(each, once, strict=True))
            spread = (
                f"{statistics.median(ratios):.2f} ({ratios[len(ratios) // 10]:.2f} to "
                f"{ratios[-1 - len(ratios) // 10]:.2f})"
            )
            rows.append([cut, f"{statistics.median(each):.3f} s", f"{statistics.median(once):.3f} s", spread])
    header = ["`parallel.shard`", "each pass", "once a step", "each / once, of pairs (tenth to ninetieth)"]
    print(
        write(
            "gathering",
            f"{options.rounds} rounds",
            f"{sentence(found)}\n\n{table(header, rows)}",
            {"seconds": raw} | found,
            PREFACE,
        )
    )


if __name__ == "__main__":
    main()
