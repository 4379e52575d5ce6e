"""Injects every fault of the matrix into real runs of a tiny model, and writes down what was seen.

    python -m tests.benchmarks.bench_fault_matrix /tmp/faults --list python -m
    tests.benchmarks.bench_fault_matrix /tmp/faults [--only rank_killed --only 23 ...] [--variant ZeRO-3]
    [--again] [--failed] python -m tests.benchmarks.bench_fault_matrix /tmp/faults --write

Two ranks on the CPU, a llama of 62,000 parameters in fp32, 40 steps, a checkpoint every 5. Each injection is
a function in tests/benchmarks/faults/, with the way in which the attempt must end. Afterwards the run is
resumed to its end, and held against one of the same engine and way of saving that was left alone: the hash of
each step's samples, and loss and gradient norm to the bit.

What was seen goes to a file below FOLDER/results as it is made. What is in there is not done again but with
--again, or --failed for what did not hold; several processes can inject side by side in one folder. --write
puts the table into docs/failures.md. Rows that cannot be injected on a machine say why.

Mounting, machines made of namespaces, and control groups need root; the shim needs gcc. All of it takes over
an hour on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks.faults import table
from tests.benchmarks.faults.material import EVERY, PATIENCE, TrainingInputs
from tests.benchmarks.faults.registry import INJECTIONS, PLAIN, Injection
from tests.benchmarks.faults.scene import Scene
from tests.slurm.runs import ROOT

for _module in ("ranks", "storage", "checkpoints", "surroundings", "inputs", "nodes"):
    importlib.import_module(f"tests.benchmarks.faults.{_module}")


def perform(injection: Injection, variant: str, material: TrainingInputs, folder: Path) -> dict[str, Any]:
    """Do it, and say what was seen and what of it is not as it must be."""
    result: dict[str, Any] = {
        "name": injection.name,
        "row": injection.row,
        "fault": injection.fault,
        "variant": variant,
    } | conditions()
    if reason := injection.missing():
        return result | {"missing": reason, "why_not": []}
    scene = Scene(injection, variant, material, folder)
    problem = ""
    try:
        injection.do(scene)
        if scene.process is not None:
            scene.end(injection.expected.seconds + 30)
            if injection.expected.resumes and scene.run.plan_file.exists():
                scene.resume()
                scene.compare()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:1500]
        traceback.print_exc()
    finally:
        scene.close()
    return result | scene.seen | {"checks": scene.checks, "why_not": judged(scene, problem)}


def conditions() -> dict[str, Any]:
    """When, of what commit, and how busy the machine was."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    load = round(os.getloadavg()[0], 1)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "load": load,
        "patience": PATIENCE[0],
    }


def judged(scene: Scene, problem: str) -> list[str]:
    """Everything that is not as it must be; an empty list where the row holds."""
    seen, expected = scene.seen, scene.expected
    found = [problem] if problem else []
    found += [f"not so: {what}" for what, holds in scene.checks.items() if not holds]
    if "code" not in seen:
        return found
    if seen["code"] is None:
        found.append(f"the launcher did not end within {expected.seconds + 30:g} s")
    elif expected.codes is not None and seen["code"] not in expected.codes and not seen.get("ended_by_hand"):
        found.append(f"exit code {seen['code']}, not {' or '.join(map(str, expected.codes))}")
    if expected.failure_class and seen["failure_class"] != expected.failure_class:
        found.append(f"class {seen['failure_class'] or 'none'}, not {expected.failure_class}")
    said = scene.output().lower()
    found += [f"not said: {word}" for word in expected.words if word.lower() not in said]
    if seen["left_over"]:
        found.append(f"{seen['left_over']} processes were left")
    if (seen["seconds_until_gone"] or 0) > expected.seconds * PATIENCE[0] and not seen.get("ended_by_hand"):
        found.append(f"all gone after {seen['seconds_until_gone']} s, not {expected.seconds:g}")
    return found + _of_the_comparison(scene)


def _of_the_comparison(scene: Scene) -> list[str]:
    seen, expected = scene.seen, scene.expected
    if "ids_equal" not in seen:
        return ["it was not compared with the undisturbed run"] if expected.resumes else []
    found = [] if seen["ids_equal"] else ["other samples than the undisturbed run"]
    if expected.bits and not seen["bits_equal"]:
        found.append("losses or gradient norms are not equal to the bit")
    lost, most = max(seen.get("steps_lost", 0), 0), expected.most_lost
    if most and scene.variant not in PLAIN:
        # While a save is under way, steps go on until the next one is due, which waits for it.
        most = max(most, 2 * EVERY)
    return [*found, f"{lost} steps were lost, at most {most} may be"] if lost > most else found


def wanted(options: argparse.Namespace, known: dict[str, Any]) -> list[tuple[Injection, str]]:
    """What is to be done now, in the order in which it was asked for; else each kind once, and those that
    wait long last."""
    chosen = []
    for injection in INJECTIONS:
        names = {injection.name, *injection.row.split(", ")}
        if (options.only and not names & set(options.only)) or names & set(options.without):
            continue
        for variant in injection.variants:
            old = known.get(table.key(injection.name, variant))
            again = options.again or old is None or (options.failed and old["why_not"])
            if again and options.variant in (None, variant):
                chosen.append((injection, variant))
    asked = {name: place for place, name in enumerate(options.only or ())}
    first = {
        one: min((asked[name] for name in {one.name, *one.row.split(", ")} if name in asked), default=0)
        for one, _ in chosen
    }
    return sorted(
        chosen,
        key=lambda pair: (first[pair[0]], pair[1] != pair[0].variants[0], pair[0].expected.seconds > 100),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results, models and runs")
    parser.add_argument(
        "--only", action="append", help="an injection's name, or a row; several times for several"
    )
    parser.add_argument("--variant", help="one engine and way of saving alone")
    parser.add_argument("--again", action="store_true", help="also what is in the results already")
    parser.add_argument("--failed", action="store_true", help="also what is in the results and did not hold")
    parser.add_argument("--without", action="append", default=[], help="as --only, to leave out")
    parser.add_argument("--list", action="store_true", help="what there is, and leave")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="everything may take so many times longer, as others use the machine",
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/failures.md")
    options = parser.parse_args()
    PATIENCE[0] = options.patience
    os.environ.setdefault("XDG_CACHE_HOME", str(options.folder / "cache"))
    os.environ.setdefault("XDG_STATE_HOME", str(options.folder / "state"))
    known = table.results(options.folder)
    if options.list:
        print(
            "\n".join(
                f"{one.row:8} {one.name:34} {one.fault} [{', '.join(one.variants)}]" for one in INJECTIONS
            )
        )
        return
    if options.write:
        table.write(INJECTIONS, known)
        return
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # ignored, as under nohup, the launchers that are started here would ignore it too
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that mounts and processes go
    material, until = TrainingInputs(options.folder), time.monotonic() + 60 * options.minutes
    for injection, variant in wanted(options, known):
        if time.monotonic() > until:
            break
        result = perform(injection, variant, material, options.folder / f"scene-{os.getpid()}")
        table.keep(options.folder, result)
        verdict = result.get("missing") or "; ".join(result["why_not"]) or "holds"
        print(
            f"{time.strftime('%H:%M:%S')} {injection.row:8} {table.key(injection.name, variant)}: {verdict}",
            flush=True,
        )


if __name__ == "__main__":
    main()
