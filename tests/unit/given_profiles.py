"""Programs of models for tests that import no torch: a profile that was traced before, or any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.planner.memory.profile import Profile
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.plan import Plan

FOLDER = Path(__file__).parents[1] / "data" / "profiles"


def traced(name: str) -> Profile:
    """Return a profile of tests/data/profiles: `bert` is a classifier of two layers, 128 wide, at 128 tokens in fp32."""
    return Profile.from_json(json.loads((FOLDER / f"{name}.json").read_text()))


@dataclass(eq=False)
class Given(Profiles):
    """The one program, whatever the model."""

    program_of_all: Program | Unknown = Unknown("nothing is given")

    def find(self, plan: Plan) -> Program | Unknown:
        return self.program_of_all


def given(program: Program | Unknown) -> Profiles:
    """Return where every model is this one."""
    return Given(program_of_all=program)
