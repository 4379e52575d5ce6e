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
    """One value in the plan's vocabulary, and where it was said."""

    key: str
    value: Any
    source: str
    said: str
    is_default: bool = False
    """Left out there: it is what the tool that reads the file then takes. Whatever any file says goes before
    it."""


@dataclass(frozen=True)
class Remark:
    """One thing to know about a key of a file."""

    kind: Kind
    source: str
    said: str
    value: Any
    text: str


@dataclass
class Reading:
    """Facts, remarks and problems of one file."""

    source: str
    rank: int = 0
    """Of two files that say different things, the one with the lower rank wins."""
    facts: list[Fact] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """Keys that are `auto`."""
    follow: list[str] = field(default_factory=list)
    """Other files that this one names."""
    names: dict[str, str] = field(default_factory=dict)
    """Keys that are read under another tool's name for them -> as the file spells them."""
    tool: str = ""
    """Whose defaults stand where it leaves a key out."""
    left_open: set[str] = field(default_factory=set)
    """Keys of the job that it leaves to others."""
    is_partial: bool = False
    """Another file, which is not here, says the rest: nothing that is not said is known to be left out."""
    lacks_engine: bool = False
    """A file of Accelerate's or DeepSpeed's that it names is not here: precision may stand there."""
    unknown: set[str] = field(default_factory=set)
    """Its own keys whose values the shell alone knows."""
    commands: list[str] = field(default_factory=list)
    """What people have to run before the job that is made of it."""
    overrides: dict[str, tuple[dict[str, Any], bool]] = field(default_factory=dict)
    """Of a file that it names: what is said in place of the file's keys, and whether TRL reads it."""

    def say(self, key: str, value: Any, said: str) -> None:
        self.facts.append(Fact(key, value, self.source, self._spelled(said)))

    def default(self, key: str, value: Any, said: str) -> None:
        """Say what the tool takes where the file leaves `said` out; nothing where the key has been said."""
        if not self.says(key) and key not in self.left_open and self.unknown.isdisjoint(said.split(", ")):
            self.facts.append(Fact(key, value, self.source, self._spelled(said), is_default=True))

    def take(self, content: dict[str, Any], keys: dict[str, str], read: Read, prefix: str = "") -> None:
        """Say what stands at each of the file's keys as the job's key, as `read`, one of ours, reads it."""
        for option, key in keys.items():
            if (value := read(self, content, option, prefix)) is not None:
                self.say(key, value, prefix + option)

    def say_once(self, key: str, value: Any, said: str) -> None:
        """Say a value, unless another key of the file has said one before."""
        if not self.says(key):
            self.say(key, value, said)

    def says(self, key: str) -> bool:
        """Return whether the file has said something of a key."""
        return any(fact.key == key for fact in self.facts)

    def was_taken(self, said: str) -> bool:
        """Return whether something was taken from a key of the file."""
        return any(fact.said == self._spelled(said) and not fact.is_default for fact in self.facts)

    def said_value(self, key: str) -> Any:
        """Return what it said first; None where it said nothing."""
        return next((fact.value for fact in self.facts if fact.key == key), None)

    def leave_open(self, key: str) -> None:
        """Take no default for a key of the job: the file leaves it to others, by `auto`."""
        self.left_open.add(key)

    def remark(self, kind: Kind, said: str, value: Any, text: str) -> None:
        """Write down what there is to know of a key; a value that may be a secret is not kept."""
        spelled = self._spelled(said)
        shown = "(not shown)" if _SECRET.search(spelled) and value is not None else redact_all(value)
        self.remarks.append(Remark(kind, self.source, spelled, shown, redact(text)))

    def cannot_say(self, said: str, value: Any, text: str) -> None:
        """Remark what a job has no word for."""
        self.remark("cannot be said", said, value, text)

    def change(self, said: str, value: Any, text: str) -> None:
        """Remark what means something else in a job."""
        self.remark("changes meaning", said, value, text)

    def ignore(self, said: str, value: Any, text: str) -> None:
        """Remark what a job does not need."""
        self.remark("ignored", said, value, text)

    def ignore_all(self, content: dict[str, Any], keys: Iterable[str], text: str, prefix: str = "") -> None:
        """Remark in one line what a job needs none of; nothing where there are none."""
        if keys := [*keys]:
            self.ignore(
                ", ".join(prefix + key for key in keys), ", ".join(brief(content[key]) for key in keys), text
            )

    def choose(self, said: str, value: Any, text: str) -> None:
        """Remark what launcher chooses."""
        self.remark("chosen", said, value, text)

    def fill_in(self, said: str, value: Any, text: str) -> None:
        """Remark what people have to write themselves."""
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
        """Return the mapping at a key; empty where there is none. Another type is a problem."""
        value = content.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(f"{prefix}{key}", value, f"is {_kind(value)}, where a section of keys stands")
            return {}
        return {str(name): entry for name, entry in value.items()}

    def number(self, content: dict[str, Any], key: str, prefix: str = "", least: float = 0.0) -> float | None:
        """Return a finite number of at least `least`; None where it is absent, `auto`, or not one (which is a
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
    """Return the number in a value, written as one or as text; None where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def brief(value: Any) -> str:
    """Return a value of any kind in few characters; what is nested is not shown."""
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
