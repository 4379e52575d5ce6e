"""What is forgotten of a first domain while a second one is learned: texts, and classes.

    python -m tests.benchmarks.bench_continual classes --data ../shared/data --work /tmp/continual
    python -m tests.benchmarks.bench_continual texts --data ../shared/data --work /tmp/continual --seeds 17

Each way of remembering starts from the same model, which has learned the first domain, and takes the same steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from launcher.runs.layout import RunDirectory
from launcher.training.demo.models import model_directory
from tests.benchmarks._report import ROOT, conditions, sentence, table, write
from tests.benchmarks.tuning_plot import Point, scatter
from tests.benchmarks.tuning_runs import (
    PREFACE,
    Session,
    command_line,
    common,
    evaluations,
    minilm,
    spread,
    sst2,
)

IMAGES = ROOT / "docs" / "images"


class Way(NamedTuple):
    """A way of remembering: what it adds to the job of the second domain."""

    replay: float = 0.0
    """The share of the samples that are of the first domain."""
    alpha: float | None = None
    """That of L2 to the start; with `fisher` of EWC."""
    fisher: bool = False
    adapter: bool = False
    rate: float = 1.0
    """Times the learning rate."""


CLASSES = {
    "nothing": Way(),
    "replay, 5%": Way(replay=0.05),
    "replay, 20%": Way(replay=0.2),
    "L2 to the start, alpha 500": Way(alpha=500),
    "EWC, alpha 1e6": Way(alpha=1e6, fisher=True),
    "LoRA, rank 8": Way(adapter=True, rate=5),
}
TEXTS = {
    "nothing": Way(),
    "replay, 25%": Way(replay=0.25),
    "L2 to the start, alpha 500": Way(alpha=500),
    "LoRA, rank 8": Way(adapter=True, rate=5),
    "EWC, alpha 1e6": Way(alpha=1e6, fisher=True),
}


def main() -> None:
    """Train the first domain once for each seed, the second in each way, and write a section and a plot."""
    arguments = command_line(__doc__)
    arguments.add_argument("what", choices=("classes", "texts"))
    arguments.add_argument("--ways", nargs="+", help="only these")
    options = arguments.parse_args()
    options.work = options.work / options.what
    circumstances, session = conditions("torch", "transformers", "peft"), Session(options)
    (classes if options.what == "classes" else texts)(session, options, circumstances)


def second_job(job: dict[str, Any], way: Way, start: str, fisher: Callable[[], str]) -> dict[str, Any]:
    """Return the job of the second domain in a way; `job` has its data, and nothing else of the way."""
    job = json.loads(json.dumps(job))
    job["model"]["name"] = start
    job["training"]["learning_rate"] *= way.rate
    if way.alpha is not None:
        job["training"]["l2_sp"] = {"alpha": way.alpha} | ({"fisher": fisher()} if way.fisher else {})
    if way.adapter:
        job["model"]["adapter"] = {"rank": 8, "alpha": 16, "targets": "all-linear"}
    return job


def rows_of_ways(
    session: Session,
    options: argparse.Namespace,
    ways: dict[str, Way],
    first: Callable[[int], RunDirectory],
    measured: Callable[[str, RunDirectory], dict[str, Any]],
    second: Callable[[int, Way], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return {way: {seed: its row}}, as far as they are made; the model before the second domain is "before"."""
    rows: dict[str, dict[str, Any]] = {}
    chosen = {name: way for name, way in ways.items() if not options.ways or name in options.ways}
    for seed in options.seeds:

        def before(seed: int = seed) -> dict[str, Any]:
            return measured(f"first-{seed}", first(seed))

        made = {"before": session.row(f"first-{seed}", before)}
        for number, (name, way) in enumerate(chosen.items()):

            def trained(seed: int = seed, way: Way = way, number: int = number) -> dict[str, Any]:
                start = first(seed)
                directory = session.exported(start)
                job = second_job(
                    second(seed, way), way, directory, lambda: fisher_of(session, start, options)
                )
                name = f"second-{seed}-{list(ways.values()).index(way)}"
                return measured(name, session.run(name, job))

            made[name] = session.row(f"second-{seed}-{list(ways).index(name)}", trained)
        for name, row in made.items():
            if row is not None:
                rows.setdefault(name, {})[str(seed)] = row
    return rows


def fisher_of(session: Session, run: RunDirectory, options: argparse.Namespace) -> str:
    """Return the file of the Fisher information of the first domain."""
    num_rows = max(2, round((256 if options.what == "classes" else 64) * options.scale))
    log = f"{run.path.name}-fisher"
    on = session.work / f"old-train-{options.what}.jsonl"
    out = session.launcher(
        "evaluate", str(run.path), "--on", str(on), "--fisher", "--rows", str(num_rows), "--json", log=log
    )
    return str(json.loads(out)["file"])


# ---------------------------------------------------------------------------------------------- two sets of classes


def classes(session: Session, options: argparse.Namespace, circumstances: dict[str, Any]) -> None:
    """SST-2, then the classes of SICK's pairs, with a head each."""
    old_steps, new_steps, batch, rate = round(160 * options.scale), round(80 * options.scale), 32, 1.5e-4
    files = {
        "old": session.rows_of("old-train-classes", sst2(session, "train")),
        "new": session.rows_of("new-train", sick(session, "train")),
        "old test": session.rows_of("old", sst2(session, "dev")[:: round(1 / options.scale)]),
        "new test": session.rows_of("new", sick(session, "test")[:: round(5 / options.scale)]),
    }
    columns = {"old": {"text": "text", "label": "label"}}
    columns["new"] = {"text": ["sentence1", "sentence2"], "label": "entailment"}

    def job(seed: int, steps: int, name: str) -> dict[str, Any]:
        return common(batch, steps, rate, seed) | {
            "model": {"name": minilm(), "task": "sequence-classification"},
            "data": {
                "train": {"path": files[name]}, "evaluation": {"path": files[f"{name} test"]}, "max_length": 64,
            } | columns[name],
        }  # fmt: skip

    def first(seed: int) -> RunDirectory:
        return session.run(f"first-{seed}", job(seed, old_steps, "old"))

    def second(seed: int, way: Way) -> dict[str, Any]:
        content = job(seed, new_steps, "new")
        if (
            way.replay
        ):  # heads of several tasks are new, so that SST-2's is learned again from what is replayed
            shares = {"new": 1 - way.replay, "old": way.replay}
            content["model"]["task"] = "multi-task"
            content["data"] = {
                "tasks": {name: {"task": "sequence-classification"} | columns[name] for name in shares},
                "train": [{"path": files[name], "task": name, "weight": own} for name, own in shares.items()],
                "evaluation": [{"path": files[f"{name} test"], "task": name} for name in shares],
                "max_length": 64,
            }
        return content

    def measured(name: str, run: RunDirectory) -> dict[str, Any]:
        last = evaluations(run)[-1]
        if name.startswith("first"):
            return {"old": last["accuracy"]}
        if "new/accuracy" in last:
            return {"old": last["old/accuracy"], "new": last["new/accuracy"]}
        start = session.work / f"first-{name.split('-')[1]}"
        model = with_head(session.exported(run), f"{start}-model", session.work / f"{name}-old-head")
        on = str(session.work / "old.jsonl")
        shown = session.launcher(
            "evaluate", model, "--job", f"{start}.yaml", "--on", on, "--json", log=f"{name}-evaluate"
        )
        return {"old": json.loads(shown)["after"]["accuracy"], "new": last["accuracy"]}

    rows = rows_of_ways(session, options, CLASSES, first, measured, second)
    shown = [
        [
            name,
            len(own),
            *(
                spread([row[key] for row in own.values()]) if name != "before" or key == "old" else ""
                for key in ("old", "new")
            ),
        ]
        for name, own in rows.items()
    ]
    header = ["in the second training", "seeds", "accuracy, SST-2", "accuracy, SICK"]
    text = (
        f"{sentence(circumstances)}\n\nMiniLM-L6, 2 ranks, FSDP, bf16, AdamW at {rate:g} (linear, warm-up 0.1, weight decay 0.01), batches of {batch}. "
        f"First {old_steps} steps of SST-2, then {new_steps} of SICK's three classes, which get a head of their own. Measured on SST-2's dev (872 rows) "
        f"and every fifth row of SICK's test (982). SST-2 after the second training: its own head on the body as it is then, by `launcher "
        f"evaluate`. Replay is two tasks at once, whose heads are both new: SST-2's is learned again from what is replayed. LoRA has 5 times "
        f"the rate. EWC's Fisher information is of 256 rows.\n\n{table(header, shown)}\n"
        f"![Old against new](../images/continual-classes.svg)\n"
    )
    points = [
        Point(name, mean(row["new"] for row in own.values()), mean(row["old"] for row in own.values()),
              [(row["new"], row["old"]) for row in own.values()])
        for name, own in rows.items()
        if name != "before"
    ]  # fmt: skip
    drawing = scatter(
        "SST-2, then SICK: what is kept and what is learned", "accuracy on SICK", "accuracy on SST-2", points
    )
    finish(options, "Two sets of classes, one after the other", text, rows, drawing)


def sick(session: Session, split: str) -> list[dict[str, str]]:
    """Return SICK's pairs of sentences with their three classes."""
    with open(session.data / "sick" / f"{split}.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def with_head(body: str, head: str, target: Path) -> str:
    """Write one model's body with another model's head, and return the directory."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(head, target, dirs_exist_ok=True)
    own, other = (load_file(Path(directory) / "model.safetensors") for directory in (body, head))
    kept = {name: other[name] if name.startswith("classifier.") else own[name] for name in other}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


# -------------------------------------------------------------------------------------------- two domains of texts


def texts(session: Session, options: argparse.Namespace, circumstances: dict[str, Any]) -> None:
    """Python's documentation, then a novel, as causal language modelling."""
    steps, batch, length, rate = round(16 * options.scale), 4, 256, 1e-4
    sizes = {"old": (2000, 60), "new": (2000, 50)}
    files: dict[str, dict[str, str]] = {}
    for name, folder in (("old", "text_pydocs"), ("new", "text_novel")):
        for split, number in zip(("train", "valid"), sizes[name], strict=True):
            lines = (session.data / folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            number = number if split == "train" else max(4, round(number * options.scale))
            chosen = [
                {"text": json.loads(line)["text"]} for line in lines[:: max(1, len(lines) // number)][:number]
            ]
            file = name if split == "valid" else f"{name}-train-texts"
            files.setdefault(name, {})[split] = session.rows_of(file, chosen)
    held_out = [{"path": own["valid"], "alias": name} for name, own in files.items()]

    def job(seed: int) -> dict[str, Any]:
        return common(batch, steps, rate, seed) | {
            "model": {"name": str(model_directory("smollm2-135m")), "task": "causal-lm"},
            "data": {"text": "text", "max_length": length, "packing": True, "evaluation": held_out},
        }

    def first(seed: int) -> RunDirectory:
        content = job(seed)
        content["data"]["train"] = {"path": files["old"]["train"]}
        return session.run(f"first-{seed}", content)

    def second(seed: int, way: Way) -> dict[str, Any]:
        content = job(seed)
        new, old = ({"path": files[name]["train"], "alias": name} for name in ("new", "old"))
        replayed = [new | {"weight": 1 - way.replay}, old | {"weight": way.replay}]
        content["data"]["train"] = replayed if way.replay else [new]
        return content

    def measured(name: str, run: RunDirectory) -> dict[str, Any]:
        start, *_, end = evaluations(run)
        return {
            f"{part} {when}": metrics[f"{part}/loss"]
            for when, metrics in (("start", start), ("end", end))
            for part in ("old", "new")
        }

    rows = rows_of_ways(session, options, TEXTS, first, measured, second)
    untrained = {
        seed: {f"{part} end": row[f"{part} start"] for part in ("old", "new")}
        for seed, row in rows["before"].items()
    }
    shown = [
        [
            name,
            len(own),
            *(spread([row[f"{part} end"] for row in own.values()], 4) for part in ("old", "new")),
        ]
        for name, own in ({"SmolLM2 as it comes": untrained} | rows).items()
    ]
    header = ["in the second training", "seeds", "loss, documentation", "loss, novel"]
    checked = None
    if "nothing" in rows:
        checked = session.row("evaluate", lambda: by_evaluate(session, options.seeds[0]))
    text = (
        f"{sentence(circumstances)}\n\nSmolLM2-135M-Instruct, 2 ranks, FSDP, bf16, AdamW at {rate:g} (linear, warm-up 0.1, weight decay 0.01). First "
        f"{steps} steps of {batch} packs of {length} tokens of Python's documentation, then as many of a novel (Jack Sheppard). LoRA has 5 times "
        f"the rate. Measured on {sizes['old'][1]} and {sizes['new'][1]} held-out paragraphs: the loss of a token.\n\n{table(header, shown)}\n"
        f"![Old against new](../images/continual-texts.svg)\n"
    )
    points = [
        Point(name, mean(row["new end"] for row in own.values()), mean(row["old end"] for row in own.values()),
              [(row["new end"], row["old end"]) for row in own.values()])
        for name, own in rows.items()
    ]  # fmt: skip
    drawing = scatter(
        "Python's documentation, then a novel: what is kept and what is learned",
        "loss on the novel (lower is better)",
        "loss on the documentation (lower is better)",
        points,
    )
    finish(options, "Two domains of texts, one after the other", text, rows | {"evaluate": checked}, drawing)


def by_evaluate(session: Session, seed: int) -> dict[str, Any]:
    """Return what `launcher evaluate` shows of the run with nothing against forgetting."""
    run = str(session.work / f"second-{seed}-0")
    on = [part for name in ("old", "new") for part in ("--on", str(session.work / f"{name}.jsonl"))]
    sets = json.loads(session.launcher("evaluate", run, *on, "--json", log="evaluate"))["sets"]
    return {Path(one["on"]).stem: {"before": one["before"], "after": one["after"]} for one in sets}


def finish(options: argparse.Namespace, title: str, text: str, rows: dict[str, Any], drawing: str) -> None:
    """Write the section and its plot, or print both."""
    if options.dry:
        (options.work / "plot.svg").write_text(drawing, encoding="utf-8")
        print(text)
        return
    (IMAGES / f"continual-{options.what}.svg").write_text(drawing, encoding="utf-8")
    print(write("tuning", title, text, rows, PREFACE))


if __name__ == "__main__":
    main()
