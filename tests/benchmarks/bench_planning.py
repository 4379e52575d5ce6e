"""How long `launcher plan` takes for very large models, and what memory it needs itself.

python tests/benchmarks/bench_planning.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from _report import ROOT, conditions, sentence, table, write
from bench_startup import imports_torch

NUM_RUNS, NUM_TRACES = 12, 3
TARGET, TRACE_TARGET = 0.5, 10.0
LARGEST = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
COMMON = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
JOB = """name: planned
model: {{name: model, weights: random, config: {config}}}
data: {{train: {{path: rows.jsonl}}, text: text, max_length: {length}}}
batch: {{global_batch_size: {samples}}}
training: {{max_steps: 1000}}
cluster: {{nodes: {nodes}, gpus_per_node: 8}}
"""
PREFACE = """# Time that planning takes

`tests/benchmarks/bench_planning.py`: whole processes of `launcher plan --gpu h100-80gb`, one after another, begun with Python's bytecode at
hand: an installed package has it, a clone from the second command on. `first command of a clone` has that of the libraries alone.
"""


class Case(NamedTuple):
    """One command, and how it is run."""

    name: str
    sizes: dict[str, int]
    length: int
    nodes: int
    arguments: tuple[str, ...] = ()
    compiled: bool = True
    target: float = TARGET
    num_runs: int = NUM_RUNS


CASES = (
    Case("405B, 16,384 GPUs, samples of 4,096", LARGEST, 4096, 2048),
    Case("the same, `--json`", LARGEST, 4096, 2048, ("--json",)),
    Case("samples of 8,192: FSDP does not fit, ZeRO is gone through too", LARGEST, 8192, 2048),
    Case("the same, first command of a clone", LARGEST, 8192, 2048, compiled=False),
    Case("70B, 64 GPUs, `--trace`", LARGE, 4096, 8, ("--trace",), target=TRACE_TARGET, num_runs=NUM_TRACES),
)


def main() -> None:
    """Time each case and write the section."""
    found = conditions("pydantic", "torch", "transformers")
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            arguments = ["plan", str(written(case, Path(scratch))), "--gpu", "h100-80gb", *case.arguments]
            runs = measured(case, arguments, Path(scratch))
            torch = imports_torch(arguments)
            figures[case.name] = {**runs, "imports_torch": torch}
            wall = sorted(runs["wall_seconds"])
            shown = [
                f"{value:.2f}"
                for value in (wall[0], median(wall), wall[-1], median(runs["processor_seconds"]))
            ]
            rows.append(
                [
                    case.name,
                    *shown,
                    case.target,
                    f"{max(runs['bytes']) / 2**20:.0f} MiB",
                    "yes" if torch else "no",
                ]
            )
    header = ["", "min s", "median s", "max s", "processor s", "target s", "memory", "imports torch"]
    text = sentence(found) + "\n\n" + table(header, rows)
    print(text)
    print(write("planning", found["date"], text, {"conditions": found, **figures}, PREFACE))


def written(case: Case, directory: Path) -> Path:
    """The job file of a case, and the rows that it names."""
    (directory / "rows.jsonl").write_text('{"text": "a row"}\n' * 16, encoding="utf-8")
    config = ", ".join(f"{key}: {value}" for key, value in (COMMON | case.sizes).items())
    job = directory / "job.yaml"
    job.write_text(
        JOB.format(config=f"{{{config}}}", length=case.length, samples=case.nodes * 8, nodes=case.nodes),
        encoding="utf-8",
    )
    return job


def measured(case: Case, arguments: list[str], scratch: Path) -> dict[str, Any]:
    """Wall seconds, processor seconds and the highest resident memory of each run, after one that is not
    counted."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    if not case.compiled:
        shutil.copytree(
            ROOT / "launcher", scratch / "fresh" / "launcher", ignore=shutil.ignore_patterns("__pycache__")
        )
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(scratch / "fresh")}
    command = [str(Path(sys.executable).with_name("launcher")), *arguments]
    found: dict[str, Any] = {"wall_seconds": [], "processor_seconds": [], "bytes": []}
    for number in range(case.num_runs + 1):
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        taken = time.monotonic() - begun
        assert status == 0, f"{command} failed"
        if number:
            found["wall_seconds"].append(taken)
            found["processor_seconds"].append(used.ru_utime + used.ru_stime)
            found["bytes"].append(used.ru_maxrss * 1024)
    return found


if __name__ == "__main__":
    main()
