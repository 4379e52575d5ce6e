"""The output of `launcher data inspect`: counts, bars, samples with learned tokens marked."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.runs import prepared

_BAR = 34
"""Characters of the longest bar: with names and counts it fits into 80 columns."""
_CLASSES = 20
"""The most classes that are shown: the most frequent and the rarest."""
_CHARACTERS = 4000
"""The most characters of a sample that are shown; a sample selected by its row is shown in full."""
_LEARNED, _SPECIAL, _LEARNED_SPECIAL = "green", "magenta", "bold green"
_BEFORE, _AFTER = "⟦", "⟧"
"""Marks around what is learned: signs that texts and chat templates seldom have."""
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
"""Control characters, which a terminal would obey; their codes are shown instead."""


def show(seen: dict[str, Any], console: Console, whole: bool) -> None:
    """Print the summary of a data set, or of each of its sources; long samples in full if `whole`,
    otherwise only their beginning and end."""
    if "sheet" in seen:
        sheet = seen["sheet"]
        console.print(Text(f"{sheet['num_samples']} samples are drawn in {sheet['path']}"), soft_wrap=True)
    if "sources" in seen:
        console.print(Text(prepared.line(seen), style="bold"))
        for source in seen["sources"]:
            console.print()
            show(source, console, whole)
        return
    heading = prepared.by_source(seen) if "source" in seen else prepared.line(seen)
    console.print(Text(heading, style="bold"))
    for file in seen["files"]:
        console.print(Text(f"  {file['path']}"), soft_wrap=True)
    if warning := seen["refused"] or prepared.warning(seen):
        console.print(Text(_plain(warning), style="yellow"))
    for remark in seen["remarks"]:
        console.print(Text(_plain(remark), style="yellow"))
    _show_left_out(seen, console)
    _show_lengths(seen, console)
    _show_balance(seen["balance"], console)
    _show_samples(seen, console, whole)


def _show_left_out(seen: dict[str, Any], console: Console) -> None:
    """Print the numbers of rows dropped and cut, by reason, with the first row of each."""
    if not seen["num_dropped"] and not seen["num_cut"]:
        return
    cut = "cut to max_length" if seen.get("unit", "token") == "token" else "cut"
    counts = list(seen["dropped"].items()) + ([(cut, seen["num_cut"])] if seen["num_cut"] else [])
    console.print(Text("\nRows dropped and cut", style="bold"))
    for reason, count in counts:
        is_cut = reason == cut
        fits = (
            one
            for one in seen["examples"]
            if bool(one.get("cut")) == is_cut and (is_cut or one["reason"] == reason)
        )
        console.print(Text(f"  {count:>9,}  {count / seen['rows_read']:>6.1%}  {reason}"))
        if (example := next(fits, None)) is not None:
            where = f"{PurePath(example['file']).name}, line {example['line']:,}"
            console.print(
                Padding(Text(f"first: {where}: {_plain(example['detail'])}", style="dim"), (0, 0, 0, 21))
            )


def _show_lengths(seen: dict[str, Any], console: Console) -> None:
    if seen.get("unit", "token") != "token":
        return
    lengths = seen["lengths"]
    console.print(Text(f"\nLengths in tokens (max_length {seen['max_length']:,})", style="bold"))
    least, most = round(lengths["shortest"]), round(lengths["longest"])
    ends = [(max(low, least), min(high - 1, most), count) for low, high, count in lengths["bins"]]
    console.print(
        _bars([(f"{low:,}-{high:,}" if low < high else f"{low:,}", count) for low, high, count in ends])
    )
    middle = f"median {lengths['median']:,.0f}, mean {lengths['mean']:,.1f}"
    middle += f", 95% up to {lengths['quantile_95']:,.0f}"
    console.print(f"  shortest {lengths['shortest']:,.0f}, {middle}, longest {lengths['longest']:,.0f}")
    if seen["fill"] is not None:
        console.print(
            f"  {prepared.packs(seen)} of {seen['max_length']:,}: {seen['fill']:.1%} full, the "
            f"emptiest {seen['emptiest']:.1%}"
        )


def _show_balance(balance: dict[str, Any] | None, console: Console) -> None:
    if balance is None:
        return
    if "numbers" in balance:
        numbers = balance["numbers"]
        console.print(Text("\nLabels: numbers", style="bold"))
        console.print(_bars([(f"{low:g} to {high:g}", count) for low, high, count in numbers["bins"]]))
        console.print(
            f"  least {numbers['shortest']:g}, median {numbers['median']:g}, mean {numbers['mean']:g}, "
            f"greatest {numbers['longest']:g}"
        )
        return
    classes = sorted(balance["classes"].items(), key=lambda item: -item[1])
    console.print(Text(f"\nLabels: {len(classes)} classes", style="bold"))
    if len(classes) <= _CLASSES:
        console.print(_bars(classes))
        return
    most = max(count for _, count in classes)
    console.print(_bars(classes[: _CLASSES // 2], most))
    console.print(f"  ... {len(classes) - _CLASSES} more ...")
    console.print(_bars(classes[-_CLASSES // 2 :], most))


def _bars(rows: list[tuple[str, int]], most: int = 0) -> Table:
    """Return a table with a bar for each count, and its share of the total."""
    most, total = most or max(count for _, count in rows), sum(count for _, count in rows)
    table = Table.grid(padding=(0, 1))
    table.add_column(max_width=26, justify="right", no_wrap=True, overflow="ellipsis")
    table.add_column(width=_BAR)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, count in rows:
        table.add_row(
            Text(f"  {_plain(name)}"),
            Bar(max(most, 1), 0, count, color="cyan"),
            f"{count:,}",
            f"{count / max(total, 1):.1%}",
        )
    return table


def _show_samples(seen: dict[str, Any], console: Console, whole: bool) -> None:
    if not seen["samples"]:
        return
    coloured = console.color_system is not None and not console.no_color
    learns = any(piece["learned"] for sample in seen["samples"] for piece in sample.get("pieces", ()))
    console.print(Text("\nSamples", style="bold").append_text(_legend(coloured, learns)))
    for sample in seen["samples"]:
        console.print()
        console.print(Text(_heading(sample), style="bold"), soft_wrap=True)
        if "pieces" not in sample:
            console.print(Text(f"not used: {sample['reason']} ({_plain(sample['detail'])})", style="yellow"))
            continue
        if "path" in sample:
            console.print(Text(_plain(sample["path"])), soft_wrap=True)
        if "tokens" in sample:
            console.print(_tokens(sample["tokens"], coloured))
        elif sample["pieces"]:
            console.print(_text(sample["pieces"], coloured, None if whole else _CHARACTERS))


def _legend(coloured: bool, learns: bool) -> Text:
    if not learns:
        return Text("")
    if not coloured:
        return Text(f"  (what is learned stands between {_BEFORE} and {_AFTER})")
    parts = Text("  (").append("learned", _LEARNED).append(", only read, ").append("special", _SPECIAL)
    return parts.append(")")


def _heading(sample: dict[str, Any]) -> str:
    facts = [f"row {sample['row']:,}", f"{PurePath(sample['file']).name}, line {sample['line']:,}"]
    if "pieces" in sample:
        if "num_tokens" in sample:
            facts.append(
                f"{sample['num_tokens']:,} tokens"
                + (f", {sample['num_learned']:,} learned" if sample["num_learned"] else "")
            )
        if sample["cut"]:
            facts.append("cut")
        if sample["num_beside"]:
            facts.append(f"1 of {sample['num_beside'] + 1} in its pack")
        if (label := sample["label"]) is not None:
            facts.append(
                f"label: {', '.join(label) or 'none'}" if isinstance(label, list) else f"label: {label:g}"
            )
    return _plain(" | ".join(facts))


def _text(pieces: list[dict[str, Any]], coloured: bool, limit: int | None) -> Text:
    """Return a sample's text: coloured, or with the learned parts between marks, repeated until the text does
    not contain them."""
    before, after = _BEFORE, _AFTER
    while any(mark in piece["text"] for mark in (before, after) for piece in pieces):
        before, after = before + _BEFORE, after + _AFTER
    text, learning = Text(), False
    for piece in pieces:
        if not coloured and piece["learned"] != learning:
            text.append(after if learning else before)
            learning = piece["learned"]
        text.append(_plain(piece["text"]), _style(piece["learned"], piece["special"]) if coloured else "")
    text.append(after if learning else "")
    if limit is None or len(text) <= limit:
        return text
    left_out = Text(
        f"\n... {len(text) - limit:,} characters left out; --row shows a row as a whole ...\n", style="dim"
    )
    return Text.assemble(text[: limit * 3 // 4], left_out, text[len(text) - limit // 4 :])


def _style(learned: bool, special: bool) -> str:
    return (_LEARNED_SPECIAL if special else _LEARNED) if learned else _SPECIAL if special else ""


def _tokens(tokens: list[dict[str, Any]], coloured: bool) -> Table:
    """Return a table with one token per line: position, id, text, and whether it is learned."""
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row("", "place", "id", "token", style="dim")
    for number, token in enumerate(tokens):
        # An incomplete UTF-8 character has no text of its own.
        text = token["token"] if "\ufffd" in token["text"] else repr(token["text"])
        row = ["learned" if token["learned"] and not coloured else "", str(number), str(token["id"]), text]
        table.add_row(*row, style=_LEARNED if token["learned"] and coloured else None)
    return table


def _plain(text: str) -> str:
    return text.translate(_CONTROL)
