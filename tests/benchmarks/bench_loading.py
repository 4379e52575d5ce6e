"""Memory of each rank while it loads: no more than its own shard, 3% of the model, and the bare process.

    python tests/benchmarks/bench_loading.py

Makes up a model of about 1 GB in four safetensors files, then starts ranks that join a process group (bare)
and ranks that load as well, and watches the anonymous memory of each from outside.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import ROOT, MemoryMonitor, conditions, sentence, table, write

PREFACE = """# Memory while loading

`tests/benchmarks/bench_loading.py`: a Llama of made-up fp32 weights in four safetensors files, loaded by `launcher.training.model.loading.load` as
the trainer does. Peak anonymous memory of the rank that has most; pages of mapped files are not in it.
"""


def main() -> None:
    """Measure bare and loading ranks, and write the section; or, with --rank, be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", choices=("bare", "load"), help="used by the script itself")
    parser.add_argument("--model", type=Path, help="used by the script itself")
    parser.add_argument("--layers", type=int, default=20, help="of 13 million parameters each")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if options.rank:
        be_a_rank(options.rank, options.model)
        return
    found = conditions("torch", "transformers")
    figures: dict[str, Any] = {"conditions": found}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        subprocess.run(
            [sys.executable, "-c", MAKE, str(model), str(options.layers)], check=True, capture_output=True
        )
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        num_files = len(list(model.glob("*.safetensors")))
        for world_size in options.ranks:
            bare, loading = (peak(mode, model, world_size) for mode in ("bare", "load"))
            bound = bare + size / world_size + 0.03 * size
            figures[str(world_size)] = {"bare": bare, "loading": loading, "model": size, "bound": bound}
            shown = [f"{value / 2**30:.3f}" for value in (bare, size / world_size, loading, bound)]
            rows.append([world_size, *shown, "yes" if loading <= bound else "NO"])
    header = ["ranks", "bare GiB", "shard GiB", "peak GiB", "bound GiB", "within"]
    text = (
        f"{sentence(found)}\n\nModel: {size / 2**30:.2f} GiB in {num_files} files.\n\n{table(header, rows)}"
    )
    print(text)
    if not options.dry:
        print(write("loading", found["date"], text, figures, PREFACE))


MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=int(sys.argv[2]), num_attention_heads=16,
                     num_key_value_heads=16, vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=False)
model = LlamaForCausalLM(config)
size = sum(parameter.numel() * 4 for parameter in model.parameters())
model.save_pretrained(sys.argv[1], max_shard_size=int(size / 3.9))
"""


def peak(mode: str, model: Path, world_size: int) -> int:
    """Peak anonymous bytes of the rank that had most."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world_size}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    command = [sys.executable, *torchrun, __file__, f"--rank={mode}", f"--model={model}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    monitor = MemoryMonitor(process.pid)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors[-3000:])
    return max(monitor.largest(world_size)["anonymous"])


def be_a_rank(mode: str, model: Path) -> None:
    """Join the group; load as the trainer's engine does, where asked to."""
    import time

    import torch
    from torch import distributed

    from launcher.training.engines import fsdp

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    if mode == "load":
        from launcher.job.schema import Job
        from launcher.planner.search import plan_job as decide
        from launcher.tasks.causal_lm import CausalLM
        from launcher.training.model import loading as models
        from launcher.training.model import pretrained

        job = Job.model_validate(
            {
                "name": "loading",
                "model": {"name": str(model), "task": "causal-lm"},
                "data": {"train": {"path": "none.jsonl"}, "text": "text"},
                "batch": {"global_batch_size": distributed.get_world_size()},
                "precision": "fp32",
                "cluster": {"gpus_per_node": 0, "ranks_per_node": distributed.get_world_size()},
                "trackers": [],
            }
        )
        plan = decide(job)
        # Loading alone is measured: the optimizer's state is made after it, and is twice the shard.
        engine = fsdp.FsdpEngine(plan, CausalLM(plan.data), pretrained.read_config(plan), trains=False)
        # A shard may still be pages of the mapped file. The first step writes them, so they are written here
        # and count.
        with torch.no_grad():
            for parameter in engine.model.parameters():
                models.local_part(parameter).mul_(1.0)
    distributed.barrier()
    time.sleep(0.3)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
