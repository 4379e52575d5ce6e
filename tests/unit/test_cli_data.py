"""How `launcher data inspect` looks, of what was seen of some data."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.cli.data_view import show
from tests.unit.test_runs_prepared import CUT, record


def piece(text: str, learned: bool = False, special: bool = False) -> dict[str, Any]:
    return {"text": text, "learned": learned, "special": special}


def sample(*pieces: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {
        "row": 1,
        "file": "/data/a.jsonl",
        "line": 1,
        "num_tokens": 7,
        "num_learned": 2,
        "cut": False,
        "num_beside": 0,
        "label": None,
    }
    return found | {"pieces": list(pieces)} | more


def seen(*samples: dict[str, Any], dropped: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    bins = {
        "shortest": 3.0,
        "median": 20.0,
        "mean": 21.5,
        "longest": 64.0,
        "quantile_95": 60.0,
        "bins": [[0, 32, 600], [32, 64, 300], [64, 96, 1]],
    }
    made = record(dropped or {}) | {
        "files": [{"path": "/data/a.jsonl", "bytes": 9}],
        "lengths": bins,
        "max_length": 64,
        "balance": None,
        "remarks": [],
    }
    return (
        made
        | {
            "num_dropped": sum((dropped or {}).values()),
            "emptiest": None,
            "refused": None,
            "samples": list(samples),
        }
        | more
    )


def shown(content: dict[str, Any], terminal: bool = False, whole: bool = False, **settings: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, highlight=False, markup=False, **settings)
    show(content, console, whole)
    return file.getvalue()


ANSWER = (piece("2 + 2 ="), piece(" 4", learned=True), piece("<|end|>", learned=True, special=True))


def test_what_is_learned_stands_between_marks_without_colour() -> None:
    text = shown(seen(sample(*ANSWER)))
    assert "\x1b" not in text
    assert "2 + 2 =⟦ 4<|end|>⟧\n" in text and "(what is learned stands between ⟦ and ⟧)" in text
    assert "row 1 | a.jsonl, line 1 | 7 tokens, 2 learned\n" in text
    assert "⟦" in shown(seen(sample(*ANSWER)), terminal=True, no_color=True), "NO_COLOR"


def test_marks_are_none_that_the_text_has() -> None:
    assert "a⟦⟦1 ⟦2> 3⟧⟧b" in shown(seen(sample(piece("a"), piece("1 ⟦2> 3", learned=True), piece("b"))))


def test_what_is_learned_has_a_colour_on_a_terminal() -> None:
    text = shown(seen(sample(*ANSWER)), terminal=True, color_system="standard")
    assert "\x1b[32m 4\x1b[0m" in text and "\x1b[1;32m<|end|>\x1b[0m" in text and "⟦" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_in_the_data_is_obeyed_by_the_terminal(terminal: bool) -> None:
    text = shown(seen(sample(piece("a\x1b]0;title\x07b[red]c"), label=["x\x1b[2J"])), terminal)
    assert "a\\x1b]0;title\\x07b[red]c" in text and "\x1b]0" not in text and "\x1b[2J" not in text


def test_counts_bars_and_packs_fit_80_columns() -> None:
    classes = {f"class {'x' * 40} {number}": 1000 - number for number in range(30)}
    content = seen(
        dropped={"too long": 8, "empty": 4}, num_cut=3, fill=0.991, emptiest=0.5, balance={"classes": classes}
    )
    text = shown(content)
    assert max(map(len, text.splitlines())) <= 80
    assert (
        "        8    0.8%  too long" in text
        and "4    0.4%  empty" in text
        and "first: b.jsonl, line 9:" in text
    )
    assert "3    0.3%  cut to max_length\n" in text and "first: a.jsonl, line 2: cut to 64 tokens" in text
    assert "warning: train: 12 of 1,000 rows (1.2%) are dropped" in text
    assert "3-31" in text and "32-63" in text and "600 66.6%" in text and "  64 " in text
    assert "988 packs of 64: 99.1% full, the emptiest 50.0%" in text
    assert "Labels: 30 classes" in text and "... 10 more ..." in text and "1,000" in text and "971" in text


def test_numbers_as_labels() -> None:
    spread = {
        "shortest": 1.0,
        "median": 2.5,
        "mean": 2.6,
        "longest": 5.0,
        "bins": [[1.0, 1.5, 3], [1.5, 2.0, 4]],
    }
    text = shown(seen(sample(piece("x"), label=2.5), balance={"numbers": spread}))
    assert "1 to 1.5" in text and "least 1, median 2.5, mean 2.6, greatest 5" in text and "label: 2.5" in text


def test_of_a_long_sample_the_middle_is_left_out_unless_its_row_was_asked_for() -> None:
    long = sample(piece("begin " + "word " * 2000), piece("the end", learned=True), cut=True, num_beside=2)
    text = shown(seen(long))
    assert "begin word" in text and "⟦the end⟧" in text and "characters left out" in text
    assert "cut | 1 of 3 in its pack" in text
    assert "left out" not in shown(seen(long), whole=True)


def test_tokens_one_a_line() -> None:
    tokens = [
        {"id": 17, "token": "Ġa", "text": " a", "learned": False},
        {"id": 260, "token": "Ãł", "text": "\ufffd", "learned": True},
        {"id": 2, "token": "\\n", "text": "\n", "learned": True},
    ]
    lines = [line.split() for line in shown(seen(sample(*ANSWER, tokens=tokens))).splitlines()]
    assert (
        ["0", "17", "'", "a'"] in lines
        and ["learned", "1", "260", "Ãł"] in lines
        and ["learned", "2", "2", "'\\n'"] in lines
    )


def test_a_row_that_is_not_used_says_why() -> None:
    unused = {"row": 5, "file": "/data/a.jsonl", "line": 5, "reason": "empty", "detail": "'text' has no text"}
    text = shown(seen(unused))
    assert "row 5 | a.jsonl, line 5\n" in text and "not used: empty ('text' has no text)" in text
    assert "Samples" not in shown(seen())


def test_that_a_run_would_be_refused_stands_at_the_top() -> None:
    text = shown(
        seen(
            dropped={"empty": 600}, refused="a run is refused: train data: 600 of 1,000 rows would be dropped"
        )
    )
    assert (
        text.splitlines()[2].startswith("a run is refused: train data: 600 of 1,000 rows")
        and "warning" not in text
    )


def test_nothing_dropped_and_nothing_cut_has_no_table() -> None:
    assert "Rows dropped" not in shown(seen())
    assert CUT["cut"]


def test_what_is_taken_for_what_is_said() -> None:
    assert "the labels are numbers, and are taken for" in shown(
        seen(sample(piece("x")), remarks=["the labels are numbers, and are taken for ids"])
    )
