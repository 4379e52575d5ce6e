"""The tree in docs/architecture.md is the tree of modules, in the words of their docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.architecture_tree import BEGIN, END, PAGE, ROOT, summary, tree, with_tree

PACKAGE = ROOT / "launcher"
MODULES = sorted(PACKAGE.rglob("*.py"))
INDIRECT = re.compile(r"(Of|As|Those|These)\b")
CLAUSE = re.compile(r"(Of|As|So|That|Those|These|The same|What|Whether|Which|How|Why|Where|When|Who)\b")
"""With which a docstring begins that names neither what is done nor what is returned."""


def test_the_tree_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tree(page, PACKAGE) == page, "run `make docs`"


def test_the_tree_has_every_module() -> None:
    names = [line.split()[0] for line in tree(PACKAGE).splitlines() if not line.startswith(" " * 29)]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(
        module.name for module in MODULES if module.name != "__init__.py"
    )
    assert sorted(name for name in names if name.endswith("/")) == sorted(
        f"{module.parent.name}/" for module in MODULES if module.name == "__init__.py"
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_in_one_line(module: Path) -> None:
    documentation = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    first, _, rest = documentation.partition("\n")
    assert first.endswith("."), "the first line of the docstring is a whole sentence or phrase"
    assert len(first) <= 135
    assert not INDIRECT.match(first), "begin with a verb or with the thing itself"
    assert not rest or rest.startswith("\n"), "a blank line follows the first"


def clauses(source: str) -> list[str]:
    """Return the functions and classes whose docstring begins with a clause in place of a verb or a noun."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]
    return [node.name for node in nodes if CLAUSE.match(ast.get_docstring(node) or "")]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_what_is_done_or_returned(module: Path) -> None:
    assert clauses(module.read_text(encoding="utf-8")) == [], "begin with a verb in the imperative"


def participles(source: str) -> list[str]:
    """Return the variables of functions that are named by what was done (`found`), not by what they hold."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    names = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)]
    return [
        f"{name.id}, line {name.lineno}"
        for name in names
        if isinstance(name.ctx, ast.Store) and name.id in ("found", "made", "said", "asked")
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_are_named_by_what_they_hold(module: Path) -> None:
    assert participles(module.read_text(encoding="utf-8")) == []


def test_a_variable_that_is_named_by_what_was_done_is_noticed() -> None:
    source = "def f():\n    found = [1]\n    for made in found:\n        rows = made.said\n"
    assert participles(source) == ["found, line 2", "made, line 3"]


def test_a_docstring_that_begins_with_a_clause_is_noticed() -> None:
    good = 'def f():\n    """Return the number of rows."""\n'
    wrong = 'class A:\n    """Of a rank in one step."""\n    def g(self):\n        """Whether it is."""\n'
    assert clauses(good) == [] and sorted(clauses(wrong)) == ["A", "g"]


def package(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A package."""\n')
    (folder / "b.py").write_text('"""Do b.\n\nMore of it.\n"""\nimport a_module_that_does_not_exist\n')
    (folder / "a.py").write_text("")
    (folder / "inner" / "__init__.py").write_text(f'"""{"words " * 20}end."""\n')
    (folder / "not_python").mkdir()
    return folder


def test_a_tree_reads_docstrings_and_imports_nothing(tmp_path: Path) -> None:
    lines = tree(package(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["pack/", "a.py", "b.py", "inner/"]
    assert lines[1] == "  a.py"
    assert lines[2] == "  b.py".ljust(30) + "Do b"
    assert lines[4].startswith(" " * 30 + "words") and lines[4].endswith(" end")
    assert all(len(line) <= 120 for line in lines)
    assert summary(tmp_path / "pack" / "b.py") == "Do b."


def test_the_tree_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    page = with_tree(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", package(tmp_path))
    assert page.startswith(f"before\n\n{BEGIN}\n```\npack/ ") and page.endswith(f"\n```\n{END}\n\nafter\n")
    assert "old" not in page


@pytest.mark.parametrize("page", ["no marker", f"{END} {BEGIN}", BEGIN])
def test_a_page_without_both_markers_is_refused(page: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks a marker"):
        with_tree(page, package(tmp_path))
