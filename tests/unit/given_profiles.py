"""Programs of models for tests that import no torch: a profile that was traced before, or any other."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.planner.memory.profile import Profile
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Plan

FOLDER = Path(__file__).parents[1] / "data" / "profiles"


def traced(name: str) -> Profile:
    """Return a profile of tests/data/profiles: `bert` is a classifier of two layers, 128 wide, at 128 tokens in fp32."""
    return Profile.from_json(json.loads((FOLDER / f"{name}.json").read_text()))


class Given(Profiles):
    """The one program, whatever the model."""

    def __init__(self, program: Program | Unknown) -> None:
        super().__init__()
        self._given = program

    def find(self, plan: Plan) -> Program | Unknown:
        return self._given


def given(program: Program | Unknown) -> Profiles:
    """Return where every model is this one."""
    return Given(program)
