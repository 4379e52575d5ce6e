"""The memory model against the allocator: configurations drawn at random, each run on real gloo ranks.

    python -m tests.benchmarks.bench_memory --seed 5 --count 120
    python -m tests.benchmarks.bench_memory --seed 5 --count 40 --media

Writes docs/benchmarks/memory.md. `--only N` runs one of them and says what was live at its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _report import conditions, sentence, table, write

from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.memory.profile import Profile
from launcher.planner.model.model_config import read_config
from launcher.planner.plan import Plan
from tests.benchmarks.memory_cases import Case, draw
from tests.benchmarks.memory_media import draw_media
from tests.benchmarks.memory_pool import World

PREFACE = """# The memory model against the allocator

`python -m tests.benchmarks.bench_memory --seed S --count N` draws configurations at random and runs two steps of each
on real gloo ranks. The peak of live tensor bytes of the second step (from the allocator's own events, the rank that
needs most) is compared with what the planner says of it: by the profile of the model's own class, at one, two and
eight samples, and for decoders by the formulas too. A run after whose steps more than 1% of the peak seems to stay is
measured again, up to twice, and the lowest counts: gloo's threads release memory where the profiler does not see it.
Models are tiny, so what is constant weighs more than it would in a real one. An error above 0 is a plan that asks for
too much, below 0 for too little.
"""


COLUMNS = ("median", "95th percentile", "most under", "most over")


def main() -> None:
    """Measure, compare, write the page."""
    options = parse()
    found = conditions("torch", "transformers", "deepspeed")
    cases = [
        case
        for case in (draw_media if options.media else draw)(options.seed, options.count)
        if options.only is None or case.number in options.only
    ]
    cases.sort(key=lambda case: (case.world_size, case.number))
    rows = measure(cases, explains=options.only is not None, budget=options.minutes * 60, kept=options.keep)
    if options.only is None and not options.dry:
        title = f"Seed {options.seed}, {len(rows)} configurations"
        print(
            write(
                "memory", title, describe(rows, options, found), {"conditions": found, "rows": rows}, PREFACE
            )
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--media", action="store_true", help="models that see and hear")
    parser.add_argument("--only", type=int, nargs="*", default=None, help="numbers of cases, explained")
    parser.add_argument("--minutes", type=float, default=60, help="measure no further case after so long")
    parser.add_argument(
        "--keep",
        type=Path,
        default=None,
        help="JSON lines of cases measured before, which are not measured again",
    )
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    return parser.parse_args()


def prepared(case: Case, directory: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan of a case, and what profile and formulas say of it."""
    from launcher.training.tracing.make_profile import make_profile

    plan = case.plan(directory)
    profile = Profile.from_json(json.loads(json.dumps(make_profile(plan).to_json())))
    assert profile.untraceable is None, (case, profile.untraceable)
    plan = case.with_buckets(plan, profile.units())
    steady = Estimator(plan, profile).footprint().phase("steady step")
    formulas = formulas_of(plan, read_config(str(directory)) or {})
    said = {"predicted": steady.peak, "where": steady.where, "formulas": None}
    if formulas is not None:
        said["formulas"] = Estimator(plan, formulas).footprint().phase("steady step").peak
    return plan, said


def measure(
    cases: list[Case], explains: bool = False, budget: float = 1e9, kept: Path | None = None
) -> list[dict[str, Any]]:
    """A row for each case; ranks are started once for each number of them."""
    from tests.benchmarks.memory_ranks import Request
    from tests.benchmarks.memory_ranks import measure as on_rank

    begun, rows = time.monotonic(), []
    before = (
        {row["number"]: row for row in map(json.loads, kept.read_text().splitlines())}
        if kept and kept.exists()
        else {}
    )
    world: World | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases:
            if case.number not in before and time.monotonic() - begun > budget:
                continue
            directory = Path(scratch) / str(case.number)
            plan, said = prepared(case, directory)
            row = {"number": case.number, "case": case.describe()} | said
            if case.number in before:
                row["measured"] = before[case.number]["measured"]
            else:
                world = _world(world, case.world_size)
                results = settled(world, on_rank, Request(plan, case.lengths, explains=explains))
                row["measured"] = max(result["peaks"]["steady step"] for result in results)
                if kept is not None:
                    with open(kept, "a") as file:
                        file.write(json.dumps({"number": case.number, "measured": row["measured"]}) + "\n")
                if explains:
                    _explain(results)
            row["error"] = row["predicted"] / row["measured"] - 1
            row["formula_error"] = None if row["formulas"] is None else row["formulas"] / row["measured"] - 1
            rows.append(row | _facts(case))
            print(line(rows[-1]), flush=True)
    if world is not None:
        world.close()
    return rows


def settled(world: World, on_rank: Any, request: Any) -> list[dict[str, Any]]:
    """Measured again where memory seems to stay after a step: gloo's threads released it, which the profiler
    does not see."""
    tries = []
    for _ in range(3):
        results = world.call(on_rank, request)
        stays = max(
            (r["ends"]["steady step"] - r["ends"]["loading"]) / r["peaks"]["steady step"] for r in results
        )
        tries.append((max(r["peaks"]["steady step"] for r in results), results))
        if stays <= 0.01:
            break
    return min(tries, key=lambda one: one[0])[1]


def _world(world: World | None, size: int) -> World:
    if world is not None and len(world.pipes) == size:
        return world
    if world is not None:
        world.close()
    return World(size)


def _facts(case: Case) -> dict[str, Any]:
    return {
        "ranks": case.world_size,
        "engine": case.engine,
        "precision": case.precision,
        "optimizer": case.optimizer,
        "checkpointing": case.checkpointing,
        "frozen": bool(case.freeze),
        "tokens": sum(case.lengths),
        "adapter": case.adapter is not None,
        "samples": len(case.lengths),
        "passes": case.accumulation,
    }


def _explain(results: list[dict[str, Any]]) -> None:
    highest = max(results, key=lambda result: result["peaks"]["steady step"])
    print(highest["peaks"], highest["ends"])
    for size, count, where in highest["explained"][:60]:
        print("    ", size, count, where)


def line(row: dict[str, Any]) -> str:
    facts = " ".join(
        str(row[key])
        for key in (
            "ranks",
            "engine",
            "precision",
            "optimizer",
            "checkpointing",
            "frozen",
            "adapter",
            "tokens",
            "passes",
        )
    )
    formulas = "" if row["formula_error"] is None else f"{row['formula_error']:+7.2%}"
    errors = f"{row['error']:+7.2%} {formulas:7}"
    return (
        f"{row['number']:4} {errors} {row['measured'] / 2**20:8.2f} {row['case']:32} {facts} ({row['where']})"
    )


def summary(rows: list[dict[str, Any]], kind: str = "error") -> dict[str, float]:
    """The errors of many rows in four numbers; `formula_error` are those of the formulas."""
    sizes = sorted(abs(row[kind]) for row in rows)
    return {
        "configurations": len(rows),
        "median": median(sizes),
        "95th percentile": sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
        "most under": min(0.0, *(row[kind] for row in rows)),
        "most over": max(0.0, *(row[kind] for row in rows)),
    }


def verdicts(
    rows: list[dict[str, Any]], seed: int, count: int = 200, predicted: str = "predicted"
) -> dict[str, Any]:
    """Whether "fits" is said rightly of limits drawn between half and twice what was measured, and of limits
    within 5% of it."""
    generator, said = random.Random(seed), {"any": [0, 0], "near": [0, 0]}
    for number in range(count):
        row = rows[number % len(rows)]
        for kind, width in (("any", math.log(2)), ("near", 0.05)):
            limit = row["measured"] * math.exp(generator.uniform(-width, width))
            said[kind][0] += (row[predicted] <= limit) == (row["measured"] <= limit)
            said[kind][1] += 1
    return {kind: {"right": right, "of": of} for kind, (right, of) in said.items()}


def describe(rows: list[dict[str, Any]], options: argparse.Namespace, found: dict[str, Any]) -> str:
    """The section of the page."""
    groups: dict[str, list[dict[str, Any]]] = {"all": rows}
    for key in ("engine", "precision", "checkpointing", "optimizer", "ranks", "frozen", "adapter"):
        for value in sorted({str(row[key]) for row in rows}):
            groups[f"{key} {value}"] = [row for row in rows if str(row[key]) == value]
    for family in sorted({row["case"].split()[0] for row in rows}):
        groups[family] = [row for row in rows if row["case"].split()[0] == family]
    lines = []
    for name, group in groups.items():
        known = [row for row in group if row["formula_error"] is not None]
        ours = summary(group)
        theirs = summary(known, "formula_error") if known else {}
        cells = [f"{ours[key]:+.2%}" for key in COLUMNS]
        cells += [f"{theirs[key]:+.2%}" if theirs else "" for key in COLUMNS]
        lines.append([name, len(group), *cells])
    said = verdicts(rows, options.seed)
    verdict = (
        f"The verdict fits or not, the bare figure against the limit: right of {said['any']['right']} "
        f"of {said['any']['of']} limits between half and twice what was measured, of {said['near']['right']} "
        f"of {said['near']['of']} within 5% of it."
    )
    kept = []
    for row in sorted(rows, key=lambda row: -abs(row["error"]))[:12]:
        formulas = "" if row["formula_error"] is None else f"{row['formula_error']:+.2%}"
        measured = f"{row['measured'] / 2**20:.1f} MiB"
        kept.append([f"{row['error']:+.2%}", formulas, measured, line(row)[30:].strip()])
    facts = "ranks, engine, precision, optimizer, checkpointing, frozen, adapter, tokens, passes, where"
    heads = ["group", "configurations", *COLUMNS, *(f"formulas: {name}" for name in COLUMNS)]
    return (
        f"{sentence(found)}\n\nSeed {options.seed}. Errors are (predicted - measured) / measured; "
        f"median and percentile of their size.\n\n{table(heads, lines)}\n{verdict}\n\nThe worst:\n\n"
        + table(["error", "formulas", "measured", f"configuration ({facts})"], kept)
    )


if __name__ == "__main__":
    main()
