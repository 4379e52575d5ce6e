"""Answer every row of a file by a run's model, or one in a directory, supervised like an attempt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.launch.evaluation import Request
from launcher.launch.scratch import ask
from launcher.launch.screen import Watcher
from launcher.runs.partial import refuse_existing
from launcher.tasks.task import AnswerOptions


@dataclass(frozen=True)
class Prediction:
    """Say which model answers which rows, and where the answers go."""

    request: Request
    rows: Path
    output: Path
    options: AnswerOptions

    def run(self, watcher: Watcher) -> dict[str, Any]:
        """Write the answers; the summary. Raises Stopped where a stop was asked for, else the failure's own
        class."""
        refuse_existing(self.output)
        data = self.request.plan.data
        source = type(data.train)(path=str(self.rows.absolute()))
        data = data.model_copy(update={"evaluation": source, "packing": False})
        plan = self.request.plan.model_copy(update={"data": data})
        wanted = self.request.asked | {"output": str(self.output.absolute()), "options": asdict(self.options)}
        summary = ask(plan, "launcher.training.predict_entry", wanted, "prediction.json", watcher)
        return {"output": str(self.output), **summary, "engine": plan.engine, "ranks": plan.mesh.world_size}
