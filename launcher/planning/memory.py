"""A simple memory rule for models without formulas: training state plus saved activations.

An estimate with room to spare, not a promise: it decides micro-batch and recomputation where a job leaves them open.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job.schema import ActivationCheckpointing, Precision
from launcher.planning.model_shape import ModelShape

USABLE = 0.8
"""The share of a device's memory that is counted on; the rest is for the framework, fragmentation and what we do not count."""
STATE_BYTES = {"adamw": 16, "adam": 16, "sgd": 12}
"""Of each parameter: fp32 weight, fp32 gradient and the optimizer's moments."""
ROOMY_TIMES = 3
"""What a CPU rank that keeps what it frees may hold, in the sizes of its tensors at their highest, and some more."""
TOKENS_PER_PASS = {"cpu": 4096, "cuda": 16384}
"""Tokens beyond which a larger pass is no faster, so that memory is not taken for nothing."""
_ORDER: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
_WITHOUT_SELECTIVE: tuple[ActivationCheckpointing, ...] = ("none", "full")


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on."""

    shape: ModelShape
    precision: Precision
    num_state_bytes: int
    """Of each parameter: fp32 weight, fp32 gradient and the optimizer's moments."""
    shard: int
    """Ranks that one copy of the model is cut over."""
    gathered: bool
    """Whole parameters stay on each rank after the forward pass."""
    adapter_rank: int = 0
    """Of adapters that train in place of the weights; 0 without them."""

    @property
    def _bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def states(self) -> int:
        """Bytes of a rank before the first sample: its shard, and the layers that are gathered at a time (two, or all)."""
        parameters, layers = self.shape.num_parameters, self.shape.num_layers
        whole = 1.0 if self.gathered else min(1.0, 2 / layers)
        gathered = parameters * whole * self._bytes if self.shard > 1 or self.precision != "fp32" else 0
        if self.adapter_rank:
            # Beside each matrix of a layer rank x (inputs + outputs): at most four of attention and three behind it.
            inner = self.shape.hidden_size + self.shape.intermediate_size
            beside = self.adapter_rank * layers * (4 * 2 * self.shape.hidden_size + 3 * inner)
            return int((parameters * self._bytes + beside * self.num_state_bytes) / self.shard + gathered)
        return int(parameters * self.num_state_bytes / self.shard + gathered)

    def of_token(self, checkpointing: ActivationCheckpointing) -> int:
        """Bytes kept of one token over all layers: inputs of matrix products, norms and activation functions."""
        hidden, wide, layers = self.shape.hidden_size, self.shape.intermediate_size, self.shape.num_layers
        whole = 14 * hidden + 5 * wide
        kept: dict[ActivationCheckpointing, int] = {
            "none": whole * layers,
            "selective": (7 * hidden + 3 * wide) * layers + whole,
            "full": hidden * layers + whole,
        }
        return kept[checkpointing] * self._bytes


def choose_checkpointing(
    setting: Setting, memory_bytes: int, num_tokens: int, selective: bool = True
) -> tuple[ActivationCheckpointing, str]:
    """The least recomputation with which one sample of `num_tokens` fits, and why. Not every engine can do it by `selective`."""
    room = int(memory_bytes * USABLE) - setting.states()
    for way in _ORDER if selective else _WITHOUT_SELECTIVE:
        kept = setting.of_token(way) * num_tokens
        if kept <= room:
            return way, f"a sample of {num_tokens} tokens keeps about {gib(kept)} of the {gib(room)} that the model leaves free"
    needed = gib(setting.states() + setting.of_token("full") * num_tokens)
    return "full", f"about {needed} would be needed even so, and {gib(memory_bytes)} are there: it may run out of memory"


def micro_batch_limit(
    setting: Setting | None, way: ActivationCheckpointing, memory_bytes: int, num_tokens: int, device: str
) -> tuple[int, str]:
    """The most samples of one pass, and what sets the limit."""
    fast = max(1, TOKENS_PER_PASS[device] // num_tokens)
    reason = f"more than {TOKENS_PER_PASS[device]} tokens of a pass are no faster"
    if setting is None:
        return fast, reason
    room = int(memory_bytes * USABLE) - setting.states()
    fitting = max(1, room // max(1, setting.of_token(way) * num_tokens))
    return (fast, reason) if fast <= fitting else (fitting, f"more would not fit into {gib(memory_bytes)}")


def keeps_freed(live: int, memory_bytes: int) -> bool:
    """Whether there is room for ranks of a CPU to keep what they free; `live` are the bytes of a rank's tensors at their highest."""
    return 0 < ROOMY_TIMES * live <= memory_bytes


def gib(num_bytes: int) -> str:
    """Bytes of memory for people: `1.5 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:.1f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
