"""YAML parsed within bounds, so that a hostile file is refused in under a second."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from launcher.errors import ConfigurationError
from launcher.plain_files import DEEPEST

MOST_BYTES = 128 << 10
"""The longest text that is read: PyYAML takes half a second for it."""
_MOST_VALUES = 10_000
"""The most values, written or repeated by an alias: these are read in half a second."""
_LARGEST_WHOLE_NUMBER = 2**63 - 1
_LONGEST_NUMBER = 100
"""The longest number in characters, more than any real one has; a longer one in base 60 would take minutes."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, reads 1e-5 as a number and 2026-11-22 as text, and counts
    what it is given."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._num_values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._num_values += 1
        self._depth += 1
        self._refuse_beyond(self._num_values, self._depth, self.peek_event().start_mark)
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
        """Return how many values a node stands for once every alias in it is filled in, and how deep they
        are."""
        if id(node) in known:
            measured = known[id(node)]
            if measured is None:
                raise yaml.composer.ComposerError(problem="refers to itself", problem_mark=node.start_mark)
            return measured
        known[id(node)] = None
        number = depth = 0
        if isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                for child in entry if isinstance(entry, tuple) else (entry,):
                    below = self._measure(child, known)
                    number, depth = number + below[0], max(depth, below[1])
        known[id(node)] = number + 1, depth + 1
        self._refuse_beyond(number + 1, depth + 1, node.start_mark)
        return number + 1, depth + 1

    def _refuse_beyond(self, number: int, depth: int, mark: yaml.Mark) -> None:
        problem = ""
        if number > _MOST_VALUES:
            problem = f"more than {_MOST_VALUES:,} values, aliases filled in, which no such file needs"
        elif depth > DEEPEST:
            problem = f"nested more than {DEEPEST} levels deep, which no such file needs"
        if problem:
            raise yaml.composer.ComposerError(problem=problem, problem_mark=mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                text = f"{key} is written twice (lines {seen[key]} and {line}); only one of them can count"
                raise yaml.constructor.ConstructorError(problem=text, problem_mark=key_node.start_mark)
            if isinstance(key, Hashable):
                seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = 0 if len(node.value) > _LONGEST_NUMBER else super().construct_yaml_int(node)
        if len(node.value) > _LONGEST_NUMBER or abs(value) > _LARGEST_WHOLE_NUMBER:
            text = f"a whole number beyond any sense; the largest is {_LARGEST_WHOLE_NUMBER:,}"
            raise yaml.constructor.ConstructorError(problem=text, problem_mark=node.start_mark)
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if len(node.value) > _LONGEST_NUMBER:
            text = f"a number of more than {_LONGEST_NUMBER} characters, which nothing here needs"
            raise yaml.constructor.ConstructorError(problem=text, problem_mark=node.start_mark)
        value: float = super().construct_yaml_float(node)
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value: str = super().construct_yaml_str(node)
        if not value.isprintable() and any(
            character == "\0" or "\ud800" <= character <= "\udfff" for character in value
        ):
            text = (
                "a text with half a character (\\ud800 to \\udfff) or a zero byte in it, which no file and "
                "no name can hold"
            )
            raise yaml.constructor.ConstructorError(problem=text, problem_mark=node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def parse(text: str, source: str) -> Any:
    """Read YAML as plain values. Raises ConfigurationError with the line, and without the text, which may
    hold a secret."""
    if len(text) > MOST_BYTES:
        raise ConfigurationError(
            f"more than {MOST_BYTES >> 10} KiB of YAML, which no such file needs", source
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigurationError(f"{where}{error.problem or error.context}", source) from None
    except Exception as error:
        # PyYAML does not check the text after a tag: `!!bool x` is a KeyError, `!!timestamp x` an
        # AttributeError, and so on.
        raise ConfigurationError(f"not YAML: {type(error).__name__}", source) from None
