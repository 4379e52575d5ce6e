"""The measured speeds of this machine."""

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
"""The configuration of a model so small that its step time is only the overhead of calling operators."""
REFERENCE_LENGTH = 16


@dataclass(frozen=True)
class Rates:
    """The measured rates of one device, in operations and bytes per second, for all cores of a CPU or for one
    GPU."""

    device: str
    """cpu, or the name of the GPU."""
    when: str
    matrix: dict[str, float]
    """The rate of large matrix products, by precision."""
    bandwidth: float
    """The memory bandwidth, read and written."""
    link: float | None = None
    """The rate at which a rank receives in a large all-gather on this machine; None if it had only one rank."""
    reference: dict[str, float] = field(default_factory=dict)
    """Seconds of a forward and backward pass of REFERENCE on one sample, by activation checkpointing."""
    message: float | None = None
    """Seconds that FSDP takes per message in addition to its bytes, among the ranks of this machine."""
    to_device: float | None = None
    to_host: float | None = None
    disk_write: float | None = None
    disk_read: float | None = None
    num_ranks: int = 1
    """The number of ranks among which messages were measured."""
    quick: bool = False
    """Whether the measurement was short and incomplete."""


@dataclass(frozen=True)
class Machine:
    """The rates of all devices of one machine."""

    rates: tuple[Rates, ...] = ()

    @classmethod
    def read(cls) -> Machine:
        """Return this machine's rates; empty if none were measured or the file cannot be read."""
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
        """Save the rates. If the home directory cannot be written, only the measurement is lost."""
        try:
            path().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path(), json.dumps(asdict(self), indent=2) + "\n")
        except OSError:
            return

    def of(self, device: str) -> Rates | None:
        """Return the rates of a device, by its name."""
        return next((rates for rates in self.rates if rates.device == device), None)

    def disk_rate(self) -> float | None:
        """Return the bytes per second of disk reads or writes, whichever is slower; None if unknown."""
        known = [rate for rates in self.rates for rate in (rates.disk_write, rates.disk_read) if rate]
        return min(known, default=None)

    def with_rates(self, rates: Rates) -> Machine:
        """Return a copy with a device's rates replaced."""
        others = (other for other in self.rates if other.device != rates.device)
        return replace(self, rates=(*others, rates))


def path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return XDG_STATE_HOME/launcher/machines/HOST.json: many machines may share a home directory."""
    state = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "launcher" / "machines" / f"{platform.node() or 'machine'}.json"
