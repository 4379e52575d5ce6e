"""What the README and the docs say is there: links, commands, job files, names."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from launcher.cli.app import command
from launcher.cli.commands import COMMANDS, available
from launcher.job import check
from launcher.job.describe import keys
from launcher.job.load import validate, without
from launcher.job.problems import refused
from launcher.job.yaml_text import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
JOB_FILES = sorted((ROOT / "tests" / "jobs").glob("*.yaml"))
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "launcher").rglob("*.py"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEYS = {key.path for key in keys()}
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return FENCE.findall(text)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), f"{target} points out of the project"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    assert {shown(page) for page in DOCS.rglob("*.md") if "benchmarks" not in page.parts} - {
        "docs/README.md"
    } <= {f"docs/{n}" for n in linked}


def lines_with_commands(text: str) -> Iterator[str]:
    """Whole command lines in blocks: without prompt, comment, and the description that stands two spaces
    behind."""
    for language, content in blocks(text):
        if language in ("", "sh", "bash"):
            for line in content.splitlines():
                if line.removeprefix("$ ").startswith("launcher "):
                    yield re.split(r"\s{2,}|\s+#", line.removeprefix("$ "))[0]


def parse_command(line: str) -> None:
    """Let the real command line parse, without running anything. Raises UsageError."""
    found: Any = command()
    name, arguments, context = "launcher", shlex.split(line)[1:], None
    while hasattr(found, "resolve_command"):
        context = found.context_class(found, parent=context, info_name=name)
        name, found, arguments = found.resolve_command(context, arguments or [""])
    found.make_context(name, arguments, parent=context)


COMMAND_LINES = sorted(
    {(shown(page), line) for page in PAGES for line in lines_with_commands(page.read_text(encoding="utf-8"))}
)
MENTIONS = sorted(
    {
        (shown(page), span)
        for page in PAGES
        for span in spans(page.read_text(encoding="utf-8"))
        if re.match(r"launcher [a-z]", span)
    }
)


def test_there_are_command_lines() -> None:
    assert len(COMMAND_LINES) > 20
    assert len(MENTIONS) > 20


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_command_lines_parse(page: str, line: str) -> None:
    parse_command(line)


@pytest.mark.parametrize(("page", "line"), MENTIONS)
def test_commands_that_are_mentioned_exist_with_their_options(page: str, line: str) -> None:
    try:
        parse_command(line)
    except UsageError as error:
        # The command alone, in the middle of a sentence.
        assert type(error).__name__ == "MissingParameter", error


@pytest.mark.parametrize(
    "line",
    [
        "launcher rnu job.yaml",
        "launcher run job.yaml --nprocs 2",
        "launcher run",
        "launcher checkpoint lst RUN",
        "launcher plan a b",
    ],
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises(UsageError):
        parse_command(line)


def test_the_readme_lists_every_command() -> None:
    table = re.findall(
        r"^\| `launcher ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert table == list(COMMANDS) == list(available())


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_keys_that_are_set_exist(page: Path) -> None:
    written = set(re.findall(r"--set ([\w.]+)=", page.read_text(encoding="utf-8")))
    sources = {re.sub(r"^data\.(train|evaluation)\.\d+", r"data.\1.sources", key) for key in written}
    entries = {re.sub(r"\.\d+", "", key) for key in sources}  # an entry of a list is named by its number
    assert entries - {"KEY"} <= KEYS  # KEY=VALUE is how a message tells the form


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_make_targets_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shell = "\n".join(
        [*(content for language, content in blocks(text) if language in ("", "sh")), *spans(text)]
    )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m (launcher[\w.]*)", shell):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


JOBS = [
    (shown(page), content)
    for page in PAGES
    for language, content in blocks(page.read_text(encoding="utf-8"))
    if language == "yaml"
]
JOBS += [(shown(path), path.read_text(encoding="utf-8")) for path in JOB_FILES]


def problems_of(text: str) -> list[str]:
    """Everything wrong with a job, or with a part of one, but for files that are not there."""
    content = parse(text, "the docs")
    whole = {"name", "model", "data"} <= content.keys()
    found = refused(content)
    job, invalid = validate(content if whole else without(content, set()))
    found += invalid
    if whole and job is not None:
        found += [finding.problem for finding in check.findings(job)]
    return [str(problem) for problem in found]


def test_there_are_job_files() -> None:
    assert len(JOBS) > 5


@pytest.mark.parametrize(("where", "text"), JOBS, ids=[where for where, _ in JOBS])
def test_job_files_are_valid(where: str, text: str) -> None:
    assert problems_of(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "training: {epoch: 2}",
        "name: a\nmodel: {name: m}\ndata: {train: {path: a.txt}}",
        "batch: {micro_batch_size: none}",
    ],
)
def test_a_wrong_job_file_is_noticed(text: str) -> None:
    assert problems_of(text)


@pytest.mark.parametrize("span", sorted(set(spans(ARCHITECTURE))))
def test_the_architecture_names_what_exists(span: str) -> None:
    everything = "\n".join(SOURCES.values())
    if re.fullmatch(r"(launcher|tests|docs)/[\w/.]+", span) or re.fullmatch(r"[\w/]+\.py", span):
        assert (ROOT / span).exists() or (ROOT / "launcher" / span).exists()
    elif match := re.fullmatch(r"(\w+)\(\)", span):
        assert re.search(rf"\bdef {match[1]}\(", everything)
    elif re.fullmatch(r"[A-Z][a-z]+([A-Z][a-z]+)*", span):
        assert re.search(rf"^(class {span}\b|{span} = )", everything, re.MULTILINE)
    elif re.fullmatch(r"[A-Z_]{3,}", span):
        assert re.search(rf"^{span}\b.* = ", everything, re.MULTILINE)


def broken_tables(text: str) -> list[str]:
    """Return the lines at which a table is cut: a blank line, or a line break in a cell, shows the rows after
    it as text."""
    lines = ["", *prose(text).splitlines(), ""]
    broken = []
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|"):
            begins_without_head = not before.startswith("|") and not re.fullmatch(r"\|[\s:|-]+\|", after)
            if begins_without_head or not line.rstrip().endswith("|"):
                broken.append(line)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_tables_are_whole(page: Path) -> None:
    assert broken_tables(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("cut", ["| 1 | 2 |\n\n| 3 | 4 |", "| 1 | two\nlines |\n| 3 | 4 |"])
def test_a_table_that_is_cut_is_noticed(cut: str) -> None:
    assert broken_tables("| a | b |\n|---|---|\n| 1 | 2 |\n") == []
    assert broken_tables(f"| a | b |\n|---|---|\n{cut}\n")


def sentences(text: str) -> list[str]:
    """Return the sentences of a page's paragraphs and lists; a colon before a capital ends one too."""
    lines = [line for line in prose(text).splitlines() if not line.startswith(("|", "#", "!["))]
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines))
    plain = (" ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", part).split()) for part in parts)
    return [one for part in plain for one in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*(])", part) if one]


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "benchmarks"], ids=shown)
def test_half_of_the_sentences_are_short(page: Path) -> None:
    counts = [words(one) for one in sentences(page.read_text(encoding="utf-8"))]
    assert len(counts) < 10 or statistics.median(counts) <= 15


def test_sentences_are_told_apart() -> None:
    text = "One two. Three `a.b` four: Five.\n\n- six\n- [seven eight](x.md)\n\n```\nnot. This.\n```\n| nor | this |\n"
    assert [words(one) for one in sentences(text)] == [2, 3, 1, 1, 2]


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_rows_of_tables_can_be_read(page: Path) -> None:
    wide = [
        line
        for line in prose(page.read_text(encoding="utf-8")).splitlines()
        if line.startswith("|") and len(line) > 200
    ]
    assert not wide or page.parent.name == "benchmarks"


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_no_path_of_a_machine(page: Path) -> None:
    assert (
        re.findall(r"(?<![\w.])/(?:home|root|tmp|work|opt|Users)/\S+", page.read_text(encoding="utf-8")) == []
    )
