"""SICK's relatedness and entailment learned at once, and each alone: all training rows, all test rows.

python -m tests.benchmarks.bench_multi_task --data ../shared/data --work /tmp/multi-task
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from tests.benchmarks._report import conditions, sentence, table, write
from tests.benchmarks.tuning_runs import PREFACE, Session, command_line, common, evaluations, minilm, spread

TITLE = "SICK's two tasks at once and each alone, all rows"
PAIR = {"text": ["sentence1", "sentence2"]}
SECTIONS: dict[str, dict[str, Any]] = {
    "relatedness": PAIR | {"label": "relatedness", "problem": "regression"},
    "entailment": PAIR | {"label": "entailment"},
}
METRICS = {"relatedness": ("pearson", "spearman", "mse"), "entailment": ("accuracy", "f1")}
RATE, EACH = 1e-4, 32
"""The learning rate, and the samples of a task in a step."""


def main() -> None:
    """Train each kind with each seed, and write the section."""
    arguments = command_line(__doc__)
    arguments.add_argument(
        "--weights", nargs="*", type=float, default=[1.0], help="of the loss of relatedness"
    )
    arguments.add_argument("--test-rows", type=int, default=2400, help="only the first; 0 for all 4,908")
    options = arguments.parse_args()
    circumstances, session = conditions("torch", "transformers"), Session(options)
    folder = session.data / "sick"
    num_rows = len((folder / "train.tsv").read_text(encoding="utf-8").splitlines()) - 1
    steps = round(options.scale * -(-num_rows // EACH))
    more = {"limit": options.test_rows} if options.test_rows else {}

    def alone(name: str, seed: int) -> dict[str, Any]:
        job = common(EACH, steps, RATE, seed) | {
            "model": {"name": minilm(), "task": "sequence-classification"},
            "data": {
                "train": {"path": str(folder / "train.tsv")},
                "evaluation": {"path": str(folder / "test.tsv")} | more,
                "max_length": 64,
            } | SECTIONS[name],
        }  # fmt: skip
        last = evaluations(session.run(f"{name}-{seed}", job))[-1]
        return {f"{name}/{metric}": last[metric] for metric in METRICS[name]}

    def together(weight: float, seed: int) -> dict[str, Any]:
        of_tasks = {name: {"task": "sequence-classification"} | own for name, own in SECTIONS.items()}
        of_tasks["relatedness"] = of_tasks["relatedness"] | {"loss_weight": weight}
        job = common(2 * EACH, steps, RATE, seed) | {
            "model": {"name": minilm(), "task": "multi-task"},
            "data": {
                "tasks": of_tasks,
                "train": [{"path": str(folder / "train.tsv"), "task": name} for name in SECTIONS],
                "evaluation": [{"path": str(folder / "test.tsv"), "task": name} | more for name in SECTIONS],
                "max_length": 64,
            },
        }
        job["batch"]["micro_batch_size"] = EACH
        last = evaluations(session.run(f"together-{weight:g}-{seed}", job))[-1]
        return {
            f"{name}/{metric}": last[f"{name}/{metric}"] for name, own in METRICS.items() for metric in own
        }

    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in options.seeds:
        for name in SECTIONS:
            keep(
                rows,
                f"{name} alone",
                seed,
                session.row(f"{name}-{seed}", lambda name=name, seed=seed: alone(name, seed)),
            )
        for weight in options.weights:
            row = session.row(
                f"together-{weight:g}-{seed}", lambda weight=weight, seed=seed: together(weight, seed)
            )
            keep(rows, f"at once, relatedness x {weight:g}", seed, row)
    measured = f"the first {options.test_rows:,}" if options.test_rows else "all 4,908"
    text = (
        f"{sentence(circumstances)}\n\nMiniLM-L6, 2 ranks, FSDP, bf16, AdamW at {RATE:g} (linear, warm-up 0.1, weight decay 0.01), one epoch of "
        f"the {num_rows:,} training rows: {steps} steps of {EACH} samples alone, and of {2 * EACH} at once, so that each task sees its rows as "
        f"often and the model is updated as often. Measured on {measured} test rows after the last step.\n\n"
        f"{shown(rows)}\n{compared(rows)}"
    )
    print(text if options.dry else write("tuning", TITLE, text, rows, PREFACE))


def keep(
    rows: dict[str, dict[str, dict[str, Any]]], name: str, seed: int, row: dict[str, Any] | None
) -> None:
    """Put a row that is made into the table of all."""
    if row is not None:
        rows.setdefault(name, {})[str(seed)] = row


def shown(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table: the mean of each metric, and how far the seeds lie apart."""
    keys = [f"{name}/{metric}" for name, own in METRICS.items() for metric in own]
    lines = []
    for name, own in rows.items():
        cells = [
            spread([row[key] for row in own.values()]) if all(key in row for row in own.values()) else ""
            for key in keys
        ]
        lines.append([name, len(own), *cells])
    return table(["learned", "seeds", *keys], lines)


def compared(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the differences, at once less alone, of each seed."""
    lines = []
    for name, own in rows.items():
        if not name.startswith("at once"):
            continue
        for task, metrics in METRICS.items():
            alone = rows.get(f"{task} alone", {})
            for metric in metrics[:1]:
                key = f"{task}/{metric}"
                seeds = [seed for seed in own if seed in alone]
                differences = [own[seed][key] - alone[seed][key] for seed in seeds]
                if differences:
                    each = ", ".join(f"{one:+.3f}" for one in differences)
                    lines.append(f"- {name}, {key}: {mean(differences):+.3f} against alone ({each}).")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
