"""The same job in launcher and in transformers' Trainer: metric, time and memory side by side.

    python tests/benchmarks/bench_trainer_tasks.py --data ../shared/data --tasks classes tags --seeds 17 18 19

Both sides take the same model, rows, steps, batch, schedule and number of ranks, in turns. What differs is said on the
page. A run that is in --work already is not made again, so that one can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from _report import ROOT, MemoryMonitor, conditions, sentence, table, write

from launcher.runs.events import read, steps
from launcher.runs.layout import RunDirectory
from launcher.training.demo.models import model_directory

HERE = Path(__file__).parent
NUM_RANKS = 2
SIDES = ("launcher", "Trainer")
PREFACE = """# The same tasks in the Hugging Face Trainer

`tests/benchmarks/bench_trainer_tasks.py` trains each job on 2 ranks in launcher and in transformers' Trainer (`peer_trainer.py`), in
turns. Model, rows, steps, batch, learning rate, schedule, weight decay and clipping are the same. These differ: launcher cuts the
model by FSDP2, the Trainer has a whole copy on each rank (DDP); the order of the rows and the masks of dropout come from each one's
own random numbers; in bf16 launcher computes in bf16 over fp32 weights, the Trainer under autocast. Each side reads the rows with code
of its own. The metric is that of the held-out rows after the last step. Seconds are those from the end of the first step to the end of
the last, memory the most of a rank, resident, from outside. Seconds compare only where both sides ran in turns under a like load.
"""


class Case(NamedTuple):
    """A job, and what the peer needs to know of it."""

    job: str
    metric: str
    train: str
    evaluation: str
    steps: int
    batch: int
    learning_rate: float
    more: tuple[tuple[str, int], ...] = ()


CASES = {
    "classes": Case(
        "tests/jobs/minilm-sick-classes.yaml", "accuracy", "sick/train.tsv", "sick/dev.tsv", 64, 32, 2e-4
    ),
    "tags": Case(
        "docs/examples/token-classification.yaml", "f1", "wnut17/train.conll", "wnut17/dev.conll", 120, 16, 4e-4
    ),
    "answers": Case(
        "docs/examples/question-answering.yaml", "f1", "xquad/en.train.json", "xquad/en.test.json", 200, 16, 3e-4,
        (("max_length", 160), ("doc_stride", 48)),
    ),
    "translation": Case(
        "docs/examples/translation.yaml", "bleu", "pairs.tsv", "pairs.tsv", 150, 16, 5e-3, (("max_length", 96),)
    ),
}  # fmt: skip


def main() -> None:
    """Measure each task with each seed on both sides, and write a section for each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with sick, wnut17, xquad")
    parser.add_argument("--pairs", type=Path, help="for translation: a folder with pairs.tsv (de, en)")
    parser.add_argument("--model", default=None, help="a model's directory; MiniLM-L6 where it is left out")
    parser.add_argument("--tasks", nargs="+", choices=list(CASES), default=["classes", "tags"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=None, help="in place of each task's own")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    options.model = options.model or str(model_directory("minilm-l6"))
    options.work.mkdir(parents=True, exist_ok=True)
    found = conditions("torch", "transformers", "accelerate")
    for name in options.tasks:
        case = CASES[name]._replace(steps=options.steps or CASES[name].steps)
        results: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
        for seed in options.seeds:
            for side, own in results.items():
                own.append(measured(side, name, case, seed, options))
                print(name, seed, side, own[-1], flush=True)
        text = f"{sentence(found)}\n\n{described(case, options)}\n\n{shown(case, results, options.seeds)}"
        if options.dry:
            print(text)
        else:
            print(write("trainer_tasks", name, text, results, PREFACE))


def measured(side: str, name: str, case: Case, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """What one run of one side came to: metric, seconds, memory in bytes."""
    scratch = options.work / f"{name}-{seed}-{side}"
    kept = scratch / "result.json"
    if not kept.exists():
        scratch.mkdir(exist_ok=True)
        result = run(side, name, case, seed, options, scratch)
        kept.write_text(json.dumps(result), encoding="utf-8")
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def run(
    side: str, name: str, case: Case, seed: int, options: argparse.Namespace, scratch: Path
) -> dict[str, float]:
    """Run one side in processes of its own."""
    own = side == "launcher"
    command = (launcher_command if own else peer_command)(name, case, seed, options, scratch)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(ROOT)
    with open(scratch / "log", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        monitor = MemoryMonitor(process.pid)
        code = process.wait()
    memory = max(monitor.largest(NUM_RANKS)["resident"])
    log = (scratch / "log").read_text(encoding="utf-8")
    if code:
        sys.exit(f"{side} ended with {code}:\n{log[-3000:]}")
    return (launcher_result(scratch / "run", case) if own else peer_result(log)) | {"memory": memory}


def launcher_command(
    name: str, case: Case, seed: int, options: argparse.Namespace, scratch: Path
) -> list[str]:
    train, evaluation = data_of(name, case, options)
    settings = {
        "model.name": options.model,
        "data.train.path": train,
        "data.evaluation.path": evaluation,
        "batch.global_batch_size": case.batch,
        "training.epochs": "null",
        "training.max_steps": case.steps,
        "training.learning_rate": case.learning_rate,
        "training.warmup": 0.1,
        "training.weight_decay": 0.01,
        "training.evaluate_every": "null",
        "training.seed": seed,
        "checkpoint.every": "1d",
        "cluster.gpus_per_node": 0,
        "cluster.ranks_per_node": NUM_RANKS,
        "parallel.engine": "fsdp",
        "precision": options.precision,
        **{f"data.{key}": value for key, value in case.more},
    }
    if name == "translation":
        settings |= {"data.prefix": '""', "data.label_smoothing": 0}
        settings |= {"evaluation.generate": '{"max_new_tokens": 64}'}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run = ["run", str(ROOT / case.job), "--run-dir", str(scratch / "run")]
    return [sys.executable, "-m", "launcher.cli.main", *run, *changes]


def peer_command(name: str, case: Case, seed: int, options: argparse.Namespace, scratch: Path) -> list[str]:
    train, evaluation = data_of(name, case, options)
    request = {
        "task": name,
        "model": options.model,
        "train": train,
        "evaluation": evaluation,
        "output": str(scratch / "out"),
        "steps": case.steps,
        "batch": case.batch,
        "ranks": NUM_RANKS,
        "learning_rate": case.learning_rate,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "seed": seed,
        "precision": options.precision,
        **dict(case.more),
    }
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0"]
    return [sys.executable, *torchrun, str(HERE / "peer_trainer.py"), str(scratch / "request.json")]


def data_of(name: str, case: Case, options: argparse.Namespace) -> tuple[str, str]:
    """The two files of a task."""
    folder = options.pairs if name == "translation" else options.data
    return str((folder / case.train).resolve()), str((folder / case.evaluation).resolve())


def launcher_result(run: Path, case: Case) -> dict[str, float]:
    """From the run's own files, as the peer's clock counts."""
    trained = steps(RunDirectory(run).metrics_file)
    measured = [
        record["metrics"] for record in read(RunDirectory(run).events_file) if record["event"] == "evaluated"
    ]
    return {
        "metric": measured[-1][case.metric],
        "seconds": trained[max(trained)]["time"] - trained[min(trained)]["time"],
    }


def peer_result(log: str) -> dict[str, float]:
    """The line that the peer prints."""
    line = next(line for line in reversed(log.splitlines()) if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def described(case: Case, options: argparse.Namespace) -> str:
    """The settings that both sides share."""
    more = "".join(f", {key} {value}" for key, value in case.more)
    return (
        f"`{case.job}`: {NUM_RANKS} ranks, {options.precision}, {case.steps} steps, batches of {case.batch}, AdamW at "
        f"{case.learning_rate:g} (linear, warm-up 0.1, weight decay 0.01){more}; seeds "
        f"{', '.join(map(str, options.seeds))}."
    )


def shown(case: Case, results: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    """A row a side: the metric of each seed, and the means."""
    header = [
        "",
        *(f"{case.metric}, seed {seed}" for seed in seeds),
        "mean",
        "seconds, mean",
        "memory of a rank",
    ]
    rows = [
        [
            side,
            *(f"{one['metric']:.4f}" for one in own),
            f"{mean(one['metric'] for one in own):.4f}",
            f"{mean(one['seconds'] for one in own):.0f}",
            f"{mean(one['memory'] for one in own) / 2**30:.2f} GiB",
        ]
        for side, own in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
