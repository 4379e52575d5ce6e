"""The result of reading a foreign file: values by the plan's names, and remarks on keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.errors import Problem
from launcher.redaction import redact, redact_all

Read = Callable[["Reading", dict[str, Any], str, str], Any]
Kind = Literal["conflict", "changes meaning", "cannot be said", "default", "ignored", "chosen", "fill in"]
_SECRET = re.compile(
    r"(?<!eos_)(?<!pad_)(?<!bos_)(?<!unk_)token(?!i[sz]|s\b|s_)|secret|passw|credential|api_?key|access_?key",
    re.IGNORECASE,
)
_LARGEST = 10**12


@dataclass(frozen=True)
class Fact:
    """One value in the plan's vocabulary, with the key and file that set it."""

    key: str
    value: Any
    source: str
    said: str
    is_default: bool = False
    """True for the tool's default of a key that is left out; any explicit value in a file overrides it."""


@dataclass(frozen=True)
class Remark:
    """One remark on a key of a file."""

    kind: Kind
    source: str
    said: str
    value: Any
    text: str


@dataclass
class Reading:
    """The facts, remarks and problems of one file."""

    source: str
    rank: int = 0
    """The precedence: if two files set different values, the one with the lower rank wins."""
    facts: list[Fact] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """The keys that are `auto`."""
    follow: list[str] = field(default_factory=list)
    """The other files that this one names."""
    names: dict[str, str] = field(default_factory=dict)
    """The file's own spelling of keys that are read under another tool's name."""
    tool: str = ""
    """The tool whose defaults apply to missing keys."""
    left_open: set[str] = field(default_factory=set)
    """The job's keys that it leaves to other files."""
    is_partial: bool = False
    """Whether another file, which is missing, has the rest: a missing key need not mean the tool's default."""
    lacks_engine: bool = False
    """Whether an Accelerate or DeepSpeed file that it names is missing, which may set the precision."""
    unknown: set[str] = field(default_factory=set)
    """Its keys whose values only the shell knows."""
    commands: list[str] = field(default_factory=list)
    """The commands to run before the job that is made of it."""
    overrides: dict[str, tuple[dict[str, Any], bool]] = field(default_factory=dict)
    """For each file that it names: the keys that it overrides there, and whether TRL reads that file."""

    def record(self, key: str, value: Any, said: str) -> None:
        self.facts.append(Fact(key, value, self.source, self._spelled(said)))

    def default(self, key: str, value: Any, said: str) -> None:
        """Record the tool's default for `said`, which the file leaves out; do nothing if the key is set."""
        if not self.has(key) and key not in self.left_open and self.unknown.isdisjoint(said.split(", ")):
            self.facts.append(Fact(key, value, self.source, self._spelled(said), is_default=True))

    def take(self, content: dict[str, Any], keys: dict[str, str], read: Read, prefix: str = "") -> None:
        """Record the value of each of the file's keys under the job's key, read by the method `read`."""
        for option, key in keys.items():
            if (value := read(self, content, option, prefix)) is not None:
                self.record(key, value, prefix + option)

    def record_once(self, key: str, value: Any, said: str) -> None:
        """Record a value, unless another key of the file has set it before."""
        if not self.has(key):
            self.record(key, value, said)

    def has(self, key: str) -> bool:
        """Return whether the file has set a key."""
        return any(fact.key == key for fact in self.facts)

    def was_taken(self, said: str) -> bool:
        """Return whether a value was read from a key of the file."""
        return any(fact.said == self._spelled(said) and not fact.is_default for fact in self.facts)

    def value_of(self, key: str) -> Any:
        """Return the first value that the file set for a key; None if it set none."""
        return next((fact.value for fact in self.facts if fact.key == key), None)

    def leave_open(self, key: str) -> None:
        """Use no default for a key of the job, because the file leaves it to other files by `auto`."""
        self.left_open.add(key)

    def remark(self, kind: Kind, said: str, value: Any, text: str) -> None:
        """Add a remark on a key; a value that may be a secret is not kept."""
        spelled = self._spelled(said)
        shown = "(not shown)" if _SECRET.search(spelled) and value is not None else redact_all(value)
        self.remarks.append(Remark(kind, self.source, spelled, shown, redact(text)))

    def cannot_say(self, said: str, value: Any, text: str) -> None:
        """Remark on a setting that a job cannot express."""
        self.remark("cannot be said", said, value, text)

    def change(self, said: str, value: Any, text: str) -> None:
        """Remark on a setting whose meaning changes in a job."""
        self.remark("changes meaning", said, value, text)

    def ignore(self, said: str, value: Any, text: str) -> None:
        """Remark on a setting that a job does not need."""
        self.remark("ignored", said, value, text)

    def ignore_all(self, content: dict[str, Any], keys: Iterable[str], text: str, prefix: str = "") -> None:
        """Remark in one line on all settings that a job does not need, if there are any."""
        if keys := [*keys]:
            self.ignore(
                ", ".join(prefix + key for key in keys), ", ".join(brief(content[key]) for key in keys), text
            )

    def choose(self, said: str, value: Any, text: str) -> None:
        """Remark on a setting that launcher chooses."""
        self.remark("chosen", said, value, text)

    def fill_in(self, said: str, value: Any, text: str) -> None:
        """Remark on a setting that the user has to write."""
        self.remark("fill in", said, value, text)

    def refuse(self, said: str, value: Any, reason: str) -> None:
        spelled = self._spelled(said)
        shown = None if _SECRET.search(spelled) or isinstance(value, (dict, list)) else redact_all(value)
        if isinstance(shown, str) and len(shown) > 60:
            shown = f"{shown[:60]}..."
        self.problems.append(Problem(f"{self.source}: {spelled}", shown, redact(reason)))

    def _spelled(self, said: str) -> str:
        return ", ".join(self.names.get(name, name) for name in said.split(", "))

    def section(self, content: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
        """Return the mapping at a key; empty if there is none. Any other type is a problem."""
        value = content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(f"{prefix}{key}", value, f"is {_kind(value)}, where a section of keys stands")
            return {}
        return {str(name): entry for name, entry in value.items()}

    def number(self, content: dict[str, Any], key: str, prefix: str = "", least: float = 0.0) -> float | None:
        """Return a finite number of at least `least`; None if it is absent, `auto`, or invalid (which is a
        problem)."""
        value = content.get(key)
        if value is None or self._is_auto(value, f"{prefix}{key}"):
            return None
        number = as_number(value)
        if number is None or not math.isfinite(number) or abs(number) > _LARGEST or number < least:
            reason = f"write a number of at least {least:g}, and at most {_LARGEST:g}"
            self.refuse(f"{prefix}{key}", value, reason)
            return None
        return number

    def count(self, content: dict[str, Any], key: str, prefix: str = "", least: int = 1) -> int | None:
        """Return a whole number; None as for `number`."""
        number = self.number(content, key, prefix, least)
        if number is not None and number != int(number):
            self.refuse(f"{prefix}{key}", content[key], "write a whole number")
            return None
        return None if number is None else int(number)

    def size(self, content: dict[str, Any], key: str, prefix: str = "") -> int | None:
        """Return a whole number that may be 0; None as for `number`."""
        return self.count(content, key, prefix, 0)

    def flag(self, content: dict[str, Any], key: str, prefix: str = "") -> bool | None:
        """Return true or false, as YAML, JSON or a command line write it; None as for `number`."""
        value = content.get(key)
        if value is None or self._is_auto(value, f"{prefix}{key}"):
            return None
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        flag = words.get(str(value).strip().lower())
        if flag is None:
            self.refuse(f"{prefix}{key}", value, "write true or false")
        return flag

    def word(self, content: dict[str, Any], key: str, prefix: str = "") -> str | None:
        """Return a text; None as for `number`."""
        value = content.get(key)
        if value is None or self._is_auto(value, f"{prefix}{key}"):
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self.refuse(f"{prefix}{key}", value, f"is {_kind(value)}, where a word stands")
            return None
        return str(value)

    def _is_auto(self, value: Any, said: str) -> bool:
        if value != "auto":
            return False
        if said not in self.open:
            self.open.append(said)
        return True

    def all_remarks(self) -> list[Remark]:
        """Return the remarks, and one for all keys that are `auto`."""
        if not self.open:
            return self.remarks
        text = (
            "filled in by Accelerate or the Trainer when it starts; here other files say it, or `launcher "
            "plan` decides it"
        )
        return [Remark("changes meaning", self.source, ", ".join(self.open), "auto", text), *self.remarks]


def as_number(value: Any) -> float | None:
    """Return the number in a value, given as a number or as text; None if there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def brief(value: Any) -> str:
    """Return a short text of any value; nested values are not shown."""
    return (
        "{...}"
        if isinstance(value, dict)
        else "[...]"
        if isinstance(value, (list, tuple))
        else " ".join(str(value).split())[:40]
    )


def _kind(value: Any) -> str:
    return {dict: "a section", list: "a list", str: "text", bool: "true or false"}.get(
        type(value), "a number"
    )
