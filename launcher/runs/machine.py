"""Measurements of this machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from launcher.plain_files import read_json
from launcher.runs.layout import write_atomically

REFERENCE = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
"""A model so small that a step of it is nothing but the calling of operators."""
REFERENCE_LENGTH = 16


@dataclass(frozen=True)
class Rates:
    """One machine's own figures. Rates are operations and bytes a second, of all cores of a CPU or of one
    GPU."""

    device: str
    """cpu, or the name of the GPU."""
    when: str
    matrix: dict[str, float]
    """Large products, by precision."""
    bandwidth: float
    """Of its memory, read and written."""
    link: float | None = None
    """What a rank of several on this machine receives in a large all-gather; None where one rank was all
    there is."""
    reference: dict[str, float] = field(default_factory=dict)
    """Seconds of a forward and backward pass of REFERENCE over one sample, by what is recomputed."""
    message: float | None = None
    """Seconds that FSDP takes for each message beside its bytes, among the ranks of this machine."""
    to_device: float | None = None
    to_host: float | None = None
    disk_write: float | None = None
    disk_read: float | None = None
    num_ranks: int = 1
    """Among which messages were measured."""
    quick: bool = False
    """Whether it was measured for a short time, and not all of it."""


@dataclass(frozen=True)
class Machine:
    """All that is known of one machine."""

    rates: tuple[Rates, ...] = ()

    @classmethod
    def read(cls) -> Machine:
        """Return this machine's; empty where nothing was measured, or the file cannot be read."""
        try:
            known = {one.name for one in fields(Rates)}  # earlier versions kept more
            return cls(
                tuple(
                    Rates(**{name: value for name, value in rates.items() if name in known})
                    for rates in read_json(path())["rates"]
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self) -> None:
        """Keep it. A home that cannot be written loses a measurement and nothing else."""
        try:
            path().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path(), json.dumps(asdict(self), indent=2) + "\n")
        except OSError:
            return

    def of(self, device: str) -> Rates | None:
        """Return the rates of a device, by its name."""
        return next((rates for rates in self.rates if rates.device == device), None)

    def disk_rate(self) -> float | None:
        """Return the bytes a second read or written, whichever is slower."""
        known = [rate for rates in self.rates for rate in (rates.disk_write, rates.disk_read) if rate]
        return min(known, default=None)

    def with_rates(self, rates: Rates) -> Machine:
        """Return it with newer figures of a device in the place of older ones."""
        others = (other for other in self.rates if other.device != rates.device)
        return replace(self, rates=(*others, rates))


def path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return XDG_STATE_HOME/launcher/machines/HOST.json: a home may be shared by many machines."""
    state = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "launcher" / "machines" / f"{platform.node() or 'machine'}.json"
