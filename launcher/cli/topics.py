"""The topics of `launcher help`: pages, their sections, keys, variables, exit codes, terms and symptoms.

The pages are those of docs/: `launcher/pages` links to it in a clone, and a wheel carries copies. Their index
lists which of them are topics, and what each is about.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.cli.commands import available
from launcher.errors import ConfigurationError, Problem

PAGES = Path(__file__).parents[1] / "pages"
_INDEX_END = "To change it:"
_BELOW = re.compile(r"^- `([\w.]+)`: (.*)$", re.MULTILINE)
"""A line below a table of the reference, with the rest of a key's text if its row is full."""
_INDEX_LINE = re.compile(r"^- \[([^\]]+)\]\(((?:reference/)?[\w-]+\.md)\)(?:: (.*))?$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{2,4}) (.*)$", re.MULTILINE)
_TERM = re.compile(r"^\*\*([^*]+)\.\*\*.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)
_CELL_END = re.compile(r"(?<!\\)\|")
_COLUMNS_OF = "Columns of "
_CHOICES = re.compile(r"\bone of ((?:[\w-]+, )+[\w-]+)|^([\w-]+) or ([\w-]+)$")
"""The reference's phrases for the allowed values of a key."""
_SHORTEST_PHRASE = 3
"""The fewest letters of a phrase: shorter topics are codes, not words of a message."""


@dataclass(frozen=True)
class Page:
    """A page, by the name that people type."""

    name: str
    title: str
    summary: str
    file: str

    @functools.cached_property
    def text(self) -> str:
        return (PAGES / self.file).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """A part of a page that answers its own topic: `names` are what people may type for it."""

    kind: str
    names: tuple[str, ...]
    page: str
    text: str
    choices: tuple[str, ...] = ()
    """The allowed words as values of a key."""


@functools.cache
def pages() -> dict[str, Page]:
    """Return the users' pages by name, in the order of the index."""
    index = (PAGES / "README.md").read_text(encoding="utf-8").partition(_INDEX_END)[0]
    listed = [
        Page(Path(file).stem.removeprefix("guide-"), title, summary, file)
        for title, file, summary in _INDEX_LINE.findall(index)
    ]
    return {page.name: page for page in listed}


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return every part of a page that is a topic, short parts first."""
    readers = {
        "job-file": _keys, "exit-codes": _exit_codes, "environment-variables": _variables,
        "glossary": _terms, "symptoms": _symptoms,
    }  # fmt: skip
    short = [entry for name, read in readers.items() for entry in read(pages()[name])]
    sections = [
        Entry("section", (title,), page.name, text)
        for page in pages().values()
        if page.name != "job-file"
        for title, text in _sections(page.text)
    ]
    return (*short, *sections)


def plain(words: str) -> str:
    """Return a topic for comparison: in lower case, with one space for whatever separates words."""
    return " ".join(re.sub(r"[^\w.]+", " ", words.lower()).split())


def find(topic: str) -> list[Entry]:
    """Return the answers to a topic: a page, or parts of pages by the name of a key, code, term or section.

    `PAGE PART` searches that page only. Raises ConfigurationError, with the nearest topic, if none matches.
    """
    wanted = plain(topic)
    if page := {plain(name): page for name, page in pages().items()}.get(wanted):
        return [Entry("page", (page.name,), page.name, page.text)]
    head, _, rest = topic.partition(" ")
    if answers := (head in pages() and parts(rest, head)) or parts(topic):
        return answers
    known = {plain(name): name for name in (*available(), *names())}
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"; the nearest is {known[near[0]]}" if near else ""
    raise ConfigurationError(Problem("TOPIC", topic, f"no such topic{hint}; `launcher help` lists them"))


def names() -> list[str]:
    """Return the names that are worth completing: of pages, keys and their choices, variables, exit codes
    and terms."""
    kinds = ("key", "exit code", "variable", "term")
    short = [name for entry in entries() if entry.kind in kinds for name in (*entry.names, *entry.choices)]
    return [*dict.fromkeys(short), *pages()]


def parts(topic: str, page: str | None = None) -> list[Entry]:
    """Return the parts of pages, or of one page, that a topic names.

    Words in a symptom also name it; words in a section only if nothing else matches.
    """
    wanted = plain(topic)
    within = [entry for entry in entries() if page in (None, entry.page)]
    named = [entry for entry in within if wanted in map(plain, entry.names)]
    if not named:
        named = [entry for entry in within if entry.kind == "key" and wanted == entry.names[0].split(".")[-1]]
    named = named or [entry for entry in within if wanted in map(plain, entry.choices)]
    if len(wanted) < _SHORTEST_PHRASE:
        return named
    phrase = re.compile(rf"\b{re.escape(wanted)}\b")
    having = [entry for entry in within if phrase.search(plain(entry.names[0])) and entry not in named]
    named += [entry for entry in having if entry.kind == "symptom"]
    return named or [entry for entry in having if entry.kind == "section"]


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in a text, without headers."""
    lines = [*_ROW.findall(text), ""]
    for line, after in itertools.pairwise(lines):
        if not _is_rule(line) and not _is_rule(after):
            yield [cell.strip().replace("\\|", "|") for cell in _CELL_END.split(line)]


def _is_rule(line: str) -> bool:
    """Return whether a row is the line below a table's header."""
    return bool(line) and set(line) <= set("|- :")


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield a page's headings, without markup, each with its text up to the next of the same level."""
    heads = list(_HEADING.finditer(_FENCE.sub(lambda block: "\0" * len(block[0]), text)))
    for number, head in enumerate(heads):
        after = (later.start() for later in heads[number + 1 :] if len(later[1]) <= len(head[1]))
        yield head[2].replace("`", ""), text[head.start() : next(after, len(text))].rstrip() + "\n"


def _keys(page: Page) -> Iterator[Entry]:
    path = ""
    for title, text in _sections(page.text):
        if title.startswith(_COLUMNS_OF):
            path, task = "data", title.removeprefix(_COLUMNS_OF)
        else:
            path, task = title.split(" (")[0].replace("Top level", ""), ""
        own = _HEADING.split(text)[3]
        below = dict(_BELOW.findall(own))
        table = [_whole(row, below) for row in rows(own) if len(row) == 4]
        shown = [_key(path, row, task) for row in table]
        if not task:
            about = own.partition("\n|")[0].strip()
            name = path or "job file"
            yield Entry(
                "section", (name,), page.name, f"## {name}\n\n{about}\n\n" + "\n\n".join(shown) + "\n"
            )
        for row, text_of_key in zip(table, shown, strict=True):
            name = f"{path}.{_bare(row[0])}".lstrip(".")
            choices = [word for groups in _CHOICES.findall(row[1]) for word in ", ".join(groups).split(", ")]
            known = tuple(word for word in choices if word not in ("", "true", "false"))
            yield Entry("key", (name,), page.name, text_of_key + "\n", known)


def _whole(row: list[str], below: dict[str, str]) -> list[str]:
    """Return a key's row with its full text, part of which may be below the table."""
    text = below.get(_bare(row[0]), row[3])
    if row[1] != "see below":
        return [*row[:3], text]
    text, _, allowed = text.rpartition(" Write ")
    return [row[0], allowed.removesuffix("."), row[2], text]


def _key(path: str, row: list[str], task: str) -> str:
    key = f"{path}.{_bare(row[0])}".lstrip(".")
    default = "required" if "required" in row[2] else f"default {row[2]}"
    return f"- `{key}`{f' ({task})' if task else ''}: {row[1]}; {default}\n\n  {row[3]}"


def _bare(cell: str) -> str:
    return cell.strip("`")


def _exit_codes(page: Page) -> Iterator[Entry]:
    for row in rows(page.text):
        code, error, failure, meaning = row
        names = tuple(name for name in (f"exit code {code}", code, error, failure) if name)
        title = f"Exit code {code}" + (f": {failure} ({error})" if error else "")
        yield Entry("exit code", names, page.name, f"- {title}\n\n  {meaning}\n")


def _variables(page: Page) -> Iterator[Entry]:
    for variable, meaning, more in rows(page.text):
        yield Entry("variable", (_bare(variable),), page.name, f"- {variable}: {meaning} ({more})\n")


def _terms(page: Page) -> Iterator[Entry]:
    for term in _TERM.finditer(page.text):
        yield Entry("term", (term[1],), page.name, term[0] + "\n")


def _symptoms(page: Page) -> Iterator[Entry]:
    before = ""
    for seen, why, cure in (row for row in rows(page.text) if len(row) == 3):
        seen = before + seen.removeprefix("the same") if seen.startswith("the same") else seen
        before = seen if not before or not seen.startswith(before) else before
        yield Entry("symptom", (seen,), page.name, f"- Seen: {seen}\n\n  Why: {why}\n\n  Cure: {cure}\n")
