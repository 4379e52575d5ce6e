"""Write the tree of modules in docs/architecture.md: `python -m tests.architecture_tree`, which `make docs`
runs.

Each line is a module's name and the first line of its docstring, read by `ast`: nothing of launcher is
imported.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = (
    "<!-- The tree below is written by `make docs` from the docstrings of the modules; do not edit it. -->"
)
END = "<!-- The end of the tree. -->"
_COLUMN = 30
_WIDTH = 110


def summary(module: Path) -> str:
    """Return the first line of a module's docstring, or nothing where it has none."""
    documentation = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return documentation.partition("\n")[0]


def tree(package: Path) -> str:
    """Return the package as a tree: modules before folders, each in the order of their names."""
    return "\n".join(_lines(package, depth=0))


def with_tree(page: str, package: Path) -> str:
    """Return the page with the package's tree between its two markers.

    Raises ValueError: a marker is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks a marker of the tree: {BEGIN} or {END}")
    return f"{before}{BEGIN}\n```\n{tree(package)}\n```\n{END}{after}"


def _lines(folder: Path, depth: int) -> Iterator[str]:
    yield from _entry(f"{folder.name}/", summary(folder / "__init__.py"), depth)
    for module in sorted(folder.glob("*.py")):
        if module.name != "__init__.py":
            yield from _entry(module.name, summary(module), depth + 1)
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").is_file():
            yield from _lines(inner, depth + 1)


def _entry(name: str, text: str, depth: int) -> list[str]:
    """A name and what it is, the latter in a column of its own; a long text goes on in that column."""
    first = ("  " * depth + name).ljust(_COLUMN - 1) + " "
    lines = textwrap.wrap(
        text.removesuffix("."), _WIDTH - _COLUMN, break_long_words=False, break_on_hyphens=False
    )
    return [(first + "".join(lines[:1])).rstrip(), *(" " * _COLUMN + line for line in lines[1:])]


def main() -> None:
    """Write the page."""
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8"), ROOT / "launcher"), encoding="utf-8")


if __name__ == "__main__":
    main()
