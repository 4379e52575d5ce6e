"""Time of the check after loading, as real runs have it: two short rows, through the engine and alone through
the model's own class.

    python tests/benchmarks/bench_loss_check.py

Writes a Llama of 1.2 billion made-up weights to a temporary directory, trains it for one step in each
precision on one rank and on two, and reads from each run's events how long its check took. Every run is made
twice, in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import ROOT, conditions, sentence, table, write

PREFACE = """# The check after loading

`tests/benchmarks/bench_loss_check.py`: `launcher run` with a Llama of the size of Llama 3.2 1B and made-up weights; seconds of the check
that every run makes once before its first step, from the run's event `checked`.
"""
MODEL = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}  # fmt: skip
RUNS = [
    ("fsdp", 1, "fp32"),
    ("fsdp", 1, "bf16"),
    ("fsdp", 2, "fp32"),
    ("fsdp", 2, "bf16"),
    ("deepspeed", 2, "bf16"),
]


def make_model(directory: Path) -> None:
    """Save the model with made-up weights, and a tokenizer that knows some words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    sys.path.insert(0, str(ROOT))
    from tests.training.runs import texts, tokenizer, write_rows

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.data.fill_(
            1
        )
    model.save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    write_rows(directory / "rows.jsonl", [{"text": text} for text in texts(16)])


def seconds(directory: Path, engine: str, world_size: int, precision: str, number: int) -> float:
    """One run of one step; the seconds of its check. Only the last norm is trained, as Adam's state of all
    would not fit here."""
    name = f"{engine}-{world_size}-{precision}-{number}"
    job: dict[str, Any] = {
        "name": name,
        "model": {
            "name": "./model",
            "task": "causal-lm",
            "freeze": ["model.layers.*", "model.embed_tokens.*"],
        },
        "data": {"train": {"path": "rows.jsonl"}, "text": "text", "max_length": 64},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "training": {"max_steps": 1, "learning_rate": 1e-3},
        "parallel": {"engine": engine, "shard": "full"},
        "precision": precision,
        "cluster": {"gpus_per_node": 0, "ranks_per_node": world_size},
    }
    (directory / f"{name}.json").write_text(json.dumps(job), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("launcher")), "run", f"{name}.json", "--force"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
    events = (directory / "runs" / name / "events.jsonl").read_text(encoding="utf-8").splitlines()
    [checked] = [event for event in map(json.loads, events) if event["event"] == "checked"]
    subprocess.run(["rm", "-rf", directory / "runs" / name], check=True)
    return float(checked["seconds"])


def main() -> None:
    """Measure every engine and precision, and write the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    found = conditions("torch", "transformers", "deepspeed")
    times: dict[tuple[str, int, str], list[float]] = {run: [] for run in RUNS}
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory))
        for number in range(2):
            for run in RUNS:
                times[run].append(seconds(Path(directory), *run, number))
                print(*run, times[run][-1], flush=True)
    rows = [[*run, *(f"{each:.2f}" for each in found_here)] for run, found_here in times.items()]
    text = f"{sentence(found)}\n\n{table(['engine', 'ranks', 'precision', 'first run, s', 'second run, s'], rows)}"
    print(text)
    if not options.dry:
        figures = {
            "conditions": found,
            "seconds": {" ".join(map(str, run)): found_here for run, found_here in times.items()},
        }
        print(write("loss_check", found["date"], text, figures, PREFACE))


if __name__ == "__main__":
    main()
