"""What was seen of hostile or huge input: job files, secrets, snapshots, and runs of a million steps."""

from __future__ import annotations

import json
import os
import subprocess

from launcher.runs.layout import RunDirectory
from tests.benchmarks.faults.material import LAUNCHER, PATIENCE
from tests.benchmarks.faults.registry import Expected, injection
from tests.benchmarks.faults.scene import Scene

ASKED = Expected(codes=None, resumes=False)
NUM_LINES = 1_000_000


@injection("S12", "a job file with YAML aliases of aliases", ASKED)
def alias_bomb(scene: Scene) -> None:
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)),
    ]
    job = scene.folder / "bomb.yaml"
    job.write_text("\n".join(lines) + "\n")
    for command in ("validate", "plan", "import"):
        with scene.stopwatch(f"seconds_of_{command}"):
            done = scene.ask(command, str(job), seconds=20)
        scene.check(
            f"`{command}` refuses it within 5 s",
            done.returncode == 2 and scene.seen[f"seconds_of_{command}"] < 5 * PATIENCE[0],
        )


@injection("S12", "a model of a thousand million layers", ASKED)
def absurd_layers(scene: Scene) -> None:
    job = scene.material.job(
        scene.folder / "job.yaml", scene.variant, {"model": {"config": {"num_hidden_layers": 1_000_000_000}}}
    )
    with scene.stopwatch("seconds_of_plan"):
        done = scene.ask("plan", str(job), seconds=20)
    scene.seen["line"] = done.stderr.strip()[-300:]
    scene.check(
        "`plan` refuses it within 5 s",
        done.returncode == 2 and scene.seen["seconds_of_plan"] < 5 * PATIENCE[0],
    )


@injection("S12", "secrets in variables whose names do not tell", ASKED)
def secrets_by_value(scene: Scene) -> None:
    secrets = {
        "NCCL_COMMENT": "hf_" + "a" * 34,
        "LAUNCHER_X": "ghp_" + "b" * 36,
        "HF_TOKEN": "hf_" + "c" * 34,
    }
    scene.start("--stop-at", "2", more=secrets)
    scene.wait_end(90)
    for name, value in secrets.items():
        where = [
            path
            for path in scene.run.path.rglob("*")
            if path.is_file() and value.encode() in path.read_bytes()
        ]
        scene.check(f"{name} is nowhere in the run directory", not where)


@injection("S11", "an untracked .env and a link that leads outside, in a snapshot", ASKED)
def snapshot(scene: Scene) -> None:
    from launcher.launch.slurm.snapshot import of_script

    folder = scene.folder / "project"
    folder.mkdir()
    (folder / "train.py").write_text("print('trains')\n")
    outside = scene.folder / "outside.py"
    outside.write_text("SECRET = 1\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", "train.py"], check=True)
    (folder / ".env").write_text("HF_TOKEN=hf_secret\n")
    (folder / "leads_outside.py").symlink_to(outside)
    run = RunDirectory(scene.folder / "run")
    run.path.mkdir()
    of_script(run, folder / "train.py")
    names = [path for path in run.path.rglob("*") if path.is_file()]
    scene.check("the script is there", any(path.name == "train.py" for path in names))
    scene.check(".env is left out", all(path.name != ".env" for path in names))
    scene.check("no content from outside", all(b"SECRET" not in path.read_bytes() for path in names))


def _million(scene: Scene) -> RunDirectory:
    """A run of a million steps, as its files would be; from one that was stopped."""
    scene.copy_stopped()
    lines = scene.run.metrics_file.read_text().splitlines()
    record = next(json.loads(line) for line in reversed(lines) if '"train"' in line)
    with scene.run.metrics_file.open("w") as file:
        for step in range(1, NUM_LINES + 1):
            file.write(json.dumps(record | {"step": step, "time": record["time"] + step * 0.1}) + "\n")
    event = next(line for line in scene.run.events_file.read_text().splitlines() if '"saved"' in line)
    with scene.run.events_file.open("a") as file:
        for number in range(42_000):
            file.write(event.replace('"step": 10', f'"step": {number}') + "\n")
    return scene.run


def _measure(scene: Scene, name: str, *arguments: str) -> None:
    """Seconds of processor time and memory of a command, beside the first that was measured: others use the
    machine too."""
    code = (
        "import json, resource, subprocess, sys\n"
        "try:\n    done = subprocess.run(sys.argv[1:], capture_output=True, timeout=240).returncode\n"
        "except subprocess.TimeoutExpired:\n    done = 124\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done]))\n"
    )
    said = scene.python(code, *LAUNCHER, *arguments).stdout
    seconds, megabytes, _ = json.loads(said)
    scene.seen[name] = f"{seconds:.1f} s, {megabytes:.0f} MB"
    scene.seen.setdefault("start_seconds", seconds)
    scene.check(
        f"{name}: at most 1 s over the start of the program, and 200 MB",
        seconds - scene.seen["start_seconds"] < 1 and megabytes < 200,
    )


@injection("S4", "a run of a million steps: status, list, watch, summary", ASKED)
def million(scene: Scene) -> None:
    run = _million(scene)
    scene.ask("watch", str(run.path), "--json", seconds=120)  # what a launcher sums up as the run goes
    for name, arguments in {
        "status of a short run": ("status", str(scene.material.stopped(scene.variant).path)),
        "status": ("status", str(run.path)),
        "list": ("list", str(run.path.parent)),
        "watch --json": ("watch", str(run.path), "--json"),
        "checkpoint list": ("checkpoint", "list", str(run.path)),
        "logs": ("logs", str(run.path)),
    }.items():
        _measure(scene, name, *arguments)
    code = (
        "import resource, sys, time\nfrom pathlib import Path\nfrom launcher.cli.display import summary\n"
        "from launcher.runs.layout import RunDirectory\nfrom launcher.planner.plan import Plan\n"
        "from launcher.runs.totals import Totals\nfrom launcher.launch.slurm.deadline import lead_seconds\n"
        "run = RunDirectory(Path(sys.argv[1]))\nbegan = time.process_time()\n"
        "lead_seconds(run, Plan.read(run.plan_file), Totals(run))\nprint(time.process_time() - began)\n"
        "began = time.process_time()\nsummary(run, 'run')\n"
        "print(time.process_time() - began)\n"
    )
    done = scene.python(code, str(run.path))
    for name, seconds in zip(("lead_seconds", "summary"), done.stdout.split(), strict=False):
        scene.seen[name] = f"{float(seconds):.2f} s"
        scene.check(f"{name} takes at most 1 s", float(seconds) < 1)
    scene.check("both could be asked", len(done.stdout.split()) == 2)
    run.metrics_file.unlink()


@injection("S4", "a directory of temporary files for each attempt", Expected(seconds=60))
def temporary_files(scene: Scene) -> None:
    place = scene.folder / "tmp"
    place.mkdir()
    scene.start(more={"TMPDIR": str(place)})
    scene.hit()
    scene.wait_end(90)
    scene.seen["left"] = sorted(path.name for path in place.iterdir())[:3]
    scene.check("nothing is left in TMPDIR", not any(place.iterdir()))


@injection("S12", "files of a run under a strict umask (077)", ASKED)
def strict_umask(scene: Scene) -> None:
    before = os.umask(0o077)
    try:
        scene.start("--stop-at", "6")
        scene.wait_end(90)
    finally:
        os.umask(before)
    open_ones = [
        path.name
        for path in scene.run.path.rglob("*")
        if not path.is_symlink() and path.stat().st_mode & 0o077
    ]
    scene.seen["open"] = open_ones[:5]
    scene.check("no file is open to others", not open_ones)


@injection(
    "S12",
    "a memory limit that is too low to import (RLIMIT_AS 800 MB)",
    Expected(None, seconds=60, resumes=False),
)
def address_space(scene: Scene) -> None:
    scene.start("--force", address_space=800 << 20)
    scene.hit()
    scene.wait_end(90)
    scene.check("it is called out of memory (code 4)", scene.process.returncode == 4)  # type: ignore[union-attr]
    scene.give_up()
