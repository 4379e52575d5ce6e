"""Tokens per second and memory of `launcher run` against TRL's SFTTrainer: same model, rows, ranks and
lengths, alternating in one call.

    python tests/benchmarks/bench_speed.py --data train.jsonl --peer-python PEER/bin/python --precision fp32
    --rounds 3

The peer's Python is one with trl 1.16.0 beside the same torch and transformers; docs/benchmarks/speed.md says
how to make it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from _report import MemoryMonitor, conditions, matrix_rate, sentence, table, write

from launcher.runs.events import read, steps
from launcher.training.demo.models import model_directory

HERE = Path(__file__).parent
NUM_RANKS = 2
PREFACE = """# Speed against the peer

`tests/benchmarks/bench_speed.py` runs launcher and TRL's SFTTrainer in turns on the same model, rows, ranks and maximum length. A rate is
non-padding tokens of all ranks by wall time, over the steps after the warm-up. Memory is that of the ranks, the larger of the two, watched
from outside: resident at its highest, and anonymous (without pages of mapped files). The peer's Python is made with:

```
python -m venv peer
echo "$PWD/.venv/lib/python3.11/site-packages" > peer/lib/python3.11/site-packages/project.pth
peer/bin/pip install --no-deps trl==1.16.0
```
"""


@dataclass(frozen=True)
class Side:
    """One of the contestants."""

    name: str
    packing: bool
    peer: bool
    checkpointing: bool = True


SIDES = {
    "peer": Side("TRL as it comes (padded)", packing=False, peer=True),
    "launcher": Side("launcher", packing=False, peer=False),
    "peer-packed": Side("TRL, packing", packing=True, peer=True),
    "launcher-packed": Side("launcher, packing", packing=True, peer=False),
    "peer-plain": Side("TRL without activation checkpointing", packing=False, peer=True, checkpointing=False),
}


def main() -> None:
    """Run every side --rounds times in turns, and write the medians."""
    options = parse()
    found = conditions("torch", "transformers")
    rate = {kind: matrix_rate(kind) for kind in sorted({options.precision, "fp32"})}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sides}
    with tempfile.TemporaryDirectory() as scratch:
        data = prompts_and_completions(options.data, Path(scratch) / "rows.jsonl", options.rows)
        for number in range(options.rounds):
            for name in options.sides:
                one = measure(SIDES[name], options, data, Path(scratch) / f"{name}-{number}")
                results[name].append(one)
                print(json.dumps({"side": name, "round": number} | one), flush=True)
    title = f"{options.precision}, {options.max_length} tokens, {found['date']}"
    text = describe(results, options, found, rate)
    print(text)
    if not options.dry:
        print(
            write(
                "speed", title, text, {"conditions": found, "matrix_rate": rate, "results": results}, PREFACE
            )
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="JSON lines with prompt and completion, or question and answer",
    )
    parser.add_argument("--rows", type=int, default=2000, help="use the first so many")
    parser.add_argument(
        "--model", default=None, help="a model's directory; SmolLM2-135M where it is left out"
    )
    parser.add_argument("--peer-python", default="/tmp/peer/bin/python")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="samples (packs) of a rank and forward pass, both sides"
    )
    parser.add_argument(
        "--launcher-micro-batch", type=int, default=None, help="of launcher alone, with the same global batch"
    )
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=list(SIDES),
        default=["peer", "launcher", "peer-packed", "launcher-packed"],
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for launcher's job, as model.compile=true",
    )
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    options.model = options.model or str(model_directory("smollm2-135m"))
    if options.warmup >= options.steps:
        parser.error(f"--warmup {options.warmup} leaves none of --steps {options.steps} to measure")
    return options


def prompts_and_completions(source: Path, target: Path, limit: int) -> Path:
    """The rows that both sides read."""
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for _, line in zip(range(limit), lines, strict=False):
            row = json.loads(line)
            prompt, completion = (
                row.get("prompt") or row["question"] + "\n",
                row.get("completion") or row["answer"],
            )
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return target


def measure(side: Side, options: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Any]:
    """One run of one side, in processes of its own."""
    scratch.mkdir()
    command = (
        peer_command(side, options, data, scratch)
        if side.peer
        else launcher_command(side, options, data, scratch)
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // NUM_RANKS)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = scratch / "log"
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parents[1]
        )
        monitor = MemoryMonitor(process.pid)
        code = process.wait()
    memory = monitor.largest(NUM_RANKS)
    if code:
        sys.exit(f"{side.name} ended with {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    rates = peer_rate(log) if side.peer else launcher_rate(scratch / "run", options.warmup)
    shutil.rmtree(scratch, ignore_errors=True)
    return rates | {"resident": max(memory["resident"]), "anonymous": max(memory["anonymous"])}


def peer_command(side: Side, options: argparse.Namespace, data: Path, scratch: Path) -> list[str]:
    flags = ["--packing"] * side.packing + ["--no-checkpointing"] * (not side.checkpointing)
    settings = {
        "model": options.model,
        "data": data,
        "output": scratch / "out",
        "precision": options.precision,
        "steps": options.steps,
        "warmup": options.warmup,
        "max-length": options.max_length,
        "micro-batch": options.micro_batch,
        "accumulation": options.accumulation,
    }
    torchrun = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={NUM_RANKS}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    return [
        options.peer_python,
        *torchrun,
        str(HERE / "peer_sft.py"),
        *(f"--{key}={value}" for key, value in settings.items()),
        *flags,
    ]


def launcher_command(side: Side, options: argparse.Namespace, data: Path, scratch: Path) -> list[str]:
    job = {
        "name": "speed",
        "model": {"name": options.model, "task": "causal-lm"},
        "data": {
            "train": {"path": str(data)},
            "prompt": "prompt",
            "completion": "completion",
            "max_length": options.max_length,
            "packing": side.packing,
        },
        "batch": {
            "global_batch_size": options.micro_batch * options.accumulation * NUM_RANKS,
            "micro_batch_size": options.launcher_micro_batch or options.micro_batch,
        },
        "training": {"max_steps": options.steps, "learning_rate": 2e-5, "schedule": "linear", "warmup": 0},
        "precision": options.precision,
        "checkpoint": {
            "every": "1d",
            "async": False,
        },  # the peer saves nothing, and keeps no copy to save in the background
        "cluster": {"gpus_per_node": 0, "ranks_per_node": NUM_RANKS},
        "trackers": [],
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    overrides = [part for setting in options.set for part in ("--set", setting)]
    return [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "run",
        str(scratch / "job.yaml"),
        "--run-dir",
        str(scratch / "run"),
        *overrides,
    ]


def peer_rate(log: Path) -> dict[str, Any]:
    line = next(
        line for line in reversed(log.read_text(encoding="utf-8").splitlines()) if line.startswith("RESULT ")
    )
    return dict(json.loads(line.removeprefix("RESULT ")))


def launcher_rate(run: Path, warmup: int) -> dict[str, Any]:
    """From metrics.jsonl: the tokens of the steps after the warm-up, by the time from its end to the end of
    the last."""
    records = steps(run / "metrics.jsonl")
    last = max(records)
    num_tokens = sum(record["num_tokens"] for step, record in records.items() if step > warmup)
    seconds = records[last]["time"] - records[warmup]["time"]
    flops = next(
        record["flops_per_token"] for record in read(run / "events.jsonl") if record["event"] == "training"
    )
    return {
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "flops_per_token": flops,
    }


def describe(
    results: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
    found: dict[str, Any],
    rate: dict[str, float],
) -> str:
    """The section: conditions, a row for each side, the ratios."""
    middle = {
        name: {
            key: median(one[key] for one in runs) for key in ("tokens_per_second", "resident", "anonymous")
        }
        for name, runs in results.items()
    }
    rows = []
    for name, runs in results.items():
        each = ", ".join(f"{one['tokens_per_second']:.1f}" for one in runs)
        memory = [f"{middle[name][key] / 2**30:.2f} GiB" for key in ("resident", "anonymous")]
        rows.append([SIDES[name].name, f"{middle[name]['tokens_per_second']:.1f}", each, *memory])
    lines = [
        sentence(found),
        f"{options.rounds} rounds in turns, {options.steps} steps of which the first {options.warmup} "
        f"are warm-up; {NUM_RANKS} ranks x "
        f"{options.micro_batch} samples (packs) x {options.accumulation} accumulated, {options.precision}."
        + (
            f" launcher takes the same global batch {options.launcher_micro_batch} at a time."
            if options.launcher_micro_batch
            else ""
        )
        + (f" launcher with {', '.join(options.set)}." if options.set else ""),
        "",
        table(["", "tokens/s, median", "each round", "resident", "anonymous"], rows),
    ]
    for ours, theirs in (
        ("launcher", "peer"),
        ("launcher-packed", "peer"),
        ("launcher-packed", "peer-packed"),
        ("launcher", "peer-plain"),
    ):
        if ours in middle and theirs in middle:
            speed = middle[ours]["tokens_per_second"] / middle[theirs]["tokens_per_second"]
            memory = [middle[ours][key] / middle[theirs][key] for key in ("resident", "anonymous")]
            lines.append(
                f"- {SIDES[ours].name} : {SIDES[theirs].name} = {speed:.2f}x the tokens/s, "
                f"{memory[0]:.2f}x the resident and "
                f"{memory[1]:.2f}x the anonymous memory."
            )
    for name in ("launcher", "launcher-packed"):
        if name in middle:
            flops = results[name][0]["flops_per_token"] * middle[name]["tokens_per_second"]
            shares = [
                f"{flops / one:.0%} of this machine's {one / 1e9:.1f} in {kind} matrix products"
                for kind, one in rate.items()
            ]
            lines.append(f"- {SIDES[name].name}: {flops / 1e9:.1f} GFLOP/s, {' and '.join(shares)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
