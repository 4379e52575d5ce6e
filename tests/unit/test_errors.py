"""The exception tree: one exit code for each class, and messages that say key, value and reason."""

from __future__ import annotations

import re

import pytest

from launcher import errors
from launcher.errors import ConfigurationError, LauncherError, Problem


def test_each_class_has_its_own_code_and_name() -> None:
    found = errors.leaves()
    assert (
        len({error.exit_code for error in found})
        == len(found)
        == len({error.failure_class for error in found})
    )
    assert all(0 < error.exit_code < 126 for error in found), "above, shells mean signals"


def test_docstring_draws_the_tree_as_it_is() -> None:
    drawn = dict(re.findall(r"(\w+) +(\d+)   ", errors.__doc__ or ""))
    assert drawn == {error.__name__: str(error.exit_code) for error in errors.leaves()}


@pytest.mark.parametrize("error", errors.leaves())
def test_found_again_by_failure_class(error: type[LauncherError]) -> None:
    assert errors.by_failure_class(error.failure_class) is error


def test_unknown_failure_class_is_internal() -> None:
    assert errors.by_failure_class("nonsense") is LauncherError


@pytest.mark.parametrize(
    ("problems", "source", "text"),
    [
        ("why", "", "why"),
        (Problem("a.b", 3, "why"), "job.yaml", "job.yaml: a.b = 3: why"),
        (Problem("a.b", None, "why"), "", "a.b: why"),
        (
            [Problem("a", "x", "why"), Problem("b", None, "so")],
            "f",
            "f: 2 problems\n  - a = 'x': why\n  - b: so",
        ),
    ],
)
def test_configuration_error_text(problems: str | Problem | list[Problem], source: str, text: str) -> None:
    assert str(ConfigurationError(problems, source)) == text
