"""What every benchmark shares: the conditions it ran under, the memory of other processes, and where its
figures go."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / "docs" / "benchmarks"
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's command line, with `--dry`."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--dry", action="store_true", help="print, and write nothing")
    return arguments


def conditions(*packages: str) -> dict[str, Any]:
    """Date, commit, processor and versions: a figure means nothing without them."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = set(match[1].split()) if (match := re.search(r"flags\s*: (.*)", text)) else set()
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "processor": name[1] if name else platform.processor(),
        "cores": os.cpu_count(),
        "features": [feature for feature in _FEATURES if feature in flags],
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def sentence(conditions: dict[str, Any]) -> str:
    """The conditions on one line."""
    known = ("date", "commit", "processor", "cores", "features", "load_before", "python")
    versions = ", ".join(f"{key} {value}" for key, value in conditions.items() if key not in known)
    features = " ".join(conditions["features"]) or "no vector features known"
    return (
        f"{conditions['date']}, commit {conditions['commit']}; {conditions['cores']} x "
        f"{conditions['processor']} ({features}), "
        f"load {conditions['load_before']} before; Python {conditions['python']}, {versions}."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(name: str, title: str, text: str, figures: dict[str, Any], preface: str = "") -> Path:
    """Put the section `title` into docs/benchmarks/NAME.md, in place of an older one, and the raw figures
    into NAME.json beside it."""
    DOCUMENTS.mkdir(parents=True, exist_ok=True)
    page, raw = DOCUMENTS / f"{name}.md", DOCUMENTS / f"{name}.json"
    old = page.read_text(encoding="utf-8") if page.exists() else preface.rstrip() + "\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = (
        pattern.sub(lambda _: section + "\n", old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    )
    page.write_text(new.rstrip() + "\n", encoding="utf-8")
    kept = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}
    raw.write_text(json.dumps(kept | {title: figures}, indent=1) + "\n", encoding="utf-8")
    return page


class MemoryMonitor:
    """Looks at a process and its descendants every 50 ms and keeps each one's peaks.

    Both sides of a comparison are measured from outside in the same way: resident memory at its highest
    (VmHWM), and anonymous memory (RssAnon), which leaves out the pages of mapped files.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peaks: dict[int, dict[str, int]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            for pid in [self.pid, *descendants(self.pid)]:
                now = memory_of(pid)
                peak = self.peaks.setdefault(pid, {})
                for key, value in now.items():
                    peak[key] = max(peak.get(key, 0), value)

    def largest(self, count: int) -> dict[str, list[int]]:
        """Peaks in bytes of the `count` processes that had the most: the ranks."""
        self._done.set()
        self._thread.join()
        ranks = sorted(self.peaks.values(), key=lambda peak: -peak.get("anonymous", 0))[:count]
        return {key: [rank.get(key, 0) for rank in ranks] for key in ("resident", "anonymous")}


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, as /proc shows them now."""
    found, frontier = [], [pid]
    while frontier:
        parent = frontier.pop()
        try:
            lists = [path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children")]
        except OSError:
            continue
        children = [int(child) for text in lists for child in text.split()]
        found += children
        frontier += children
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Highest resident memory and present anonymous memory of a process, in bytes; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    wanted = {"VmHWM": "resident", "RssAnon": "anonymous"}
    return {
        wanted[key]: int(value) * 1024
        for key, value in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", text, re.MULTILINE)
    }


def matrix_rate(precision: str, seconds: float = 3.0) -> float:
    """FLOP/s of matrix products of the model's kind of size on all cores, the best of several."""
    code = (
        "import time, torch, sys\n"
        "kind = {'fp32': torch.float32, 'bf16': torch.bfloat16}[sys.argv[1]]\n"
        "a, b = torch.randn(1024, 1536).to(kind), torch.randn(1536, 1536).to(kind)\n"
        "end, best = time.monotonic() + float(sys.argv[2]), 0.0\n"
        "while time.monotonic() < end:\n"
        "    start = time.monotonic()\n"
        "    a @ b\n"
        "    best = max(best, 2 * 1024 * 1536 * 1536 / (time.monotonic() - start))\n"
        "print(best)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, precision, str(seconds)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def timed(command: Sequence[str], **options: Any) -> float:
    """Wall seconds of a command that must succeed."""
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, **options)
    return time.monotonic() - start
