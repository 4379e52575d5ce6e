"""Memory that a rank of the CPU holds as samples of ever new lengths come, in bf16.

    python tests/benchmarks/bench_many_lengths.py

`launcher run` on one rank with a Llama of 90,000 made-up weights and rows of 10 to 64 tokens, 300 steps: with the
variables that launcher sets, and with the defaults of oneDNN and PyTorch in their place, in turns. Writes
docs/benchmarks/many_lengths.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import ROOT, conditions, parser, sentence, table, write

PREFACE = """# Samples of many lengths on a CPU

`tests/benchmarks/bench_many_lengths.py`: `launcher run` with a Llama of 90,000 weights in bf16 on one rank of the CPU, 8 rows of up to 64
tokens a step, in two packed passes. oneDNN makes code for every shape of a product. "Kept" is how many shapes it and PyTorch each keep.
The peak is the rank's highest resident memory.
"""
WAYS = {"128, as launcher sets it": "128", "1,024, the default": "1024"}
NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
LOOKED_AT = (1, 20, 50, 100, 200, 300)


def make_inputs(directory: Path) -> None:
    """Save the model, its tokenizer and the rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.training.runs import texts, tokenizer, write_rows

    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=124,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    write_rows(directory / "rows.jsonl", [{"text": text} for text in texts(4000)])


def steps(directory: Path, capacity: str) -> list[dict[str, Any]]:
    """Make a run and return the records of its steps."""
    job = {
        "name": "lengths",
        "model": {"name": "./model", "task": "causal-lm"},
        "data": {"train": {"path": "rows.jsonl"}, "text": "text", "max_length": 64},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "training": {"max_steps": LOOKED_AT[-1], "learning_rate": 1e-3},
        "parallel": {"engine": "fsdp"},
        "precision": "bf16",
        "cluster": {"gpus_per_node": 0, "ranks_per_node": 1},
    }
    (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("launcher")), "run", "job.json", "--force"]
    environment = {**os.environ, **dict.fromkeys(NAMES, capacity)}
    subprocess.run(command, cwd=directory, check=True, capture_output=True, env=environment)
    run = directory / "runs" / "lengths"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    subprocess.run(["rm", "-rf", run], check=True)
    return [record for record in records if record["kind"] == "train"]


def main() -> None:
    """Measure both ways twice, and write the page."""
    options = parser(__doc__).parse_args()
    found = conditions("torch", "transformers")
    figures: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory))
        for _ in range(2):
            for way, capacity in WAYS.items():
                records = steps(Path(directory), capacity)
                peaks = {step: records[step - 1]["peak_memory_bytes"] for step in LOOKED_AT}
                seconds = records[-1]["time"] - records[0]["time"]
                figures[way].append({"peaks": peaks, "seconds": seconds})
                print(way, {step: peak >> 20 for step, peak in peaks.items()}, f"{seconds:.1f} s", flush=True)
    rows = [
        [
            way,
            *(", ".join(f"{run['peaks'][step] / 2**20:.0f}" for run in runs) for step in LOOKED_AT),
            ", ".join(f"{run['seconds']:.1f}" for run in runs),
        ]
        for way, runs in figures.items()
    ]
    columns = ["shapes kept", *(f"peak at step {step}, MiB" for step in LOOKED_AT), "300 steps, s"]
    text = f"{sentence(found)}\n\n{table(columns, rows)}"
    print(text)
    if not options.dry:
        print(write("many_lengths", found["date"], text, {"conditions": found, "runs": figures}, PREFACE))


if __name__ == "__main__":
    main()
