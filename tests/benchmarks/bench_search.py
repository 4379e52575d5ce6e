"""A learning-rate range test and a search by TPE on SST-2, with their plots.

    python -m tests.benchmarks.bench_search --data ../shared/data --work /tmp/search

The range test's plot is the file that `launcher lr-find` writes, the search's a picture of its report.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks._report import ROOT, conditions, sentence, table, write
from tests.benchmarks.tuning_runs import PREFACE, Session, command_line, common, minilm, sst2
from tests.browser import Browser, installed

IMAGES = ROOT / "docs" / "images"
TITLE = "Learning rates: a range test and a search"
RANGES = {"training.learning_rate": (1e-5, 1e-2), "training.weight_decay": (1e-4, 0.3)}
BATCH, NUM_RANDOM = 32, 10
"""Samples of a step; points before those that the search chooses."""


def main() -> None:
    """Make the range test and the search, and write the section with both plots."""
    arguments = command_line(__doc__)
    arguments.add_argument("--points", type=int, default=14)
    options = arguments.parse_args()
    circumstances, session = conditions("torch", "transformers", "optuna"), Session(options)
    steps, test_steps = round(45 * options.scale), max(20, round(100 * options.scale))
    job = common(BATCH, steps, 1e-4, 17) | {
        "name": "sst2-search",
        "model": {"name": minilm(), "task": "sequence-classification"},
        "data": {
            "train": {"path": session.rows_of("train", sst2(session, "train"))},
            "evaluation": {
                "path": session.rows_of("dev", sst2(session, "dev")[: round(872 * options.scale)])
            },
            "text": "text",
            "label": "label",
            "max_length": 64,
        },
    }
    file = session.work / "sst2-search.yaml"
    file.write_text(json.dumps(job, indent=1), encoding="utf-8")
    directory = session.work / "lr-find"

    def range_test() -> dict[str, Any]:
        # It exits with 1 if there is nothing to suggest, which is a result too.
        session.launcher(
            "lr-find", str(file), "--steps", str(test_steps), "--from", "1e-6", "--to", "0.1", "--run-dir", str(directory),
            log="lr-find", may_fail=True,
        )  # fmt: skip
        result = dict(json.loads((directory / "lr-find.json").read_text(encoding="utf-8")))
        del result["run"]
        return result

    def search() -> dict[str, Any]:
        ranges = [
            part
            for key, (low, high) in RANGES.items()
            for part in ("--random", f"{key}={low:g}..{high:g}:log")
        ]
        sweep = session.work / "sweep"
        command = ["sweep", str(sweep)]
        if not sweep.exists():
            more = ["--search", "tpe", "--metric", "accuracy", "--out", str(sweep)]
            command = ["sweep", str(file), *ranges, "--points", str(options.points), *more]
        if options.minutes > 0:
            budget = f"{options.minutes:.1f}min"
            session.launcher(*command, "--local", "--budget", budget, log="sweep", may_fail=True)
        best = session.work / "best.yaml"
        best.unlink(missing_ok=True)
        session.launcher("sweep", str(sweep), "--apply", str(best), log="apply", may_fail=True)
        shown = json.loads(
            session.launcher("sweep", str(sweep), "--show", "--json", log="show", may_fail=True)
        )
        points = [
            {"point": one["point"], "best": one["best"], "state": one["state"]}
            | {"values": dict(text.partition("=")[::2] for text in one["overrides"])}
            for one in shown["points"]
        ]
        return {"points": points, "applied": best.exists()}

    tested, searched = session.row("lr-find", range_test), search()
    text = f"{sentence(circumstances)}\n\n{described(steps)}\n\n"
    if tested is not None:
        if not options.dry:
            shutil.copy(directory / "lr-find.svg", IMAGES / "lr-find-sst2.svg")
        text += told_test(tested)
    if searched is not None:
        text += told_search(searched["points"], options.points)
        session.launcher(
            "report", str(session.work / "sweep"), "-o", str(session.work / "sweep.html"), log="report"
        )
        picture(
            session.work / "sweep.html",
            (options.work if options.dry else IMAGES) / "tpe-sst2.png",
            session.work,
        )
    raw = {"lr-find": tested, "search": searched}
    print(text if options.dry else write("tuning", TITLE, text, raw, PREFACE))


def described(steps: int) -> str:
    """Return the conditions."""
    return (
        f"MiniLM-L6 on SST-2, 2 ranks, FSDP, bf16, batches of {BATCH}, AdamW with a linear schedule (warm-up 0.1), {steps} steps a point of the "
        f"search. Accuracy on the rows of dev."
    )


def told_test(result: dict[str, Any]) -> str:
    """Return what the range test came to."""
    return (
        f"`launcher lr-find sst2-search.yaml --steps {result['steps']} --from {result['from']:g} --to {result['to']:g}` suggests "
        f"{result['suggestion']}: {result['reason']}. It took {len(result['rates'])} steps and {result['seconds']} s.\n\n"
        f"![The range test](../images/lr-find-sst2.svg)\n\n"
    )


def told_search(points: list[dict[str, Any]], wanted: int) -> str:
    """Return the search's best and worst points, and what the random and the later ones came to."""
    known = [one for one in points if one["best"] is not None]
    rows = [
        [one["point"], *(f"{float(one['values'][key]):.2g}" for key in RANGES), f"{one['best']:.4f}"]
        for one in [*known[:3], *known[-2:]]
    ]
    random, chosen = (
        [one["best"] for one in known if (one["point"] < NUM_RANDOM) == first] for first in (True, False)
    )
    text = (
        f"`launcher sweep sst2-search.yaml --search tpe --points {wanted} --metric accuracy --local` over "
        f"{' and '.join(f'`{key}` from {low:g} to {high:g}' for key, (low, high) in RANGES.items())}, by magnitude. "
        f"The best three and the worst two of {len(known)} points:\n\n"
        f"{table(['point', *(key.rpartition('.')[2] for key in RANGES), 'accuracy'], rows)}\n"
    )
    if chosen:
        text += (
            f"The first {len(random)} points are random: mean accuracy {mean(random):.4f}, best {max(random):.4f}. The {len(chosen)} that the "
            f"search chose: mean {mean(chosen):.4f}, best {max(chosen):.4f}.\n\n"
        )
    return text + "The sweep's report, `launcher report sweep`:\n\n![The search](../images/tpe-sst2.png)\n"


def picture(page: Path, target: Path, scratch: Path) -> None:
    """Draw a report's table and curves, if a browser is on this machine."""
    if installed() is None:
        print(f"no browser: {target} is not drawn anew")
        return
    with Browser(scratch / "profile") as browser:
        browser.open(page, 1280, height=1020)
        browser.picture(target)


if __name__ == "__main__":
    main()
