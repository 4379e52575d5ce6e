"""Time of the check after loading: two short rows through the engine and each alone through the model's own class.

    python tests/benchmarks/bench_loss_check.py

Makes up a Llama of 1.2 billion parameters, cut over the ranks of this machine by each engine and in each precision, and checks its loss
five times. The first time is what a run pays.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

from _report import ROOT, conditions, sentence, table, write

PREFACE = """# The check after loading

`tests/benchmarks/bench_loss_check.py`: `launcher.training.loss_check.check_loss` on a Llama of the size of Llama 3.2 1B with made-up
weights, as every run does it once before its first step. `first` is what a run pays; `again` is the median of four more.
"""
MODEL = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def seconds(precision: str, engine: str, world_size: int) -> list[float]:
    """On one rank: the seconds of five checks. The fault that the check looks for is not there."""
    import sys

    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    from launcher.render.deepspeed import config as deepspeed_config
    from launcher.training import engines, loss_check, pretrained, tasks
    from launcher.training.data.dataset import Sample
    from tests.training.plans import deepspeed, plan_of
    from tests.training.runs import batch_of

    torch.set_num_threads(2 // world_size)
    changes = deepspeed(3) if engine == "ZeRO-3" else {}
    plan = plan_of(
        Path("none"),
        world_size,
        precision=precision,
        batch=batch_of(world_size, 2),
        model__config=MODEL,
        model__weights="random",
        **changes,
    )
    task = tasks.unbound(plan)
    engine_ = engines.build(plan, task, pretrained.read_config(plan), deepspeed_config(plan) if changes else {})

    class Rows:
        num_items = 2

        @staticmethod
        def item(index: int) -> list[Sample]:
            ids = np.random.default_rng(index).integers(0, MODEL["vocab_size"], 200).astype(np.int32)  # type: ignore[arg-type]
            return [Sample({"input_ids": ids, "targets": np.append(ids[1:], -100).astype(np.int32)}, index)]

    found = []
    for _ in range(5):
        began = time.monotonic()
        loss_check.check_loss(engine_, task, Rows(), plan, lambda name, **fields: None)  # type: ignore[arg-type]
        found.append(time.monotonic() - began)
    return found


def main() -> None:
    """Measure every engine and precision, and write the section."""
    import sys

    sys.path.insert(0, str(ROOT))
    from tests.training.ranks import on_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    found = conditions("torch", "transformers", "deepspeed")
    rows, figures = [], dict[str, Any](conditions=found)
    for engine, world_size, precision in [("FSDP", 1, "fp32"), ("FSDP", 1, "bf16"), ("FSDP", 2, "bf16"), ("ZeRO-3", 2, "bf16")]:
        with contextlib.suppress(ImportError):
            times = [max(each) for each in zip(*on_ranks(world_size, seconds, precision, engine, world_size), strict=True)]
            figures[f"{engine} {world_size} {precision}"] = times
            rows.append([engine, world_size, precision, f"{times[0]:.2f}", f"{sorted(times[1:])[1]:.2f}"])
    text = f"{sentence(found)}\n\n{table(['engine', 'ranks', 'precision', 'first, s', 'again, s'], rows)}"
    print(text)
    if not options.dry:
        print(write("loss_check", found["date"], text, figures, PREFACE))


if __name__ == "__main__":
    main()
