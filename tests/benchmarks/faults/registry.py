"""What an injection is, what must be seen of it, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks.faults.scene import Scene

VARIANTS: dict[str, dict[str, object]] = {
    "FSDP": {},
    "FSDP, plain saving": {"checkpoint": {"async": False}},
    "ZeRO-2": {"parallel": {"engine": "deepspeed", "shard": "gradients"}},
    "ZeRO-2, plain saving": {
        "parallel": {"engine": "deepspeed", "shard": "gradients"},
        "checkpoint": {"async": False},
    },
    "ZeRO-3": {"parallel": {"engine": "deepspeed", "shard": "full"}},
    "ZeRO-3, plain saving": {
        "parallel": {"engine": "deepspeed", "shard": "full"},
        "checkpoint": {"async": False},
    },
    "FSDP, adapter": {"model": {"adapter": {"rank": 4}}},
    "ZeRO-3, adapter": {
        "parallel": {"engine": "deepspeed", "shard": "full"},
        "model": {"adapter": {"rank": 4}},
    },
}
"""Changes to the job, by the name that the table shows."""
PLAIN = tuple(name for name, changes in VARIANTS.items() if "checkpoint" in changes)
"""Those that do not save in the background."""
ONE = ("FSDP",)
ENGINES = ("FSDP", "ZeRO-2, plain saving", "ZeRO-3")
SAVING = ("FSDP", "FSDP, plain saving", "ZeRO-2", "ZeRO-3", "ZeRO-3, plain saving", "FSDP, adapter")
ALL = tuple(VARIANTS)


@dataclass(frozen=True)
class Expected:
    """How an attempt that was hit must end. What is None is not looked at."""

    codes: tuple[int, ...] | None = (0,)
    failure_class: str | None = None
    words: tuple[str, ...] = ()
    """All of them must stand in what the launcher printed, in any case of letters."""
    seconds: float = 15.0
    """Between the fault and the end of all processes; where it must survive, until its end."""
    resumes: bool = True
    """Whether it is resumed to its end and compared with the undisturbed run: same samples, losses and norms
    equal to the bit."""
    bits: bool = True
    """Whether losses and norms must be equal to the bit, or the samples alone."""
    most_lost: int = 6
    """Steps that may be done again: an interval, and the one under way; two intervals where saves go on beside steps."""


@dataclass(frozen=True)
class Injection:
    """One fault: `do` starts a run, breaks something, and looks at what is peculiar to it."""

    name: str
    row: str
    """The number in the matrix, or of the line among the faults that were seen before."""
    fault: str
    do: Callable[[Scene], None]
    expected: Expected
    variants: tuple[str, ...]
    missing: Callable[[], str | None]


INJECTIONS: list[Injection] = []


def injection(
    row: str,
    fault: str,
    expected: Expected | None = None,
    variants: tuple[str, ...] = ONE,
    missing: Callable[[], str | None] = lambda: None,
    name: str = "",
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Add a function to the list; its name is the injection's, if no other is given."""

    def add(do: Callable[[Scene], None]) -> Callable[[Scene], None]:
        INJECTIONS.append(
            Injection(name or do.__name__, row, fault, do, expected or Expected(), variants, missing)
        )
        return do

    return add
