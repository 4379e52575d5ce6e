"""`launcher doctor`: what the nodes said, held against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.doctor import compare
from launcher.doctor.compare import Node
from launcher.doctor.finding import Report, failed, ok, warning, worst

PLACE = Path("/shared")


def test_the_worst_counts() -> None:
    assert worst([]) == "ok"
    report = Report("n1", (ok("a", "fine"), warning("b", "so so", "look"), failed("c", "bad", "mend")))
    assert (
        report.level == "failed"
        and report.found("a") == "fine"
        and report.found("c") == report.found("d") == "-"
    )
    assert report.to_dict()["checks"][1] == {
        "check": "b",
        "level": "warning",
        "found": "so so",
        "advice": "look",
    }


def healthy(name: str, number: int = 3, **changes: dict[str, Any]) -> Node:
    """What a node says when all is well; `changes` go over what it says to an order."""
    others = [f"n{index + 1}" for index in range(number) if f"n{index + 1}" != name]
    answers: dict[str, dict[str, Any]] = {
        "hello": {"versions": {"torch": "2.13"}, "findings": [ok("GPUs", "none").to_dict()]},
        "meet": {"unresolved": [], "wrong": {}, "interface": "eth0", "address": "10.0.0.1"},
        "connect": {"unreachable": {}, "ahead": dict.fromkeys(others, 0.0)},
        "write": {"bytes_per_second": 1e9, "free": 1e12},
        "read": {"missing": [], "seconds": 0.1},
        "prepare": {"import_seconds": 3.0},
        "reduce": {"seconds": 1.0, "bytes_per_second": 1e9},
    }
    return Node(name, {order: {**answer, **changes.get(order, {})} for order, answer in answers.items()})


def compared(*nodes: Node) -> list[Report]:
    return compare.reports(nodes, PLACE)


def wrong(report: Report) -> list[tuple[str, str]]:
    assert all(finding.advice for finding in report.findings if finding.level != "ok")
    return [(finding.check, finding.level) for finding in report.findings if finding.level != "ok"]


class TestCompare:
    @pytest.mark.parametrize(
        ("changes", "problems", "said"),
        [
            ({}, [], ""),
            (
                {"hello": {"versions": {"torch": "2.12"}}},
                [("versions", "failed")],
                "torch 2.12, elsewhere 2.13",
            ),
            (
                {"hello": {"versions": {"torch": ""}}},
                [("versions", "failed")],
                "torch not installed, elsewhere 2.13",
            ),
            ({"hello": {"findings": [failed("GPUs", "ECC", "go").to_dict()]}}, [("GPUs", "failed")], "ECC"),
            ({"meet": {"unresolved": ["n1", "n3"]}}, [("names", "failed")], "n1, n3 does not resolve"),
            ({"meet": {"wrong": {"n1": "127.0.1.1"}}}, [("names", "warning")], "n1 is 127.0.1.1"),
            ({"meet": {"problem": "no such interface"}}, [("interface", "failed")], "no such interface"),
            (
                {"connect": {"unreachable": {"n1": "10.0.0.1 port 1: no answer", "n3": "x"}}},
                [("ports", "failed")],
                "no answer), and 1 more",
            ),
            ({"connect": {"problem": "too many open files"}}, [("ports", "failed")], "too many open files"),
            (
                {"write": {"problem": "/shared: Permission denied"}},
                [("directory", "failed")],
                "Permission denied",
            ),
            ({"read": {"problem": "Stale file handle"}}, [("directory", "failed")], "Stale"),
            ({"read": {"missing": ["n1"]}}, [("directory", "failed")], "what n1 wrote is not seen here"),
            ({"read": {"seconds": 8.0}}, [("directory", "warning")], "seen after 8 s"),
            ({"write": {"free": 1e9}}, [("directory", "warning")], "1 GB free"),
            ({"prepare": {"problem": "a rank ended with code 1"}}, [("all-reduce", "failed")], "code 1"),
            (
                {"reduce": {"problem": "not done after 60 s"}},
                [("all-reduce", "failed")],
                "not done after 60 s",
            ),
        ],
    )
    def test_one_node_that_differs(
        self, changes: dict[str, Any], problems: list[tuple[str, str]], said: str
    ) -> None:
        first, second, third = compared(healthy("n1"), healthy("n2", **changes), healthy("n3"))
        assert (wrong(first), wrong(second), wrong(third)) == ([], problems, [])
        assert any(said in finding.found for finding in second.findings if finding.level != "ok") or not said

    @pytest.mark.parametrize(("ahead", "level"), [(0.5, None), (5.0, "warning"), (-100.0, "failed")])
    def test_clocks(self, ahead: float, level: str | None) -> None:
        """One clock is off: n2 sees both others off by as much, and yet n2 alone is to blame."""
        own = {"connect": {"ahead": {"n1": -ahead, "n3": -ahead}}}
        others = {"connect": {"ahead": {"n2": ahead}}}
        reports = compared(healthy("n1", **others), healthy("n2", **own), healthy("n3", **others))
        assert [wrong(report) for report in reports] == [[], [("clock", level)] if level else [], []]

    def test_a_silent_node_is_the_only_one_to_blame(self) -> None:
        missing = {
            "meet": {"unresolved": ["n2"]},
            "connect": {"unreachable": {"n2": "no answer"}},
            "read": {"missing": ["n2"]},
            "reduce": {"problem": "not done after 60 s"},
        }
        silent = Node("n2", {"hello": healthy("n2").answers["hello"]}, silent_at="meet", last_words="Killed")
        first, second, _ = compared(healthy("n1", **missing), silent, healthy("n3", **missing))
        assert wrong(first) == [("all-reduce", "failed")]
        assert "n2 gave no answer" in first.findings[-1].advice
        assert (
            wrong(second) == [("answers", "failed")]
            and "no answer to `meet` (Killed)" in second.findings[0].found
        )

    def test_a_node_that_cannot_begin(self) -> None:
        (report,) = compared(Node("n1", {"hello": {"problem": "port 20007 is taken"}}))
        assert wrong(report) == [("answers", "failed")] and report.findings[0].found == "port 20007 is taken"

    def test_one_node_alone(self) -> None:
        alone = healthy("n1", meet={"interface": "", "address": ""})
        del alone.answers["connect"], alone.answers["reduce"], alone.answers["prepare"]
        (report,) = compared(alone)
        assert wrong(report) == [] and report.found("interface") == "one node needs none"
