"""The wheel and the sdist: everything that the commands read is in them, and nothing of the clone is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from launcher import __version__
from launcher.launch.slurm.snapshot import of_launcher
from launcher.runs.layout import RunDirectory
from launcher.training.demo.models import PACKAGES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"


def build(project: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist and the wheel of a project's tree, without an environment of their own."""
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=project, check=True, capture_output=True)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of a copy of this tree: a build writes into the tree that it is of."""
    copy = tmp_path_factory.mktemp("build") / "clone"
    hidden = shutil.ignore_patterns("__pycache__", "*.pyc", "benchmarks", "images")
    for name in ("launcher", "docs", "tests/unit"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    return build(copy, tmp_path_factory.mktemp("dist"))


def files_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_has_what_the_package_reads_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = files_of(built[1])
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "launcher").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "pages" not in path.parts
    }
    hidden = {"architecture.md", "log.md", "log-2026-11.md"}
    pages = {
        path.relative_to(ROOT / "docs")
        for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")]
    }
    carried = {f"launcher/pages/{page}" for page in pages if page.name not in hidden}
    distribution = f"finetune_launcher-{__version__}"
    assert {name for name in names if name.startswith("launcher/")} == package | carried
    rest = {name for name in names if not name.startswith("launcher/")}
    assert rest - {name for name in rest if name.startswith(f"{distribution}.dist-info/")} == {
        f"{distribution}.data/data/share/man/man1/launcher.1"
    }


@pytest.mark.very_slow
def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    _, wheel = build(tmp_path / f"finetune_launcher-{__version__}", tmp_path / "dist")
    assert files_of(wheel) == files_of(built[1])
    first, again = (zipfile.ZipFile(path) for path in (built[1], wheel))
    differing = {name for name in first.namelist() if first.read(name) != again.read(name)}
    assert {Path(name).name for name in differing} <= {"RECORD", "METADATA"}


@pytest.mark.slow
def test_what_the_wheel_says_of_itself(built: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(built[1])
    text = archive.read(f"finetune_launcher-{__version__}.dist-info/METADATA").decode()
    metadata = HeaderParser().parsestr(text)
    assert (metadata["Name"], metadata["Version"]) == ("finetune-launcher", __version__)
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra") or ()) == set(extras)
    assert f"## {__version__}" in (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--version"], f"launcher {__version__}\n"),
        (["--help"], "Usage: launcher"),
        (["help", "training.optimizer"], "training.optimizer: one of adamw"),
        (["schema"], '"$schema"'),
        (["plan", "job.yaml", "--gpu", "h100-80gb"], "activation"),
        (["report", "nothing"], "nothing"),
    ],
)
def test_it_works_without_the_clone(
    built: tuple[Path, Path], tmp_path: Path, arguments: list[str], shown: str
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(built[1]).extractall(site)
    sizes = "n_layer: 2, n_embd: 64, n_head: 2, n_positions: 64, vocab_size: 100"
    model = f"{{name: a/b, config: {{model_type: gpt2, {sizes}}}}}"
    data = "{train: {path: train.txt}, text: text, max_length: 64}"
    (tmp_path / "job.yaml").write_text(f"name: a\nmodel: {model}\ndata: {data}\n")
    (tmp_path / "train.txt").write_text("one line\n" * 20)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import launcher.cli.main as cli\n"
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__; cli.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert shown in done.stdout + done.stderr


def test_the_copy_for_a_job_leaves_the_pages_out(tmp_path: Path) -> None:
    copy = of_launcher(RunDirectory(tmp_path)) / "launcher"
    assert (copy / "cli" / "help.py").is_file() and (copy / "report" / "page.css").is_file()
    assert not (copy / "pages").exists()


def test_versions_stand_in_one_place() -> None:
    """The Makefile and the recipes of containers pin nothing that constraints.txt does not."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    models = re.search(r"^MODELS := (.*)$", makefile, re.MULTILINE)
    deepspeed = re.search(r"^DEEPSPEED := (.*)$", makefile, re.MULTILINE)
    assert models is not None and deepspeed is not None
    assert models[1].split() == [package.requirement for package in PACKAGES.values()]
    assert deepspeed[1] in constraints
    recipes = [(ROOT / "docs" / "containers" / name).read_text() for name in ("Dockerfile", "launcher.def")]
    tested = PROJECT["tool"]["mypy"]["python_version"]
    for recipe in recipes:
        assert set(re.findall(r"python:([\w.-]+)", recipe)) == {f"{tested}-slim"}
        assert "constraints.txt" in recipe and "==" not in recipe


def test_all_is_every_extra_that_one_machine_can_want() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    within = extras["all"][0].removeprefix("finetune-launcher[").removesuffix("]").split(",")
    assert set(within) == set(extras) - {"all", "dev", "wandb", "mlflow", "trackio"}
