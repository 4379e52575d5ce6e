"""The files in slurm/: the script says what the renderer says, the profile is one, the page's commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launcher.job import profile
from launcher.job.describe import keys
from launcher.job.load import load
from launcher.planner.search import plan_job as decide
from launcher.render import sbatch
from launcher.render.launch_paths import NODE, PREPARE, Place
from tests.unit.test_docs import lines_with_commands, parse_command, spans

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPT = (FOLDER / "train.sbatch").read_text(encoding="utf-8")
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_script_says_what_the_renderer_says(tmp_path: Path) -> None:
    """Line by line, but for the values, which are shell variables here. The agent sets the number of threads
    itself."""
    (tmp_path / "train.txt").write_text("a line\n")
    text = (
        "name: a\nmodel: {name: org/model}\ndata: {train: {path: train.txt}, text: text}\ncluster: "
        "{gpus_per_node: 0, nodes: 2}\n"
    )
    (tmp_path / "job.yaml").write_text(text)
    plan = decide(load(tmp_path / "job.yaml", []), 2, local=False)
    place = Place("/RUN", "/RUN/rendered", "/PYTHON")
    lines = SCRIPT.splitlines()
    for line in sbatch.before(plan, place):
        expected = line.replace("/PYTHON", '"$python"').replace("/RUN", '"$run"')
        assert expected in lines or expected.startswith("export OMP_NUM_THREADS="), line
    asked = sbatch.options(plan)
    assert {"#SBATCH --open-mode=append", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=1"} <= set(lines)
    assert (asked["open-mode"], asked["requeue"], asked["ntasks-per-node"]) == ("append", "", "1")
    assert f"#SBATCH --signal=USR2@{sbatch.SIGNAL_SECONDS}" in lines
    started = SCRIPT[SCRIPT.rindex("srun ") :]
    for option in sbatch.srun_options(plan, place):
        assert (option if "cpus-per-task" not in option else "--cpus-per-task=") in started
    assert f'"$python" -u -m {NODE} "$run"' in started
    assert next(line for line in PREPARE.splitlines() if line.strip().startswith("for file in")) in lines


@pytest.mark.parametrize("arguments", [[], ["nowhere"], [".", "more"], ["."]])
def test_the_script_refuses_what_is_no_run(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(FOLDER / "train.sbatch"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2 and f"RUN = '{(arguments or [''])[0]}': no plan.json in it" in done.stderr


def test_the_example_is_a_profile() -> None:
    found, asked = profile.read(FOLDER / "profiles" / "example.yaml")
    assert set(found.limits) == {"gpu", "debug", "cpu"} and found.limits["debug"].max_time == 1800
    assert {f"cluster.{key}" for key in asked} <= {key.path for key in keys()}


def test_the_page() -> None:
    for line in {
        *lines_with_commands(PAGE),
        *(span for span in spans(PAGE) if span.startswith("launcher ") and " " in span[9:]),
    }:
        parse_command(line)
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (FOLDER / target).is_file(), target
