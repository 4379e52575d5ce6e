"""Write the reference pages and the JSON schema from the code.

`python -m launcher.job.reference DIRECTORY` writes the pages; a test holds the ones in docs/reference equal
to what is made here.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel

from launcher import errors, tasks
from launcher.data.section import Data
from launcher.job.describe import Key, columns_by_task, docstring, expected_of, keys, section_of
from launcher.job.schema import Job
from launcher.values import Interval

_DURATION = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(s|min|h|d)\s*$"},
    ]
}
_INTERVAL = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^\s*((\d+)?\s*(steps?|epochs?)|\d+(\.\d+)?\s*(s|min|h|d))\s*$"},
    ]
}


_LONGEST_ROW, _LEAST_ROOM = 200, 20
_HEAD = ("", "| key | what to write | default | |", "|---|---|---|---|")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the job file, with each field's docstring as its description."""
    schema = Job.model_json_schema(by_alias=True)
    for columns in columns_by_task().values():
        schema["$defs"][columns.__name__] = columns.model_json_schema(
            by_alias=True, ref_template="#/$defs/{model}"
        )
        inside = schema["$defs"][columns.__name__].pop("$defs", {})
        schema["$defs"] = inside | schema["$defs"]
    schema["properties"]["data"] = {
        "anyOf": [{"$ref": f"#/$defs/{columns.__name__}"} for columns in columns_by_task().values()]
    }
    for columns in columns_by_task().values():
        properties = schema["$defs"][columns.__name__]["properties"]
        several = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/MixedSource"}}
        properties["train"] = {"anyOf": [several, properties["train"]]}
        properties["evaluation"]["anyOf"].insert(0, several)
    schema["$defs"].pop(Data.__name__)
    schema["$defs"]["Model"]["properties"]["task"]["enum"] = list(tasks.TASKS)
    schema["$defs"]["Interval"] = _INTERVAL
    freeze = schema["$defs"]["Model"]["properties"]["freeze"]
    freeze["anyOf"] = [{"type": "array", "items": {"type": "string"}}, {"$ref": freeze.pop("$ref")}]
    freeze["default"] = []
    schema["$defs"]["Freeze"]["properties"]["layers"]["anyOf"].insert(0, {"type": "integer", "minimum": 0})
    schema["$defs"]["Thaw"]["properties"]["at"] = {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0},
            {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$"},
        ]
    }
    schema["$defs"]["Cluster"]["properties"]["grace"] |= _DURATION
    schema["$defs"]["Cluster"]["properties"]["grace"].pop("type", None)
    schema["$defs"]["Cluster"]["properties"]["grace"].pop("exclusiveMinimum", None)
    schema["$defs"]["Cluster"]["properties"]["hang_after"] = {
        "anyOf": [*_DURATION["anyOf"], {"enum": ["auto", "off", False]}],
        "default": "auto",
    }
    for key in keys():
        names = (
            [key.section.__name__]
            if key.section is not Data
            else [columns.__name__ for columns in columns_by_task().values()]
        )
        for place in [schema] if key.section is Job else [schema["$defs"][name] for name in names]:
            place["properties"][key.path.rsplit(".", 1)[-1]]["description"] = docstring(key.section, key.name)
    for name, section in schema["$defs"].items():
        for field in section.get("properties", {}).values():
            if isinstance(field.get("default"), dict) and set(field["default"]) == {"value", "unit"}:
                field["default"] = shown(Interval(**field["default"]))
        section.setdefault("title", name)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@functools.cache
def schema_text() -> str:
    """Return the JSON schema as it is written beside a job file."""
    return json.dumps(json_schema(), indent=2) + "\n"


def shown(value: object) -> str:
    """Return a default as one would write it in a job file."""
    if isinstance(value, Interval):
        if value.unit == "seconds":
            return f"{value.value / 60:g}min"
        return f"{value.value:g} {value.unit}"
    if value is None:
        return "none given"
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _rows(keys: Iterable[Key]) -> list[str]:
    """Return a row for each key. What is longer than a row that can be read stands whole below the table."""
    rows, below = list[str](), list[str]()
    for key in keys:
        default = "**required**" if key.field.is_required() else f"`{shown(key.field.default)}`"
        cells = [f"`{key.path.rsplit('.', 1)[-1]}`", expected_of(key.field).replace("|", "\\|"), default]
        text = " ".join(docstring(key.section, key.name).split())
        if _room(cells) < _LEAST_ROOM:
            text, cells[1] = f"{text} Write {cells[1]}.", "see below"
        if len(text) > _room(cells):
            below.append(f"- {cells[0]}: {text}")
            text = _begin(text, _room(cells))
        rows.append(f"| {' | '.join([*cells, text])} |")
    return [*rows, *(["", *below] if below else [])]


def _room(cells: list[str]) -> int:
    """Return the characters that a row has left for a last cell."""
    return _LONGEST_ROW - len(f"| {' | '.join([*cells, ''])} |")


def _begin(text: str, room: int) -> str:
    """Return the first sentences or clauses of a text, and that more follows below."""
    places = (match.start() for match in re.finditer(r"\.(?= [A-Z`])|[;:,] | \(", text))
    ends = [end for end in places if end + 6 <= room and text[:end].count("(") == text[:end].count(")")]
    sentences = [end for end in ends if text[end] == "."]
    return f"{text[: (sentences or ends or [room - 6])[-1]]} (...)"


def _section(title: str, section: type[BaseModel], prefix: str) -> list[str]:
    plain = [
        key
        for key in keys(section, prefix)
        if "." not in key.path.removeprefix(prefix) and section_of(key.field) is None
    ]
    nested = [
        key
        for key in keys(section, prefix)
        if "." not in key.path.removeprefix(prefix) and section_of(key.field) is not None
    ]
    lines = ["", f"## {title}", "", inspect.getdoc(section) or "", *_HEAD]
    lines += _rows(key for key in plain if key.section is section)
    for task, columns in columns_by_task().items() if section is Data else ():
        lines += ["", f"### Columns of `{task}`", "", inspect.getdoc(columns) or "", *_HEAD]
        own = [
            key
            for key in keys(columns, prefix)
            if key.section is columns and key.name not in Data.model_fields
        ]
        lines += _rows(own)
        inside = [(key.path, child) for key in own if (child := section_of(key.field))]
        for path, child in inside:
            lines += ["", f"#### `{path}`", "", inspect.getdoc(child) or "", *_HEAD]
            lines += _rows(keys(child, f"{path}."))
    for key in nested:
        child = section_of(key.field)
        assert child is not None
        many = " (a list of such sections)" if get_origin(key.field.annotation) is tuple else ""
        lines += _section(f"`{key.path}`{many}", child, key.path + ".")
    return lines


def job_file_page() -> str:
    """Return docs/reference/job-file.md."""
    head = [
        "# The job file",
        "",
        "Made from `launcher/job/schema.py` and `launcher/tasks/` by `make docs`; do not edit.",
        "",
        "Every key can be set on the command line as well: `--set training.learning_rate=1e-5` (the "
        "value is YAML), an entry of",
        "a list by its number from 0: `--set data.train.0.weight=2`. `auto` is decided by `launcher plan`, "
        "which says why.",
        "Unknown keys are refused. Paths are relative to the job file.",
        "`launcher schema` prints the JSON schema, which editors complete the file by.",
    ]
    return "\n".join([*head, *_section("Top level", Job, "")]) + "\n"


def exit_codes_page() -> str:
    """Return docs/reference/exit-codes.md."""
    lines = [
        "# Exit codes",
        "",
        "Made from `launcher/errors.py` by `make docs`; do not edit.",
        "",
        "| code | class | `failure_class` in failure.json | meaning |",
        "|---|---|---|---|",
        "| 0 | | | success |",
    ]
    for error in errors.leaves():
        meaning = (
            "Something in launcher itself is wrong."
            if error is errors.LauncherError
            else " ".join((inspect.getdoc(error) or "").partition("\n\n")[0].split())
        )
        lines.append(f"| {error.exit_code} | {error.__name__} | {error.failure_class} | {meaning} |")
    lines += [
        "| 130 | | | A second Ctrl-C, or grace that ran out: nothing more was saved. |",
        "",
        "75 is EX_TEMPFAIL of sysexits.h: run the same command again and it goes on where it stopped.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "job-file.md").write_text(job_file_page(), encoding="utf-8")
    (directory / "exit-codes.md").write_text(exit_codes_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
