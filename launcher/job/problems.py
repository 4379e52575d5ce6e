"""Turn pydantic's errors into problems: key, value, reason, nearest thing that works."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from launcher.data.section import Data
from launcher.errors import Problem
from launcher.job.describe import choices, columns_by_task, docstring, expected_of, keys, section_of, written
from launcher.job.schema import job_type, task_of
from launcher.redaction import holds_secret

_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret|password|passwd|credentials?|auth_?token|token)(s?$|_)", re.IGNORECASE
)
_SECRET_REASON = (
    "looks like a secret, which does not belong in a job file (it is copied into run directories); set it "
    "in the environment instead"
)


def refused(content: dict[str, Any]) -> list[Problem]:
    """Take secrets out of `content`, so that nothing shows or judges them again; return a problem for each."""
    problems: list[Problem] = []
    _refuse_in(content, "", problems)
    return problems


@functools.cache
def _known() -> frozenset[str]:
    """Return every key of a job file. To list them takes the modules of all tasks."""
    return frozenset(key.path for key in keys())


def _refuse_in(section: Any, prefix: str, problems: list[Problem]) -> None:
    for key, value in list(section.items() if isinstance(section, dict) else enumerate(section)):
        path = f"{prefix}{key}"
        secret_key = (
            isinstance(key, str)
            and bool(_SECRET_KEY.search(key))
            and not isinstance(value, dict)
            # pad_token_id is a number
            and (isinstance(value, str) or not path.startswith("model.config."))
            and path not in _known()
        )
        if secret_key or (isinstance(value, str) and holds_secret(value)):
            problems.append(Problem(path, None, _SECRET_REASON))
            section[key] = None
        elif isinstance(value, (dict, list)):
            _refuse_in(value, f"{path}.", problems)
            continue
        else:
            continue
        if isinstance(section, dict):
            del section[key]


def translate(error: ValidationError, content: dict[str, Any]) -> list[Problem]:
    """Return one problem for each key, whatever number of alternatives pydantic tried at it."""
    problems: dict[str, Problem] = {}
    task = task_of(content)
    for item in error.errors(include_url=False):
        path, section, field = _locate(item["loc"], job_type(task))
        deep = len(path) == len(item["loc"])
        path = _without_sources(path, content)
        key = ".".join(path)
        if item["type"] == "extra_forbidden":
            shown = None if isinstance(item["input"], (dict, list)) else item["input"]
            if owners := _owners(path):
                if section is not Data:  # of a task that is not known nothing is: that it is not is said
                    problems[key] = Problem(key, shown, _of_another_task(task, section, owners))
                continue
            problems[key] = Problem(key, shown, _unknown(path, section))
        elif item["type"] == "missing" and deep:
            about = " ".join(docstring(section, _field_name(section, path[-1])).split())
            problems[key] = Problem(key, None, f"is missing: {about}")
        elif key not in problems or item["type"] == "value_error":
            value = _value(content, path)
            problems[key] = Problem(
                key, None if isinstance(value, dict) else value, _reason(item, field, value)
            )
    return list(problems.values())


def _without_sources(path: list[str], content: dict[str, Any]) -> list[str]:
    """Return the key as people wrote it: a list of sources stands in the place of a section with that list."""
    is_list = isinstance(_value(content, path[:2]), (list, tuple))
    return [*path[:2], *path[3:]] if is_list and path[2:3] == ["sources"] else path


def _owners(path: list[str]) -> list[str]:
    """Return the tasks that have a key of `data` as a column."""
    if len(path) != 2 or path[0] != "data":
        return []
    return [name for name, columns in columns_by_task().items() if path[1] in columns.model_fields]


def _of_another_task(task: str, section: type[BaseModel], owners: list[str]) -> str:
    own = [name for name in section.model_fields if name not in Data.model_fields]
    whose = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
    return (
        f"belongs to {whose}, and model.task is {task}, which reads {', '.join(own)}; leave "
        "it out or set model.task"
    )


def _locate(
    loc: tuple[int | str, ...], section: type[BaseModel]
) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """The key below `section` that a pydantic location means, without the names of the alternatives that were
    tried there."""
    path: list[str] = []
    field = None
    for step in loc:
        fields = {written(name, info): info for name, info in section.model_fields.items()}
        path.append(str(step))
        if isinstance(step, int) and field is not None and section_of(field) is section:
            continue  # an entry of a list of sections
        if step not in fields:
            return path, section, None
        field = fields[str(step)]
        if (child := section_of(field)) is None:
            break
        if len(path) < len(loc):
            section = child
    return path, section, field


def _field_name(section: type[BaseModel], key: str) -> str:
    return next((name for name, info in section.model_fields.items() if written(name, info) == key), key)


def _value(content: Any, path: list[str]) -> Any:
    for step in path:
        if isinstance(content, (list, tuple)):
            content = content[int(step)] if step.isdigit() and int(step) < len(content) else None
        else:
            content = content.get(step) if isinstance(content, dict) else None
    return content


def _unknown(path: list[str], section: type[BaseModel]) -> str:
    here = [written(name, info) for name, info in section.model_fields.items()]
    if near := difflib.get_close_matches(path[-1], here, n=1):
        return f"unknown key; the nearest known one is {'.'.join([*path[:-1], near[0]])}"
    elsewhere = [key.path for key in keys() if key.name == path[-1] or key.path.endswith(f".{path[-1]}")]
    if elsewhere:
        return f"unknown key here; it stands at {elsewhere[0]}"
    near = difflib.get_close_matches(path[-1], [key.path.rsplit(".", 1)[-1] for key in keys()], n=1)
    if near:
        return (
            "unknown key; the nearest known one is "
            f"{next(key.path for key in keys() if key.path.rsplit('.', 1)[-1] == near[0])}"
        )
    return f"unknown key; known here: {', '.join(here)}"


def _reason(item: Any, field: FieldInfo | None, value: Any) -> str:
    if field is None:
        return f"write a section of keys: {item['msg']}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "string_pattern_mismatch" and "x1f" in item["ctx"]["pattern"]:
        return "write it on one line, without control characters"
    if item["type"] == "string_pattern_mismatch":
        return "write letters, digits, `.`, `_` and `-`, beginning with a letter or a digit"
    if item["type"] == "string_too_long":
        return f"at most {item['ctx']['max_length']} characters"
    if item["type"] == "string_too_short":
        return "must not be empty"
    near = (
        difflib.get_close_matches(str(value).lower(), choices(field.annotation), n=1)
        if isinstance(value, str)
        else []
    )
    expected = expected_of(field)
    nearest = [f"[{one}]" if expected.startswith("a list of") else one for one in near]
    return f"write {expected}" + (f"; the nearest is {nearest[0]}" if nearest else "")
