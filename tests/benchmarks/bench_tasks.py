"""What real fine-tuning runs came to: each finished run's metrics before and after, from its own events.

launcher run tests/jobs/minilm-sst2.yaml --set model.name=... && python tests/benchmarks/bench_tasks.py
runs/minilm-sst2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _report import conditions, sentence, table, write

from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory

PREFACE = """# Real tasks

`tests/benchmarks/bench_tasks.py` reads the events of finished runs of the jobs in `tests/jobs/`. The best evaluation is the one whose
checkpoint `keep_best` keeps; the last is that of the final step.
"""

ENGINES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed ZeRO"}


def main() -> None:
    """Write one section for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--title", help="of the section, where a job ran more than once; its name by default")
    parser.add_argument("--note", default="", help="said below the figures: the command, baselines, samples")
    found, options = conditions("torch", "transformers"), parser.parse_args()
    if options.title and len(options.runs) > 1:
        parser.error("--title is for one run")
    for path in options.runs:
        run = RunDirectory(path)
        if not run.finished:
            parser.error(f"{path} is not finished")
        plan = Plan.read(run.plan_file)
        figures = measured(run, plan.checkpoint.metric)
        page = write(
            "tasks",
            options.title or plan.name,
            f"{sentence(found)}\n\n{description(plan, run)}\n\n{shown(figures)}\n{options.note}",
            figures,
            PREFACE,
        )
        print(page)


def measured(run: RunDirectory, metric: str) -> dict[str, Any]:
    """Metrics before, best by `metric`, and after the last step."""
    evaluations = [
        (record["step"], record["metrics"])
        for record in events.read(run.events_file)
        if record["event"] == "evaluated"
    ]
    trained = [evaluation for evaluation in evaluations if evaluation[0] > 0]
    return {
        "before": evaluations[0],
        f"best {metric}": max(trained, key=lambda entry: entry[1][metric]),
        "last": trained[-1],
    }


def description(plan: Plan, run: RunDirectory) -> str:
    """The settings that matter, from the plan."""
    training, batch = plan.training, plan.batch
    attempts = sum(record["event"] == "started" for record in events.read(run.events_file))
    return (
        f"{plan.mesh.world_size} ranks, {ENGINES[plan.engine]} ({plan.sharding}), {plan.precision}, "
        f"batches of {batch.global_batch_size}, "
        f"{plan.length.value:g} {plan.length.unit}, "
        f"{training.optimizer} at {training.learning_rate:g} ({training.schedule}, warm-up "
        f"{training.warmup:g}), seed {training.seed}; "
        f"in {attempts} attempts."
    )


def shown(figures: dict[str, Any]) -> str:
    """One row an evaluation."""
    names = list(figures["last"][1])
    rows = [
        [name, step, *(f"{metrics[key]:.4f}" for key in names)] for name, (step, metrics) in figures.items()
    ]
    return table(["", "step", *names], rows)


if __name__ == "__main__":
    main()
