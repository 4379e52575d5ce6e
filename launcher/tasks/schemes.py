"""Tag schemes for entities (BIO, BIOES, IO): tags as entities, and entities as tags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from launcher.data.rows import BAD_LABEL, RowProblem

Scheme = Literal["BIO", "BIOES", "IO", "none"]
"""BIO is IOB2 (Ramshaw and Marcus 1995, arXiv cmp-lg/9505040, with a B before every entity). BIOES marks the
end and single words too (Ratinov and Roth 2009, W09-1119, as BILOU). IO says only what is inside. With none,
tags are classes of words, and there are no entities."""
PREFIXES = {"BIO": "BI", "BIOES": "BIES", "IO": "I"}
_BILOU = str.maketrans("LU", "ES")
OUTSIDE = "O"


class Entity(NamedTuple):
    """A span of words, from `start` up to but not including `end`, and its type."""

    kind: str
    start: int
    end: int


def tag(prefix: str, kind: str) -> str:
    """Return the tag of a word: `B-person`; without a kind (if there is only one), `B`."""
    return f"{prefix}-{kind}" if kind else prefix


def all_tags(kinds: Iterable[str], scheme: Scheme) -> list[str]:
    """Return every tag that a scheme has for these kinds, `O` first."""
    return [OUTSIDE, *(tag(prefix, kind) for kind in sorted(kinds) for prefix in PREFIXES[scheme])]


def split(name: str) -> tuple[str, str] | None:
    """Return a tag's prefix and kind, with BILOU's `L` and `U` as `E` and `S`; None if it is no tag of any
    scheme."""
    prefix, dash, kind = name.partition("-")
    prefix = prefix.translate(_BILOU)
    if (
        prefix not in ("O", "B", "I", "E", "S")
        or len(prefix) != 1
        or bool(dash) != bool(kind)
        or (prefix == "O" and dash)
    ):
        return None
    return prefix, kind


def inside(name: str) -> str:
    """Return the tag for the next piece of the same word or entity: `I-person` after `B-person`; any other
    unchanged."""
    return f"I{name[1:]}" if name[:1] == "B" and split(name) else name


def entities(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """Return the entities that tags mark. Raises RowProblem for tags that are not in the scheme, or out of
    order."""
    closed: list[Entity] = []
    open_: Entity | None = None
    for number, name in enumerate([*tags, OUTSIDE]):
        prefix, kind = _split(name, number, scheme)
        if open_ is not None and prefix in "IE" and kind == open_.kind:
            open_ = open_._replace(end=number + 1)
            if prefix == "E":
                closed.append(open_)
                open_ = None
            continue
        if open_ is not None:
            if scheme == "BIOES":
                raise _out_of_order(
                    tags,
                    number,
                    f"the {open_.kind or 'entity'} before it has no end (E, or S for a single word)",
                )
            closed.append(open_)
            open_ = None
        if prefix in "IE" and scheme != "IO":
            raise _out_of_order(
                tags, number, f"no {kind or 'entity'} begins before it: that is a B in {scheme}"
            )
        if prefix == "S":
            closed.append(Entity(kind, number, number + 1))
        elif prefix != "O":
            open_ = Entity(kind, number, number + 1)
    return closed


def _split(name: str, number: int, scheme: Scheme) -> tuple[str, str]:
    parts = split(name)
    if parts is None or parts[0] not in f"O{PREFIXES[scheme]}":
        prefixes = ", ".join(f"{prefix}-" for prefix in PREFIXES[scheme])
        there = f"{scheme} has O and, with a type behind it, {prefixes}"
        raise RowProblem(BAD_LABEL, f"tag {number + 1}, {name!r}, is none of {scheme}: {there}")
    return parts


def _out_of_order(tags: Sequence[str], number: int, why: str) -> RowProblem:
    shown = f"tag {number + 1}, {tags[number]!r}" if number < len(tags) else "the end of the row"
    return RowProblem(BAD_LABEL, f"{shown}: {why}; say in data.rows_scheme how the rows are written")


def write(marked: Iterable[Entity], num_words: int, scheme: Scheme) -> list[str]:
    """Return a tag for each word. In IO, adjacent entities of one kind merge."""
    tags = [OUTSIDE] * num_words
    for kind, start, end in marked:
        last = end - start - 1
        prefixes = "I" * (last + 1) if scheme == "IO" else "B" + "I" * last
        if scheme == "BIOES":
            prefixes = f"B{'I' * (last - 1)}E" if last else "S"
        tags[start:end] = [tag(prefix, kind) for prefix in prefixes]
    return tags
