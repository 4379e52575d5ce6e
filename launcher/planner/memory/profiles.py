"""Sources of a plan's model program: formulas, a cached profile, or a new trace."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.planner.hardware.detect import cpu_flags
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.memory.profile import Profile
from launcher.planner.memory.program import Program, Unit, Weight
from launcher.planner.memory.teacher import Taught
from launcher.planner.memory.written_states import TaughtAhead
from launcher.planner.model.model_config import config_of, locate
from launcher.planner.model.model_shape import Stack, stored_parameters
from launcher.planner.plan import Plan
from launcher.runs import cache
from launcher.tasks.written_logits import Manifest

FORMAT = 4
"""Version of the files; a file of another version is not read."""
SECONDS = 600.0
"""Time limit of a trace."""
_PACKAGES = ("torch", "transformers", "launcher", "peft")


@dataclass(frozen=True)
class Unknown:
    """A model whose memory cannot be forecast."""

    reason: str
    """The cause, in one clause."""
    profile: Profile | None = None
    """Its parameters, if they are known anyway."""


@contextlib.contextmanager
def tell(line: str) -> Iterator[None]:
    """Write a line to stderr, apart from a command's own output."""
    print(line, file=sys.stderr, flush=True)
    yield


@dataclass(eq=False)
class Profiles:
    """The planner's source of models: formulas, profiles in the cache, and traces."""

    starts: bool = False
    """Whether to start a trace, in a separate process, if there is neither formula nor profile."""
    formulas: bool = True
    """Whether to use the formulas if they cover the model."""
    waiting: Callable[[str], AbstractContextManager[None]] = tell
    """A context manager around a trace, called with one line that explains the wait."""
    _known: dict[str, Program | Unknown | ConfigurationError] = field(default_factory=dict)

    def find(self, plan: Plan) -> Program | Unknown:
        """Return the program of a plan's model, or the reason why there is none.

        Raises ConfigurationError for a config without a size that the formulas need. It also raises it if a
        trace shows that the trainer would refuse: the model cannot do the task, or a pattern matches nothing.
        """
        config = config_of(plan.model)
        if config is None:
            revision = ["--revision", plan.model.revision] if plan.model.revision else []
            command = shlex.join(["hf", "download", plan.model.name, "config.json", *revision])
            ways = f"fetch it (`launcher plan --fetch`, or `{command}`), name its directory, or write "
            ways += "model.config"
            return Unknown(f"no config.json of {plan.model.name} on this machine; {ways}")
        if plan.distillation is not None:
            return self._taught(plan, config) if plan.distillation.teacher else self._taught_ahead(plan)
        if beside := tasks.unprepared(plan).companions:
            return Unknown(
                f"the task asks models beside this one ({', '.join(beside)}), whose memory nothing counts"
            )
        if self.formulas and (formulas := formulas_of(plan, config)) is not None:
            return formulas
        # A search changes a plan thousands of times in ways on which its profile does not depend.
        key = _key(plan, config)
        if key not in self._known:
            self._known[key] = self._profile(plan, key, str(config.get("model_type")))
        answer = self._known[key]
        if isinstance(answer, ConfigurationError):
            raise answer
        return answer

    def _taught(self, plan: Plan, config: dict[str, Any]) -> Program | Unknown:
        student = self.find(plan.model_copy(update={"distillation": None}))
        beside = plan.of_teacher()
        teacher = self.find(beside)
        if isinstance(student, Unknown):
            return student
        if isinstance(teacher, Unknown):
            return Unknown(f"of its teacher: {teacher.reason}")
        if plan.distillation is None or plan.distillation.hidden_states is None:
            return Taught(student, teacher)
        own, other = Stack.of(config), Stack.of(config_of(beside.model))
        return Taught(student, teacher, (own, other) if own is not None and other is not None else None)

    def _taught_ahead(self, plan: Plan) -> Program | Unknown:
        student = self.find(plan.model_copy(update={"distillation": None}))
        speaks = tasks.find(plan.task).traits.head == "every-position"
        if isinstance(student, Unknown) or not speaks:
            return student
        assert plan.distillation is not None and plan.distillation.logits is not None
        try:
            manifest = Manifest.read(Path(plan.distillation.logits))
        except ConfigurationError as error:
            return Unknown(f"of the logits written ahead: {error.problems[0].reason}")
        return student if manifest.hidden is None else TaughtAhead.of(student, manifest)

    def _profile(self, plan: Plan, key: str, kind: str) -> Program | Unknown | ConfigurationError:
        path = cache.root() / "profiles" / f"{key}.json"
        answer = _read(path)
        if answer is None and not self.starts:
            return Unknown(
                f"no profile of this {kind} model for {plan.task} is in the cache, and none is made now"
            )
        if answer is None:
            what = f"finding out what memory this {kind} model takes, by tracing its class"
            with self.waiting(f"{what}: up to a minute, and once, as later plans know it ..."):
                answer = _trace(plan)
            if "profile" in answer:
                _keep(path, answer)
        problems = [Problem(*problem) for problem in answer.get("problems", ())]
        if any(problem.key != "model.name" for problem in problems):
            return ConfigurationError(problems)
        if "profile" not in answer:  # its class cannot be built here
            reason = problems[0].reason if problems else answer["failure"]
            # The number of parameters in its files is all that is known.
            number = 0 if plan.model.adapter is not None else stored_parameters(plan.model)
            whole = Unit((Weight("all", (number,)),))
            parameters = Profile(plan.data.max_length, whole, ()) if number else None
            return Unknown(f"its class cannot be traced: {reason}", parameters)
        profile = Profile.from_json(answer["profile"])
        return (
            profile
            if profile.untraceable is None
            else Unknown(f"its class cannot be traced: {profile.untraceable}", profile)
        )


CACHED = Profiles()
"""A source that starts no trace: formulas and cached profiles only."""


def _key(plan: Plan, config: dict[str, Any]) -> str:
    model = plan.model.model_dump(mode="json", exclude={"name", "revision", "config"})
    data = plan.data.model_dump(mode="json", exclude={"train", "evaluation", "num_workers"})
    hangs_on = [
        FORMAT, config, model, data, plan.task, plan.attention, plan.layout, plan.head, plan.precision,
        # A CPU's kernels were traced for their own memory, which differs by the processor's instruction sets.
        plan.mesh.device, sorted(cpu_flags()) if plan.mesh.device == "cpu" else None,
        _own_code(plan.model.name, plan.model.revision) if "auto_map" in config else None, _versions(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(hangs_on, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _own_code(name: str, revision: str | None) -> list[tuple[str, int, int]]:
    files = sorted(Path(locate(name, revision)).glob("*.py"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@functools.cache
def _versions() -> list[str]:
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    return versions


def _read(path: Path) -> dict[str, Any] | None:
    """Return the answer of an earlier trace; None if its file is missing or damaged."""
    try:
        answer = read_json(path)
        Profile.from_json(answer["profile"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return answer


def _keep(path: Path, answer: dict[str, Any]) -> None:
    """Write an answer into the cache atomically; a cache that cannot be written is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".new", delete=False, encoding="utf-8"
        ) as file:
            json.dump(answer, file)
        Path(file.name).replace(path)
    except OSError:
        return


def _trace(plan: Plan) -> dict[str, Any]:
    """Trace the plan's model in a separate process, as this one imports no torch, and return its answer."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "profile.json"
        command = [sys.executable, "-m", "launcher.training.tracing.make_profile", str(out)]
        # Without this, PyTorch's profiler, which records the kernels' memory, writes a line each time.
        quiet = os.environ | {"KINETO_LOG_LEVEL": "99"}
        try:
            done = subprocess.run(
                command, input=plan.to_json(), capture_output=True, text=True, timeout=SECONDS, env=quiet
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"not within {SECONDS:.0f} s"}
        except OSError as error:
            return {"failure": str(error)}
        try:
            answer: dict[str, Any] = read_json(out)
        except (OSError, ValueError):
            last = next(
                (line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing"
            )
            return {"failure": f"its process left with code {done.returncode}: {last}"}
        return answer
