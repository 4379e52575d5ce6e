"""The first steps of an attempt beside what the planner foresaw: written down, shown, and kept for the next plan on this machine."""

from __future__ import annotations

import contextlib
import json
import statistics
from typing import Any

import psutil
import torch

from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.machine import Machine
from launcher.training.devices import peak_memory_bytes

NUM_STEPS = 3
"""After so many steps of an attempt; the first, in which much happens once, does not count for the speed."""


class Foreseen:
    """One rank's comparison with the run's forecast. Made before the model is loaded, so that what the bare process has is known."""

    def __init__(self, run: RunDirectory, device: torch.device) -> None:
        self._run, self._device = run, device
        self._bare = psutil.Process().memory_info().rss if device.type == "cpu" else 0
        self._rates: list[float] = []

    def note(self, num_tokens: int, seconds: float) -> dict[str, Any] | None:
        """Take note of a step of all ranks; what came of the comparison after the last one that counts, else None."""
        self._rates.append(num_tokens / seconds)
        if len(self._rates) != NUM_STEPS:
            return None
        measured = {
            "tokens_per_second": round(statistics.median(self._rates[1:]), 2),
            "memory_bytes": max(0, peak_memory_bytes(self._device) - self._bare),
        }
        expected = self._expected()
        content: dict[str, Any] = {"measured": measured, "expected": expected}
        with contextlib.suppress(OSError):
            write_atomically(self._run.path / "measured.json", json.dumps(content, indent=2) + "\n")
        return content

    def _expected(self) -> dict[str, Any]:
        """By the forecast, of the same kind as what is measured; empty where there was none."""
        try:
            forecast = json.loads(self._run.forecast_file.read_text(encoding="utf-8"))
            phases = forecast["phases"]
            found = {"memory_bytes": max(phases[name]["live"] for name in ("loading", "steady step"))}
            if speed := forecast.get("speed"):
                found["tokens_per_second"] = round(speed["tokens_per_second"], 2)
                self._learn(forecast["kind"], speed)
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found

    def _learn(self, kind: str, speed: dict[str, float]) -> None:
        """What a step took of what the speed model alone had said."""
        bare_rate = speed["tokens_per_second"] * speed["correction"]
        Machine.read().with_ratio(kind, bare_rate / statistics.median(self._rates[1:])).write()
