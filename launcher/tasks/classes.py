"""The classes of a model with a classification head, and the lookup of a row's label among them."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.data.labels import WHOLE as _WHOLE
from launcher.errors import ConfigurationError, Problem

_GENERIC = re.compile(r"label[ _-]?(\d+)", re.IGNORECASE)
"""transformers' default names of classes: LABEL_0, LABEL_1 ..."""
_BETWEEN = re.compile(r"[\s_-]+")


_OTHER_HEADS = {"AudioClassification": ("SequenceClassification",)}
"""Further name endings of classes with a head: wav2vec2 and its kin have these for audio."""


def of_model(config: Any, head: str = "SequenceClassification") -> list[str] | None:
    """Return the class names of a checkpoint with this head, in the order of their ids; None without the
    head.

    Every transformers config has an id2label. That there is a head is known from the class that the model was
    saved from, else from non-default names.
    """
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    if not names or sorted(names) != list(range(len(names))):
        return None
    named = any(_GENERIC.fullmatch(name) is None for name in names.values())
    architectures = [str(name) for name in getattr(config, "architectures", None) or ()]
    ends = tuple(f"For{name}" for name in (head, *_OTHER_HEADS.get(head, ())))
    own_code = str((getattr(config, "auto_map", None) or {}).get(f"AutoModelFor{head}", "")).rpartition(".")[
        2
    ]
    has_head = (
        any(name.endswith(ends) or name == own_code for name in architectures) if architectures else named
    )
    return [names[number] for number in range(len(names))] if has_head else None


def is_number(name: str) -> bool:
    """Return whether a class's name is a whole number: `3` or `-1`, but not `03`."""
    return name.removeprefix("-").isdecimal() and str(int(name)) == name


def spelling(name: str) -> str:
    """Return a class's name in a normal form: without case, in Unicode's NFC, and with `_` and `-` as spaces;
    `LABEL_3` is `3`."""
    plain = unicodedata.normalize("NFC", name).strip()
    generic = _GENERIC.fullmatch(plain) or _WHOLE.fullmatch(plain)
    return str(int(generic[1])) if generic else _BETWEEN.sub(" ", plain).strip().casefold()


def same(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two heads have the same classes in the same order, whatever their spelling."""
    return [spelling(name) for name in first] == [spelling(name) for name in second]


class Classes:
    """Class ids by exact name, else by `spelling`, else by number.

    A spelling that two classes share means neither. A number means the class with that id if `by_number` is
    set and no class's name is a number: for rows whose labels are the model's class ids.
    """

    def __init__(self, names: Sequence[str], by_number: bool = False) -> None:
        self.names = list(names)
        self._exact = {name: number for number, name in enumerate(names)}
        spelt: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            spelt.setdefault(spelling(name), []).append(number)
        self._spelt = {text: numbers[0] for text, numbers in spelt.items() if len(numbers) == 1}
        self._by_number = by_number and not any(is_number(text) for text in spelt)

    def id_of(self, name: str) -> int | None:
        """Return the id of the class that `name` means, or None."""
        number = self._exact.get(name, self._spelt.get(spelling(name)))
        if (
            number is None
            and self._by_number
            and name.isdecimal()
            and is_number(name)
            and int(name) < len(self.names)
        ):
            return int(name)
        return number

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the `names` that mean none of the classes, sorted."""
        return sorted(name for name in names if self.id_of(name) is None)

    def numbered(self, names: Iterable[str]) -> bool:
        """Return whether any of `names` is matched by its number alone."""
        return any(
            name not in self._exact and spelling(name) not in self._spelt and self.id_of(name) is not None
            for name in names
        )


def taken_by_number(own: Classes) -> str:
    """Return the remark that labels are read as the ids of the model's classes."""
    shown = ", ".join(f"{number} is {name!r}" for number, name in enumerate(own.names[:8]))
    return f"the labels are numbers, and are taken for the ids of the model's classes: {shown}"


def new_head(own: list[str], names: set[str], unknown: list[str]) -> str:
    """Return the remark that a new head is trained, as the model's classes are not those of the rows."""
    theirs, ours = ", ".join(map(repr, own[:8])), ", ".join(map(repr, unknown[:8]))
    return (
        f"the model's {len(own)} classes ({theirs}) are not those of the rows: of {len(names)} it does "
        f"not have {ours}. "
        "A new classification head is made and trained, and the model's own is not used"
    )


def by_class(key: str, given: float | Mapping[str, float], names: Sequence[str], other: float) -> list[float]:
    """Return a number for each class from one number for all, or from numbers by name; `other` for classes
    not named.

    Raises ConfigurationError for a name that means none of the classes.
    """
    if not isinstance(given, Mapping):
        return [given] * len(names)
    ids, values = Classes(names), [other] * len(names)
    for name, value in given.items():
        if (number := ids.id_of(name)) is None:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            reason = f"there is no such class among {len(names)}" + (
                f"; the nearest is {near[0]!r}" if near else ""
            )
            raise ConfigurationError(Problem(key, name, reason))
        values[number] = value
    return values


def one_of_two(key: str, given: str, ids: Classes) -> int:
    """Return the id of the named one of two classes. Raises ConfigurationError if it is neither, or if there
    are not two."""
    names = ids.names
    if len(names) != 2:
        reason = f"there are {len(names)} classes, and f1 is the mean over them; leave it out"
        raise ConfigurationError(Problem(key, given, reason))
    if (number := ids.id_of(given)) is None:
        reason = f"is none of the classes; write {names[0]!r} or {names[1]!r}"
        raise ConfigurationError(Problem(key, given, reason))
    return number


def write_to(config: Any, names: Sequence[str]) -> None:
    """Write the classes into a model's config, in the order of their ids."""
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def without_head(config: Any, has: str) -> ConfigurationError:
    """Return the error for a model that is to be evaluated without training and lacks the head for it."""
    reason = f"{has}; train it first, and measure the run"
    return ConfigurationError(Problem("MODEL", getattr(config, "name_or_path", None) or None, reason))


def check_known(ids: Classes, names: Iterable[str], kind: str, key: str, column: str | None) -> None:
    """Raise ConfigurationError if rows have classes that the model does not know: its predictions for them
    would mean nothing. `kind` is the word for classes in the message."""
    if unknown := ids.unknown(names):
        shown, own = ", ".join(map(repr, unknown[:5])), ", ".join(map(repr, ids.names[:8]))
        reason = (
            f"the rows have {len(unknown)} {kind} that the model does not know ({shown}); its own are {own}"
        )
        raise ConfigurationError(Problem(key, column, reason))
