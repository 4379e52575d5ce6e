"""Streamed rows: memory over ten times the data, and speed beside `datasets` streaming with transformers' Trainer.

    python -m tests.benchmarks.bench_streaming --work DIRECTORY [--rows 20000] [--turns 3] [--steps 40] [--dry]

*Memory*: a process without a model goes once through rows, and through ten times as many, by launcher's stream; its
anonymous memory and its worker's are looked at from outside, and what lies on the disk. *Speed*: the same small
model with random weights, rows, tokenizer and samples a step, one process with one thread each, in turns:
`launcher run` with `data.streaming`, and the Trainer over an IterableDataset. Tokens a second count the tokens of
the rows, not padding, from the end of the first step to that of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from tests.benchmarks._report import ROOT, MemoryMonitor, conditions, parser, sentence, table, write

PREFACE = "# Streamed rows\n\n`python -m tests.benchmarks.bench_streaming`"
WINDOW, BATCH, LENGTH = 1000, 8, 256
WHAT = (
    f"Windows of {WINDOW:,} rows of 20 to 200 letters; {BATCH} rows a step, not packed; a Llama of 4 layers and 256 "
    "hidden, fp32. launcher joins rows end to end, the Trainer pads."
)
MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip


def main() -> None:
    """Measure both, and write the page."""
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, required=True, help="where rows and runs are kept")
    arguments.add_argument("--rows", type=int, default=20_000, help="the ten-fold has ten times as many")
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--parts", nargs="+", default=["Memory", "Speed"])
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.work = options.work.resolve()
    if options.child is not None:
        CHILDREN[options.child](options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    known = conditions("torch", "transformers", "datasets")
    model = make_model(options.work / "model")
    for title, measure, shown in (("Memory", memories, memory_shown), ("Speed", speeds, speed_shown)):
        if title not in options.parts:
            continue
        found = measure(model, options)
        text = f"{sentence(known)} {WHAT}\n\n{shown(found, options)}"
        print(text if options.dry else write("streaming", title, text, {title: found}, PREFACE), flush=True)


def memories(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what going through the rows takes, and through ten times as many."""
    return [memory_over(count, model, options) for count in (options.rows, 10 * options.rows)]


def make_model(folder: Path) -> Path:
    """Return the directory of the model and its tokenizer, made where it is not there."""
    if not folder.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        from tests.distributed.data_world import byte_tokenizer

        own = {key: value for key, value in MODEL.items() if key != "model_type"}
        config = AutoConfig.for_model("llama", **own)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    return folder


def rows_of(count: int, folder: Path) -> str:
    """Write so many rows of 20 to 200 letters to four files; return their pattern."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(0)
    for shard in range(4):
        if not (path := folder / f"{shard}.jsonl").exists():
            with open(path, "w", encoding="utf-8") as file:
                for _ in range(count // 4):
                    letters = generator.randrange(20, 200)
                    words = "".join(generator.choices("abcdefghij ", k=letters))
                    file.write(json.dumps({"text": words}) + "\n")
    return str(folder / "*.jsonl")


def job_of(pattern: str, model: Path, steps: int) -> dict[str, Any]:
    """Return the job of both measurements."""
    return {
        "name": "streamed",
        "model": {"name": str(model)},
        "data": {
            "train": {"path": pattern}, "text": "text", "max_length": LENGTH,
            "streaming": True, "shuffle_window": WINDOW,
        },
        "batch": {"global_batch_size": BATCH, "micro_batch_size": BATCH},
        "training": {"max_steps": steps, "learning_rate": 1e-4},
        "precision": "fp32",
        "memory": {"activation_checkpointing": "none"},
        "parallel": {"engine": "fsdp"},
        "checkpoint": {"every": "1d"},
        "cluster": {"gpus_per_node": 0, "ranks_per_node": 1, "threads_per_rank": 1},
        "trackers": [],
    }  # fmt: skip


def memory_over(count: int, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the peaks of the process that goes through so many rows and of its worker, in bytes."""
    pattern = rows_of(count, options.work / f"rows-{count}")
    request = options.work / "request.json"
    request.write_text(json.dumps(job_of(pattern, model, 1 + count // BATCH)), encoding="utf-8")
    process = child("memory", options, None)
    monitor = MemoryMonitor(process.pid)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(output)
    told = json.loads(output.splitlines()[-1])
    return {"rows": count, **told, "anonymous": monitor.largest(2)["anonymous"]}


def child(kind: str, options: argparse.Namespace, threads: int | None) -> subprocess.Popen[str]:
    """Start this script as a process of its own."""
    command = ["-m", "tests.benchmarks.bench_streaming", "--work", str(options.work), "--child", kind]
    command += ["--steps", str(options.steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(options.work / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if threads else subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def go_through(options: argparse.Namespace) -> None:
    """Take the steps of an epoch without a model; print the rows, and the most bytes of windows on the disk."""
    from transformers import AutoTokenizer

    from launcher import tasks
    from launcher.job.schema import Job
    from launcher.planner.search import plan_job
    from launcher.training.data.stream import Stream
    from launcher.training.data.stream_batches import StreamBatches

    job = Job.model_validate(json.loads((options.work / "request.json").read_text(encoding="utf-8")))
    plan = plan_job(job, 1)
    run = RunDirectory(options.work / f"scratch-{plan.training.max_steps}")
    run.path.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(plan.model.name)
    stream = Stream.open(run, plan, tasks.build(plan, tokenizer), tokenizer)
    batches = StreamBatches(stream, plan, 0)
    batches.go_to(0, None, "")
    disk = 0
    for step in range(batches.num_steps):
        batches.step(step)
        if step % 50 == 0:
            disk = max(disk, sum(file.stat().st_size for file in stream.maker.root.glob("[0-9]*/*")))
    rows = stream.report.rows_read
    stream.close()
    print(json.dumps({"rows_read": rows, "disk": disk}))


def train_with_trainer(options: argparse.Namespace) -> None:
    """Train by the Trainer over `datasets`' stream; print the seconds and the tokens."""
    import time

    import datasets
    import transformers

    request = json.loads((options.work / "request.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"]["name"])
    counted = [0]
    clock = {"first": 0.0, "last": 0.0, "tokens": 0}

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [*tokenizer(row["text"])["input_ids"][: LENGTH - 1], tokenizer.eos_token_id]}

    stream = datasets.load_dataset(
        "json", data_files=request["data"]["train"]["path"], split="train", streaming=True
    )
    stream = stream.shuffle(seed=17, buffer_size=WINDOW).map(encoded, remove_columns=["text"])
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)

    class Counting(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock["last"] = time.perf_counter()
            if not clock["first"]:
                clock["first"], counted[0] = clock["last"], 0

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        counted[0] += sum(len(row["input_ids"]) for row in rows)
        return dict(collator(rows))

    arguments = transformers.TrainingArguments(
        output_dir=str(options.work / "out"), max_steps=options.steps, per_device_train_batch_size=BATCH,
        learning_rate=1e-4, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_num_workers=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"]["name"])
    transformers.Trainer(
        model=model, args=arguments, train_dataset=stream, data_collator=collate, callbacks=[Counting()]
    ).train()
    print(json.dumps({"seconds": clock["last"] - clock["first"], "tokens": counted[0]}))


CHILDREN = {"memory": go_through, "trainer": train_with_trainer}


def speeds(model: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return tokens a second of both sides in each turn, and launcher's share of time waiting for data."""
    pattern = rows_of(options.rows, options.work / f"rows-{options.rows}")
    job = job_of(pattern, model, options.steps)
    (options.work / "request.json").write_text(json.dumps(job), encoding="utf-8")
    (options.work / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    results = []
    for turn in range(options.turns):
        process = child("trainer", options, 1)
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the Trainer ended with {process.returncode}: {output}")
        peer = json.loads(output.splitlines()[-1])
        ours = launched(options, turn)
        results.append({"trainer": peer["tokens"] / peer["seconds"], **ours})
        print(results[-1], flush=True)
    return results


def launched(options: argparse.Namespace, turn: int) -> dict[str, float]:
    """Return launcher's tokens a second, and the share of its time in which it waited for data."""
    run = options.work / f"run-{turn}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(options.work / "cache")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = ["-m", "launcher.cli.main", "run", str(options.work / "job.yaml"), "--run-dir", str(run)]
    subprocess.run([sys.executable, *command], check=True, env=environment, cwd=ROOT, capture_output=True)
    steps = [one for one in read(RunDirectory(run).metrics_file) if one["kind"] == "train"]
    seconds = steps[-1]["time"] - steps[0]["time"]
    return {
        "launcher": sum(one["num_tokens"] for one in steps[1:]) / seconds,
        "waiting": sum(one["data_seconds"] for one in steps[1:]) / seconds,
    }


def memory_shown(memory: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table of memory."""
    mib = 1 << 20
    return table(
        ["rows", "anonymous memory of the process", "of its worker", "windows on the disk at most"],
        [
            [
                f"{one['rows']:,}",
                *(f"{each / mib:.0f} MiB" for each in one["anonymous"]),
                f"{one['disk'] / mib:.1f} MiB",
            ]
            for one in memory
        ],
    )


def speed_shown(speed: list[dict[str, float]], options: argparse.Namespace) -> str:
    """Return the table of speed."""
    ratios = [one["launcher"] / one["trainer"] for one in speed]
    rows = [
        [
            turn + 1,
            f"{one['launcher']:.0f} tokens/s",
            f"{one['trainer']:.0f} tokens/s",
            f"{ratios[turn]:.2f}",
            f"{one['waiting']:.2%} of the time",
        ]
        for turn, one in enumerate(speed)
    ]
    text = table(["turn", "launcher", "Trainer", "ratio", "launcher waited for data"], rows)
    return f"{options.steps} steps a turn.\n\n{text}\nMedian ratio {statistics.median(ratios):.2f}."


if __name__ == "__main__":
    main()
