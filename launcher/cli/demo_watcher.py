"""What the demo shows of a run while it runs: one line for each thing worth reading, on a terminal or in a log."""

from __future__ import annotations

import time
from typing import Any

from launcher.runs.layout import RunDirectory
from launcher.runs.tail import Tail
from launcher.scheduling.supervisor import Watcher

_SECONDS_BETWEEN_STEPS = 8.0


class StepPrinter(Watcher):
    """Prints phases, some of the steps, evaluations and saves as they are written into the run directory."""

    def begin(self, run: RunDirectory, attempt: int) -> None:
        self._events, self._metrics = Tail(run.events_file, from_end=True), Tail(run.metrics_file, from_end=True)
        self._phase, self._total, self._shown = "", 0, 0.0

    def tick(self) -> None:
        for record in self._events.records():
            if line := self._line(record):
                self.say(line)
        for record in self._metrics.records():
            now = time.monotonic()
            if record.get("kind") == "train" and (now - self._shown > _SECONDS_BETWEEN_STEPS or record["step"] == self._total):
                self._shown = now
                self.say(
                    f"step {record['step']:3} of {self._total}   loss {record['loss']:.3f}   {record['tokens_per_second']:.0f} tokens/s"
                )

    def say(self, line: str) -> None:
        print(f"   {line}", flush=True)

    def end(self) -> None:
        self.tick()

    def _line(self, record: dict[str, Any]) -> str:
        match record:
            case {"event": "phase", "phase": phase} if phase not in (self._phase, "training"):
                self._phase = phase
                return f"{phase} ..."
            case {"event": "training", "total_steps": total}:
                self._total = total
            case {"event": "evaluated", "step": step, "metrics": {"loss": loss, "perplexity": perplexity}}:
                return f"held-out loss after step {step}: {loss:.3f} (perplexity {perplexity:.1f})"
            case {"event": "saved", "step": step, "bytes": num_bytes, "seconds": seconds}:
                return (
                    f"saved step {step}: {num_bytes / 1e6:,.0f} MB of parameters and optimizer state in {seconds:.1f} s, verified by hashes"
                )
            case {"event": "resumed", "step": step, "checkpoint": checkpoint}:
                return f"resumed at step {step} from {checkpoint}"
        return ""
