"""One finding of the doctor: what was checked, the result, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "failed"]
_ORDER: tuple[Level, ...] = ("ok", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """The result of one check on one machine. A result other than ok comes with advice in one line."""

    check: str
    level: Level
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """The findings on one machine."""

    node: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        return worst(finding.level for finding in self.findings)

    def found(self, check: str) -> str:
        """Return what one check found, if its result is ok."""
        return (
            "; ".join(
                finding.found for finding in self.findings if finding.check == check and finding.level == "ok"
            )
            or "-"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "verdict": self.level,
            "checks": [finding.to_dict() for finding in self.findings],
        }


def worst(levels: Iterable[Level]) -> Level:
    """Return the worst of several levels; ok if there are none."""
    return max(levels, key=_ORDER.index, default="ok")


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def failed(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "failed", found, advice)
