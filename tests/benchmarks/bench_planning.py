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
DECODER = """name: planned
model: {{name: model, weights: random, config: {config}}}
data: {{train: {{path: rows.jsonl}}, text: text, max_length: {length}}}
batch: {{global_batch_size: {samples}}}
training: {{max_steps: 1000}}
cluster: {{nodes: {nodes}, gpus_per_node: 8}}
"""
PREFACE = """# Time that planning takes

`tests/benchmarks/bench_planning.py`: whole processes of `launcher plan`, of the large models for `--gpu h100-80gb`, one after another, begun with Python's bytecode at
hand: an installed package has it, a clone from the second command on. `first command of a clone` has that of the libraries alone.
"""


CLASSIFIER = """name: planned
model: {name: model, task: sequence-classification, weights: random, config: {model_type: bert}}
data: {train: {path: rows.jsonl}, text: text, label: label, max_length: 128}
batch: {global_batch_size: 32}
training: {max_steps: 1000}
cluster: {gpus_per_node: 0, ranks_per_node: 2}
"""
"""A BERT of 110M parameters, of which no formula knows: its class is traced, and a CPU's kernels are asked."""


def decoder(sizes: dict[str, int], length: int, nodes: int) -> str:
    """Return the job file of a Llama of these sizes, with samples of `length` tokens, on nodes of 8 GPUs."""
    config = ", ".join(f"{key}: {value}" for key, value in (COMMON | sizes).items())
    return DECODER.format(config=f"{{{config}}}", length=length, samples=nodes * 8, nodes=nodes)


class Case(NamedTuple):
    """One command that is timed."""

    name: str
    job: str
    arguments: tuple[str, ...] = ("--gpu", "h100-80gb")
    target: float = TARGET
    num_runs: int = NUM_RUNS
    compiled: bool = True
    """Whether Python's bytecode of launcher is at hand."""
    caches: bool = True
    """Whether profiles of models are kept from one run to the next."""


CASES = (
    Case("405B, 16,384 GPUs, samples of 4,096", decoder(LARGEST, 4096, 2048)),
    Case("the same, `--json`", decoder(LARGEST, 4096, 2048), ("--gpu", "h100-80gb", "--json")),
    Case("samples of 8,192: FSDP does not fit, ZeRO is gone through too", decoder(LARGEST, 8192, 2048)),
    Case("the same, first command of a clone", decoder(LARGEST, 8192, 2048), compiled=False),
    Case(
        "70B, 64 GPUs, `--trace`",
        decoder(LARGE, 4096, 8),
        ("--gpu", "h100-80gb", "--trace"),
        TRACE_TARGET,
        NUM_TRACES,
        caches=False,
    ),
    Case("BERT of 110M on 2 ranks of a CPU, the first plan", CLASSIFIER, (), 12.0, NUM_TRACES, caches=False),
    Case("the same, each later one", CLASSIFIER, (), 0.6),
)


def main() -> None:
    """Time each case and write the section."""
    found = conditions("pydantic", "torch", "transformers")
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            arguments = ["plan", str(written(case, Path(scratch))), *case.arguments]
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
    (directory / "rows.jsonl").write_text(
        '{"text": "a row", "label": "a"}\n{"text": "b", "label": "b"}\n' * 8
    )
    job = directory / "job.yaml"
    job.write_text(case.job, encoding="utf-8")
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
        environment["XDG_CACHE_HOME"] = str(scratch / ("cache" if case.caches else f"cache-{number}"))
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
