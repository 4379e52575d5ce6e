"""Questions about Python's standard library, made from its documentation.

The same Python version gives the same rows in the same order. Rows are held out by module, so that no
function's twin is learned.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules that only define things when they are imported: none opens a window, a browser or a connection.
_NAMES = """
    argparse ast asyncio base64 binascii bisect builtins bz2 calendar cmath codecs collections collections.abc
    colorsys concurrent.futures configparser contextlib contextvars copy csv ctypes.util dataclasses datetime
    decimal difflib dis doctest email.message email.utils enum filecmp fileinput fnmatch fractions ftplib
    functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client
    http.cookies http.server imaplib importlib.metadata importlib.resources importlib.util inspect io
    ipaddress itertools json keyword linecache locale logging logging.config logging.handlers lzma mailbox
    math mimetypes mmap multiprocessing.pool multiprocessing.shared_memory netrc numbers operator optparse os
    os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats pyclbr pydoc
    queue quopri random re reprlib resource runpy sched secrets select selectors shelve shlex shutil signal
    site smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable
    sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback
    tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser
    uuid venv warnings wave weakref webbrowser wsgiref.headers wsgiref.util xml.dom.minidom
    xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(_NAMES.split())

PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
_HELD_OUT_PERCENT = 12
_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)\.(?=\s|$)")


@dataclass(frozen=True)
class Entry:
    """One documented thing: its top-level module, its full name, `name(parameters)` as shown, and the first
    words of its documentation."""

    module: str
    name: str
    shown: str
    kind: str
    summary: str

    @property
    def question(self) -> str:
        return (
            f"What is `{self.shown}` in Python?"
            if self.kind == "class"
            else f"What does `{self.shown}` do in Python?"
        )

    @property
    def held_out(self) -> bool:
        """Return whether this entry's module is measured on rather than learned from."""
        return (
            int(hashlib.sha256(f"launcher demo {self.module}".encode()).hexdigest(), 16) % 100
            < _HELD_OUT_PERCENT
        )

    def row(self) -> dict[str, str]:
        return {
            "prompt": PROMPT.format(question=self.question),
            "completion": self.summary,
            "name": self.name,
        }


def write_rows(directory: Path) -> tuple[int, int]:
    """Write train.jsonl and heldout.jsonl (keys prompt, completion, name); returns how many rows each has."""
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    # In an order that mixes modules and never changes.
    for entry in sorted(entries(), key=lambda entry: hashlib.sha256(entry.name.encode()).digest()):
        rows[entry.held_out].append(entry.row())
    for held_out, name in ((False, "train.jsonl"), (True, "heldout.jsonl")):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[held_out])
        (directory / name).write_text(text, encoding="utf-8")
    return len(rows[False]), len(rows[True])


def entries() -> list[Entry]:
    """Return every entry, in the order of MODULES; a name or a summary that was there before is left out."""
    by_name: dict[str, Entry] = {}
    names: set[str] = set()
    for module_name in MODULES:
        for entry in _module_entries(module_name):
            key = re.sub(r"\W+", " ", entry.summary.lower())[:60]
            if key not in by_name and entry.name not in names:
                by_name[key] = entry
                names.add(entry.name)
    return list(by_name.values())


def _module_entries(module_name: str) -> Iterator[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not on this platform, or not in this Python any more
            return
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, name, None)
            if not name.startswith("_") and _defined_in(module_name, value):
                yield from _value_entries(module_name.split(".")[0], prefix + name, value)


def _defined_in(module_name: str, value: object) -> bool:
    """Return whether a public name is this module's own, or that of the C module behind it."""
    owner = (getattr(value, "__module__", None) or module_name).lstrip("_").split(".")[0]
    return owner in (module_name.split(".")[0], "posix", "posixpath", "genericpath", "builtins")


def _value_entries(module: str, name: str, value: object) -> Iterator[Entry]:
    if inspect.isclass(value):
        yield from _entry(module, name, "class", value)
        for member, attribute in sorted(vars(value).items()):
            function = attribute.__func__ if isinstance(attribute, (classmethod, staticmethod)) else attribute
            if not member.startswith("_") and inspect.isroutine(function):
                yield from _entry(module, f"{name}.{member}", "method", function)
    elif inspect.isroutine(value):
        yield from _entry(module, name, "function", value)


def _entry(module: str, name: str, kind: str, value: object) -> Iterator[Entry]:
    document = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    summary = summarise(document) if isinstance(document, str) else ""
    shown = name if kind == "class" else name + _parameters(value)
    if summary and len(shown) <= 90:
        yield Entry(module, name, shown, kind, summary)


def _parameters(function: object) -> str:
    """`(a, *p)`: names without defaults and annotations; `()` where Python cannot tell."""
    with contextlib.suppress(ValueError, TypeError):
        shown = []
        for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
            star = (
                "*"
                if parameter.kind is parameter.VAR_POSITIONAL
                else "**"
                if parameter.kind is parameter.VAR_KEYWORD
                else ""
            )
            if parameter.name not in ("self", "cls", "type"):
                shown.append(star + parameter.name)
        return f"({', '.join(shown)})"
    return "()"


def summarise(document: str) -> str:
    """Return the first sentence of a documentation text, or "" where it is too short, too long or no
    sentence."""
    lines = inspect.cleandoc(document).splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE_LINE.match(lines[0].strip())):
        lines.pop(0)
    paragraph: list[str] = []
    for line in lines:
        if not line.strip() or line.startswith((" ", ">>>", "-", "*", ":")):
            break
        paragraph.append(line.strip())
    text = " ".join(" ".join(paragraph).split())
    text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[^-.:]*?)?\s*(--|[.:]|->)\s*", "", text)
    text = re.sub(r"``?([^`]*)``?", r"\1", text)
    if match := _SENTENCE_END.search(text):
        text = text[: match.end()]
    usable = (
        5 <= len(text.split()) <= 45
        and text.isascii()
        and text[0].isalpha()
        and "(" not in text.split()[0]
        and "->" not in text
    )
    return text[0].upper() + text[1:].rstrip(".:;,") + "." if usable else ""
