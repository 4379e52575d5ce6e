"""Nothing in the launcher unpickles what another process may have written, or has torch do it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "launcher").rglob("*.py"))
OBJECTS = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "broadcast_object", "all_gather_object_enforce_type"),
}
READERS = {
    "pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "marshal": {"load", "loads"},
    "dill": {"load", "loads"},
}
READERS |= {"joblib": {"load"}, "shelve": {"open"}}


def found(tree: ast.AST) -> Iterator[str]:
    """What reads pickles, or may."""
    bases = {
        id(base)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and restricts(node)
        for base in node.bases
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name"}[type(node)]
            if getattr(node, name) in OBJECTS:
                yield getattr(node, name)
        of = node.value if isinstance(node, ast.Attribute) and id(node) not in bases else None
        if (
            isinstance(node, ast.Attribute)
            and isinstance(of, ast.Name)
            and node.attr in READERS.get(of.id, ())
        ):
            yield f"{of.id}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module in READERS:
            yield f"from {node.module}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            module, keywords = (
                ast.unparse(node.func.value),
                {entry.arg: ast.unparse(entry.value) for entry in node.keywords},
            )
            if module == "torch" and keywords.get("weights_only") != "True":
                yield "torch.load"
            if module in ("np", "numpy") and keywords.get("allow_pickle") != "False":
                yield "numpy.load"


def restricts(node: ast.ClassDef) -> bool:
    """Whether a class says itself what may be unpickled."""
    return any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_unpickled_but_by_a_class_that_says_what_may_be(path: Path) -> None:
    assert list(found(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "dist.all_gather_object(a, b)",
            "from torch.distributed import broadcast_object_list",
            "pickle.loads(b)",
            "pickle.Unpickler(f)",
        ),
        *(
            "from pickle import loads",
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "np.load(f)",
            "np.load(f, allow_pickle=True)",
        ),
        "class A(pickle.Unpickler):\n    pass",
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert list(found(ast.parse(text)))
