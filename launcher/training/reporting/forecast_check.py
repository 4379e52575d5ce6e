"""Compare the first steps of an attempt with the forecast, and keep the ratios."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from typing import Any

import torch

from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.machine import Machine
from launcher.training.devices import lap_memory

NUM_STEPS = 3
"""After so many steps of an attempt; the first, in which much happens once, does not count for the speed."""
BETWEEN = "between steps"
STEADY = "steady step"
_LEAST = 1 << 30
"""Bytes that come and go in a step: where it is less, libraries that are loaded meanwhile are most of what
was not foreseen."""
_MOST = 1.0
"""Of what comes and goes: more than that is something else than an allocator's slack."""


class ForecastCheck:
    """One rank's comparison with the run's forecast. Made before the model is loaded, so that what the bare
    process has is known."""

    def __init__(self, run: RunDirectory, device: torch.device) -> None:
        self._run, self._device = run, device
        lap = lap_memory(device)
        self._bare = lap.now if device.type == "cpu" else 0
        self._rates: list[float] = []
        self._phases: dict[str, int] = {}
        self._held = 0
        # Where there is room ranks on a CPU have the C library keep what is freed: no slack of the plan's.
        threshold = os.environ.get("MALLOC_TRIM_THRESHOLD_", "0")
        keeps_freed_memory = threshold.isdigit() and int(threshold) >= 1 << 30
        self._teaches = lap.is_fresh and not keeps_freed_memory
        """Whether what a step holds says something of the allocator."""

    def ended(self, phase: str) -> None:
        """A phase before or between the first steps is over: take note of its highest moment."""
        if len(self._rates) >= NUM_STEPS:
            return
        lap = lap_memory(self._device)
        self._phases[phase] = max(self._phases.get(phase, 0), lap.peak - self._bare, 0)
        self._phases[BETWEEN] = max(0, lap.now - self._bare)
        self._held = max(self._held, lap.held - self._bare) if phase == STEADY else 0

    def saves(self) -> None:
        """Note that memory is kept for a save from now on, beside what a step needs."""
        self._teaches = False

    def note(self, num_tokens: int, seconds: float) -> dict[str, Any] | None:
        """Take note of a step of all ranks; what came of the comparison after the last one that counts, else
        None."""
        self.ended(STEADY if self._rates else "first step")
        self._rates.append(num_tokens / seconds)
        if len(self._rates) != NUM_STEPS:
            return None
        measured = {
            "tokens_per_second": round(statistics.median(self._rates[1:]), 2),
            "memory_bytes": max(self._phases.values()),
            "phases": self._phases,
        }
        expected = self._expected()
        content: dict[str, Any] = {"measured": measured, "expected": expected}
        with contextlib.suppress(OSError):
            write_atomically(self._run.path / "measured.json", json.dumps(content, indent=2) + "\n")
        return content

    def _expected(self) -> dict[str, Any]:
        """By the forecast, of the same kind as what is measured; empty where there was none of this plan."""
        try:
            forecast = read_json(self._run.forecast_file)
            if forecast.get("digest") != Plan.read(self._run.plan_file).digest():
                return {}
            live = {name: phase["live"] for name, phase in forecast["phases"].items()}
            live[BETWEEN] = live["loading"]
            phases = {name: live[name] for name in self._phases}
            expected = {"memory_bytes": max(phases.values()), "phases": phases}
            machine = Machine.read()
            if speed := forecast.get("speed"):
                expected["tokens_per_second"] = round(speed["tokens_per_second"], 2)
                machine = machine.with_ratio(forecast["kind"], self._ratio(speed, forecast.get("duration")))
            self._with_slack(machine, forecast).write()
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return expected

    def _ratio(self, speed: dict[str, float], lasts: dict[str, float] | None) -> float:
        """Return what a step took of what the speed model alone had said; what it waits for its data is
        foreseen beside that."""
        bare_rate, seconds = (
            speed["tokens_per_second"] * speed["correction"],
            1 / statistics.median(self._rates[1:]),
        )
        tokens = speed["tokens_per_second"] * speed["step_seconds"]
        data = lasts["data_seconds"] / lasts["steps"] / tokens if lasts else 0.0
        return bare_rate * max(seconds - data, 0.1 * seconds)

    def _with_slack(self, machine: Machine, forecast: dict[str, Any]) -> Machine:
        """With the share of what comes and goes in a step that was there beside what was foreseen to live."""
        phase, kind = forecast["phases"][STEADY], forecast.get("slack_kind")
        moving = phase["live"] - sum(
            phase["parts"].get(name, 0) for name in ("parameters", "optimizer state")
        )
        if not kind or not self._teaches or moving < _LEAST:
            return machine
        return machine.with_slack(kind, min(_MOST, max(0.0, (self._held - phase["live"]) / moving)))
