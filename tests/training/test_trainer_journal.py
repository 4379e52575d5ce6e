"""What a full disk refuses is written later, in its order; nothing is lost and nothing raises."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import events
from launcher.training.reporting.journal import Journal


def test_lines_wait_for_better_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    append, full = events.append, [False]

    def refusing(path: Path, record: dict[str, Any]) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, record)

    monkeypatch.setattr(events, "append", refusing)
    journal = Journal()
    for number in range(6):
        full[0] = 1 <= number <= 3
        journal.append(tmp_path / ("even" if number % 2 == 0 else "odd"), {"number": number})
    journal.event(tmp_path / "odd", "saved", step=7)
    assert [record["number"] for record in events.read(tmp_path / "even")] == [0, 2, 4]
    odd = list(events.read(tmp_path / "odd"))
    assert [record.get("number") for record in odd] == [1, 3, 5, None] and (
        odd[-1]["event"],
        odd[-1]["step"],
    ) == ("saved", 7)
    assert caplog.text.count("No space left on device") == 1
