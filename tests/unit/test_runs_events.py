"""Lines of events.jsonl and metrics.jsonl: appended whole, and after a torn one on a line of their own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from launcher.runs import events


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
    for number in range(3):
        events.append(tmp_path / "log", {"number": number})
    assert [record["number"] for record in events.read(tmp_path / "log")] == [0, 1, 2]
    assert (tmp_path / "log").read_text().count("\n") == 3


@pytest.mark.parametrize("torn", ['{"number": 0, "lo', "{", "\x00\x00"])
def test_a_line_that_was_cut_short_takes_no_other_with_it(torn: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    events.append(log, {"number": -1})
    with open(log, "a") as file:
        file.write(torn)
    events.append(log, {"number": 1})
    events.append(log, {"number": 2})
    assert [record["number"] for record in events.read(log)] == [-1, 1, 2]


def test_a_line_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="No space left") as raised:
        events.append(tmp_path / "log", {"number": 1})
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    events.append(tmp_path / "log", {"number": 2})
    assert [record["number"] for record in events.read(tmp_path / "log")] == [2]
