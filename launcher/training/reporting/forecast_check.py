"""Comparison of an attempt's first steps with the forecast."""

from __future__ import annotations

import contextlib
import json
import statistics
from typing import Any

import torch

from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.training.devices import lap_memory

NUM_STEPS = 3
"""The number of compared steps; the first, with one-time work, does not count for the speed."""
BETWEEN = "between steps"
STEADY = "steady step"


class ForecastCheck:
    """One rank's comparison with the run's forecast. It is created before the model is loaded, to know the
    memory of the bare process."""

    def __init__(self, run: RunDirectory, device: torch.device) -> None:
        self._run, self._device = run, device
        lap = lap_memory(device)
        self._bare = lap.now if device.type == "cpu" else 0
        self._rates: list[float] = []
        self._phases: dict[str, int] = {}

    def ended(self, phase: str) -> None:
        """Record the peak memory of a phase before or between the first steps, at its end."""
        if len(self._rates) >= NUM_STEPS:
            return
        lap = lap_memory(self._device)
        self._phases[phase] = max(self._phases.get(phase, 0), lap.peak - self._bare, 0)
        self._phases[BETWEEN] = max(0, lap.now - self._bare)

    def note(self, num_tokens: int, seconds: float) -> dict[str, Any] | None:
        """Record a step of all ranks. Return the comparison after the last compared step, else None."""
        self.ended(STEADY if self._rates else "first step")
        self._rates.append(num_tokens / seconds)
        if len(self._rates) != NUM_STEPS:
            return None
        measured: dict[str, Any] = {
            "tokens_per_second": round(statistics.median(self._rates[1:]), 2),
            "memory_bytes": max(self._phases.values()),
            "phases": self._phases,
        }
        measured |= {"bare_bytes": self._bare} if self._bare else {}
        expected = self._expected()
        content: dict[str, Any] = {"measured": measured, "expected": expected}
        with contextlib.suppress(OSError):
            write_atomically(self._run.path / "measured.json", json.dumps(content, indent=2) + "\n")
        return {**content, "device": self._device.type}

    def _expected(self) -> dict[str, Any]:
        """Return the forecast of the measured values; empty if this plan had none."""
        try:
            forecast = read_json(self._run.forecast_file)
            if forecast.get("digest") != Plan.read(self._run.plan_file).digest():
                return {}
            live = {name: phase["live"] for name, phase in forecast["phases"].items()}
            live[BETWEEN] = live["loading"]
            phases = {name: live[name] for name in self._phases}
            expected = {"memory_bytes": max(phases.values()), "phases": phases}
            if speed := forecast.get("speed"):
                expected["tokens_per_second"] = round(speed["tokens_per_second"], 2)
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return expected
