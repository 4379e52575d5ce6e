"""Time of the check after loading, as real runs have it: two short rows, through the engine and alone through
the model's own class.

    python tests/benchmarks/bench_loss_check.py

Writes a Llama of 1.2 billion made-up weights to a temporary directory and trains it for one step in each
precision on one rank and on two. From each run's events it reads how long its check took, and how long it was
from the beginning of the check to the end of the first step. The latter is measured without the check too: the
check gathers what the first step would gather otherwise. Every run is made twice, in turns.
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

PREFACE = """# The check after loading

`tests/benchmarks/bench_loss_check.py`: `launcher run` with a Llama of the size of Llama 3.2 1B and made-up weights; seconds of the check
that every run makes once before its first step, from the run's event `checked`.
"""
WITHOUT = '''"""Take the check out of a run: each process of Python that finds this file reads it as it starts."""

import importlib.util
import sys

NAME = "launcher.training.model.loss_check"


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def changed(module):
            execute(module)
            module.check_loss = lambda *arguments: None

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Finder())
'''
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


def seconds(
    directory: Path, engine: str, world_size: int, precision: str, number: int, with_check: bool = True
) -> tuple[float, float]:
    """Make a run of one step; return the seconds of its check, and those from its beginning to the end of the
    step. Only the last norm is trained, as Adam's state of all would not fit here."""
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
    (directory / "without").mkdir(exist_ok=True)
    (directory / "without" / "sitecustomize.py").write_text(WITHOUT, encoding="utf-8")
    path = [os.environ.get("PYTHONPATH", ""), *([] if with_check else [str(directory / "without")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True, env=environment)
    run = directory / "runs" / name
    events, steps = (
        [json.loads(line) for line in (run / file).read_text(encoding="utf-8").splitlines()]
        for file in ("events.jsonl", "metrics.jsonl")
    )
    [began] = [event["time"] for event in events if event.get("phase") == "checking the loss"]
    [*checked] = [event["seconds"] for event in events if event["event"] == "checked"]
    subprocess.run(["rm", "-rf", run], check=True)
    assert len(checked) == with_check
    return sum(checked), steps[0]["time"] - began


def main() -> None:
    """Measure every engine and precision, and write the section."""
    options = parser(__doc__).parse_args()
    found = conditions("torch", "transformers", "deepspeed")
    times: dict[tuple[str, int, str], list[float]] = {run: [] for run in RUNS}
    costs: dict[tuple[str, int, str], list[float]] = {run: [] for run in RUNS}
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory))
        for number in range(2):
            for run in RUNS:
                check, with_check = seconds(Path(directory), *run, number)
                _, without = seconds(Path(directory), *run, number, with_check=False)
                times[run].append(check)
                costs[run].append(with_check - without)
                print(
                    *run, f"{check:.2f} s, of which the run is longer by {costs[run][-1]:.2f} s", flush=True
                )
    rows = [
        [*run, *(", ".join(f"{each:.2f}" for each in figures[run]) for figures in (times, costs))]
        for run in RUNS
    ]
    columns = ["engine", "ranks", "precision", "check, s", "run longer by, s"]
    text = f"{sentence(found)}\n\n{table(columns, rows)}"
    print(text)
    if not options.dry:
        figures = {
            "conditions": found,
            "seconds": {" ".join(map(str, run)): each for run, each in times.items()},
            "longer": {" ".join(map(str, run)): each for run, each in costs.items()},
        }
        print(write("loss_check", found["date"], text, figures, PREFACE))


if __name__ == "__main__":
    main()
