"""The table of docs/failures.md, made of the results."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import _report
from tests.benchmarks._report import ROOT
from tests.benchmarks.faults.registry import Injection

_PAGE = ROOT / "docs" / "failures.md"
_RECORD = _report.DOCUMENTS / "fault_matrix.json"
"""What the table is made of: the matrix is injected in pieces, on one machine after another."""
_TITLE = "What was injected, and what was seen"
_LONGEST = 150
_WIDEST_ROW = 190
"""Of both cells of what was seen."""
_NUM_VARIANTS = 8
"""Which is each engine, with saves beside the steps and with plain ones, and with adapters."""
_SEEN = "The last line that people saw, or where it went on the first warning:"
_PATH = re.compile(r"(?<![\w.])/(?:[\w.-]+/)+(?=[\w.-]+)")
"""Of an absolute path all but the last name."""
_INTRODUCTION = """Made by `python -m tests.benchmarks.bench_fault_matrix FOLDER --write` from what its runs saw, and changed by nobody.
`#` is the row of the matrix; S and a number mark what reviewers had seen fail. "Gone" is the time from the fault until no process was
left, or under Slurm until the next attempt began. "Samples" are those lost, and those of steps that had others than the undisturbed run;
"again" is how many steps were done twice; "bits" whether every loss and gradient norm is that of the undisturbed run. "All" is each
engine, with saves beside the steps and plain ones, and with adapters. The second table has what people saw; a row that does not hold says
there why.
"""


def key(name: str, variant: str) -> str:
    """The name of a result."""
    return f"{name} ({variant})"


def keep(folder: Path, result: dict[str, Any]) -> None:
    """Write one result down, whole."""
    path = folder / "results" / f"{key(result['name'], result['variant'])}.json"
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(result, indent=1), encoding="utf-8")
    new.replace(path)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all that was written down in the folder, and before it on other machines."""
    recorded = json.loads(_RECORD.read_text(encoding="utf-8")) if _RECORD.exists() else {}
    return recorded | {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "results").glob("*.json"))
    }


def write(injections: Sequence[Injection], known: dict[str, Any]) -> None:
    """Put the table into docs/failures.md, in place of the one that is there, and all results beside it."""
    lines = (f"{json.dumps(name)}: {json.dumps(_kept(result))}" for name, result in sorted(known.items()))
    _RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    rows = [_row(injection, results) for injection in injections if (results := _of(injection, known))]
    done = [result for injection in injections for result in _of(injection, known) if "missing" not in result]
    held = sum(not result["why_not"] for result in done)
    dates = sorted({result["date"] for result in done})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    summary = (
        f"{len(done)} injections of {len(rows)} kinds, {held} of which held; {when}, on two cores that "
        "others used too.\n"
    )
    header = ("#", "fault", "under", "gone after", "exit code", "samples", "again", "bits", "holds", "date")
    never = [f"{injection.fault} ({injection.row})" for injection in injections if not _of(injection, known)]
    rest = f"\nNot injected yet: {'; '.join(never)}.\n" if never else ""
    numbers = _report.table(header, [(*row[:3], *row[4:]) for row in rows])
    said = _report.table(
        ("fault", "seen"), [(row[1], _cut(row[3], _WIDEST_ROW - len(row[1]))) for row in rows]
    )
    section = f"## {_TITLE}\n{_INTRODUCTION}\n{summary}\n{numbers}\n{_SEEN}\n\n{said}{rest}"
    old = _PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"^## {re.escape(_TITLE)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = (
        pattern.sub(lambda _: section + "\n", old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    )
    _PAGE.write_text(new.rstrip() + "\n", encoding="utf-8")


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with what the table shows of its output, and no path of the machine."""
    shown = [_clean(line) for line in result.get("output", ()) if line.startswith("warning")][:1]
    cleaned = {"output": shown, "why_not": [_clean(reason) for reason in result["why_not"]]}
    if result.get("line"):
        cleaned["line"] = _clean(result["line"])
    return {
        key: _PATH.sub("", value) if isinstance(value, str) else value
        for key, value in (result | cleaned).items()
        if value not in (None, "", [], {}) or key == "why_not"
    }


def _of(injection: Injection, known: dict[str, Any]) -> list[dict[str, Any]]:
    found = (known.get(key(injection.name, variant)) for variant in injection.variants)
    return [result for result in found if result is not None]


def _row(injection: Injection, results: list[dict[str, Any]]) -> tuple[str, ...]:
    if missing := results[0].get("missing"):
        return (
            injection.row,
            injection.fault,
            "-",
            f"not injected: {missing}",
            *["-"] * 5,
            "-",
            results[0]["date"],
        )
    failed = [result for result in results if result["why_not"]]
    names = ", ".join(
        result["variant"].replace(", plain saving", " plain").replace(", adapter", " LoRA")
        for result in results
    )
    return (
        injection.row,
        injection.fault,
        "all" if len(results) == _NUM_VARIANTS else names,
        _clean(_seen(failed or results)),
        _range(
            [result.get("seconds_until_gone") or result.get("seconds_to_end") for result in results], " s"
        ),
        _set([result.get("code") for result in results]),
        _samples(results),
        _range([result.get("steps_again") for result in results], ""),
        _yes([result.get("bits_equal") for result in results]),
        "yes"
        if not failed
        else f"no ({', '.join(result['variant'] for result in failed)})"
        if len(failed) < len(results)
        else "no",
        max(result["date"] for result in results),
    )


def _seen(results: list[dict[str, Any]]) -> str:
    """Why it does not hold, or else the line that people saw."""
    first = results[0]
    if first["why_not"]:
        return "; ".join(first["why_not"])
    if first.get("code") == 0:
        return next((line for line in first.get("output", ()) if line.startswith("warning")), "it finished")
    return (
        "nothing more: the launcher was killed"
        if first.get("code") == -9
        else str(first.get("line", "as it must be"))
    )


def _clean(text: str) -> str:
    """Without paths of the machine, in one cell of a table."""
    text = re.sub(r"[\w./-]*/(?=[\w.-]+)", "", " ".join(text.split()))
    text = text.replace("|", "/").replace("<", "&lt;")
    text = re.sub(r"(?<!\\)([*_])", r"\\\1", text)  # what was recorded is clean already
    return _cut(text, _LONGEST)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _range(values: list[Any], unit: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:g}{unit}" if low == high else f"{low:g} to {high:g}{unit}"


def _set(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "-"


def _samples(results: list[dict[str, Any]]) -> str:
    known = [result for result in results if result.get("samples_lost") is not None]
    return (
        f"{sum(r['samples_lost'] for r in known)} + {sum(r['samples_repeated'] or 0 for r in known)}"
        if known
        else "-"
    )


def _yes(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    return "-" if not known else "equal" if all(known) else "not equal"
