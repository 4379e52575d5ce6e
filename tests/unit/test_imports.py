"""The direction of imports, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.commands import available

ROOT = Path(__file__).parents[2] / "launcher"
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "safetensors",
    "sklearn",
    "scipy",
    "pandas",
    "tokenizers",
}
SLOW_TO_START = HEAVY | {"numpy", "psutil", "rich", "pydantic"}
COMMAND_FILES = sorted(
    {ROOT / "cli" / f"{command.module}.py" for command in available().values()}
    | {ROOT / "cli/app.py", ROOT / "cli/commands.py", ROOT / "cli/main.py"}
)
FLOORS = {
    "errors": set(),
    "lazy": set(),
    "metrics": set(),
    "plain_files": set(),
    "redaction": set(),
    "values": set(),
    "runs": {"errors"},
    "report": {"errors", "runs", "sweep"},
    "data": {"errors", "values", "runs"},
    "tasks": {"errors", "values", "data"},
    "job": {"errors", "values", "data", "tasks"},
    "planner": {"errors", "values", "job", "runs", "data", "tasks"},
    "render": {"errors", "values", "job", "runs", "planner"},
    "importing": {"errors", "values", "job", "runs", "data", "tasks", "planner", "render"},
    "launch": {"errors", "values", "job", "runs", "tasks", "planner", "render"},
    "doctor": {"errors", "values", "job", "runs", "tasks", "planner", "render", "launch"},
    "board": {"errors", "runs", "report", "launch"},
    "sweep": {"errors", "values", "job", "runs", "tasks", "planner", "render", "launch"},
    "training": {"errors", "values", "job", "runs", "data", "tasks", "planner"},
    "cli": {
        "errors",
        "values",
        "job",
        "runs",
        "data",
        "tasks",
        "planner",
        "render",
        "importing",
        *("launch", "doctor", "sweep", "report", "board"),
        "training",
    },
}
"""What each package may import, besides itself."""
TRAINING_MAY_IMPORT = {
    *(
        "launcher.planner.plan",
        "launcher.planner.axes",
        "launcher.planner.limits",
        "launcher.planner.model.model_support",
    ),
    *("launcher.job.schema", "launcher.job.adapter", "launcher.job.training", "launcher.job.tuning"),
}
"""What will run, what is known of architectures, and what was asked."""
TASKS_MAY_IMPORT = {"launcher.training.heads", "launcher.training.distillation"}
"""The last steps of a model's forward pass: a task's loss calls them on a rank, where torch is there."""
TRACING_MAY_IMPORT = {
    "launcher.planner.memory.kernel_bytes",
    "launcher.planner.memory.profile",
    "launcher.planner.memory.program",
    "launcher.planner.memory.symbolic",
}
"""What writes a model down as the planner reads it."""


def package(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement that runs on import: not those in functions, nor those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_module_level(node)


def modules(nodes: Iterator[ast.AST]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = package(path)
    if own == "__init__":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {module for module in modules(ast.walk(tree)) if module.startswith("launcher.")}
    allowed = FLOORS[own] | {own, "__version__", "lazy", "metrics", "plain_files", "redaction"}
    may_import = TASKS_MAY_IMPORT if own == "tasks" else set()
    above = {module for module in imported if module.split(".")[1] not in allowed}
    assert {
        module
        for module in above
        if not any(module == may or module.startswith(f"{may}.") for may in may_import)
    } == set()
    if own == "training":
        may_import = TRAINING_MAY_IMPORT | (TRACING_MAY_IMPORT if path.parent.name == "tracing" else set())
        borrowed = {
            module
            for module in imported
            if module.split(".")[1] in ("planner", "job") and module.count(".") >= 2
        }
        assert {
            module
            for module in borrowed
            if not any(
                f"{module}.".startswith(f"{may}.") or may.startswith(f"{module}.") for may in may_import
            )
        } == set()


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if package(path) != "training"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_training_imports_heavy_packages_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {module.split(".")[0] for module in modules(at_module_level(tree))}
    assert top & HEAVY == set()


@pytest.mark.parametrize("path", COMMAND_FILES, ids=lambda path: path.name)
def test_commands_import_the_rest_only_when_called(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {module.split(".")[0] for module in modules(at_module_level(tree))}
    assert top & SLOW_TO_START == set()
    ours = {module for module in modules(at_module_level(tree)) if module.startswith("launcher.")}
    assert {
        module for module in ours if module.split(".")[1] not in ("errors", "cli", "__version__")
    } == set()


def circle(sources: dict[str, str]) -> list[str]:
    """The modules of one circle of imports; none where there is none. Those in functions and those for type
    checkers count: a reader follows them all."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(source)):
            imported = modules(iter([node])) & set(sources)
            # A package that a module is taken out of is no import of what its __init__ defines.
            packages = {module.rpartition(".")[0] for module in imported}
            graph[name] |= imported - packages
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_one_that_imports_it() -> None:
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES}
    sources = {
        name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for path, name in names.items()
    }
    assert circle(sources) == []
    assert circle({"a": "import b", "b": "def f():\n    from c import d", "c": "import a"}) != []
    assert circle({"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}) != []


def test_the_walk_sees_what_it_should() -> None:
    tree = ast.parse(
        "import torch\nif TYPE_CHECKING:\n    import numpy\ndef f():\n    import scipy\nclass A:\n    "
        "import rich\n"
    )
    assert modules(at_module_level(tree)) == {"torch", "rich"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", "{job}"],
        ["plan", "{job}"],
        ["schema"],
        ["help", "training.optimizer"],
        ["render", "{job}", "--out", "{job}.d"],
        ["diff", "{job}", "{job}"],
    ],
)
def test_no_torch_in_the_process(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a line\n")
    job = tmp_path / "job.yaml"
    job.write_text("name: a\nmodel: {name: org/model}\ndata: {train: {path: train.txt}, text: text}\n")
    program = (
        "import sys\n"
        "from launcher.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        f"heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "sys.exit('imported: ' + ' '.join(heavy) if heavy else 0)\n"
    )
    filled = [argument.format(job=job) for argument in arguments]
    result = subprocess.run(
        [sys.executable, "-c", program, *filled], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_help_imports_neither_typer_nor_pydantic() -> None:
    program = (
        "import sys\nfrom launcher.cli.main import main\nmain(['--help'])\nsys.exit(bool({'typer', "
        "'pydantic', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=600).returncode == 0
