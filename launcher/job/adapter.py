"""The section `model.adapter`: which layers get matrices or vectors, or which vectors stand before samples."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from launcher.errors import Problem
from launcher.values import Fraction, Line, Section

_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Names of the matrix that makes logits."""
PROMPT = "prompt_embeddings"
"""The name of virtual tokens' vectors in peft's files; in a model they belong to its input embeddings."""
ENCODER = "prompt_encoder"
"""The name of P-tuning's encoder, in peft's models and below the input embeddings here."""
PREFIX = "prefix_key_values"
"""The name of prefix tuning's keys and values in each attention of a model."""
_OWN = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".ia3_l")
"""The ends of the names of parameters beside a layer, as peft's files have them."""

KINDS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "prompt-tuning": "prompt tuning",
    "p-tuning": "P-tuning",
    "prefix-tuning": "prefix tuning",
}
"""The name of each method in a text."""


class Adapter(Section):
    """Train small matrices or vectors beside the model's own weights, which stay as they are (LoRA, arXiv
    2106.09685; IA3, arXiv 2205.05638; prompt tuning, arXiv 2104.08691; P-tuning, arXiv 2103.10385;
    prefix tuning, arXiv 2101.00190)."""

    method: Literal["lora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning"] = "lora"
    """`lora` adds the product B A to a weight; `ia3` multiplies each number that a layer puts out by a
    learned factor; `prompt-tuning` puts learned vectors before each sample's embeddings; `p-tuning` puts
    there what a small learned network, the encoder, makes of such vectors; `prefix-tuning` puts learned
    keys and values before those of each sample in every layer."""
    rank: int = Field(default=16, ge=1, le=65_536)
    """The rank of the product B A: A has so many rows, and B so many columns."""
    alpha: float = Field(default=32.0, gt=0)
    """The scale: B A is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that a higher rank learns no more slowly (rsLoRA, arXiv
    2312.03732)."""
    dora: bool = False
    """Learn the length of each row of a weight beside its direction (DoRA, arXiv 2402.09353). Under FSDP,
    ZeRO-1 and 2."""
    init: Literal["lora", "pissa", "olora"] = "lora"
    """How A and B start. `lora`: B is zero. `pissa`: they are the weight's largest singular values (arXiv
    2404.02948). `olora`: they are the first rows of its QR factors (arXiv 2406.01775). The weight then
    lacks what they have."""
    dropout: Fraction = 0.0
    """The dropout on the input of A."""
    targets: Literal["all-linear"] | Annotated[tuple[Line, ...], Field(min_length=1)] = "all-linear"
    """The linear layers that get an adapter: all in the repeated layers, or those whose name, or its end,
    matches a pattern such as `q_proj`. `ia3` needs a list."""
    feedforward: tuple[Line, ...] = ()
    """The targets of `ia3` whose input is multiplied instead of their output: the last layer of a
    feed-forward part, such as `down_proj`."""
    train_also: tuple[Line, ...] = ()
    """Patterns of parameters that are trained in full beside the adapter, such as `model.norm.*`. A new
    head always is."""
    virtual_tokens: int = Field(default=20, ge=1, le=65_536)
    """The number of vectors that `prompt-tuning` and `p-tuning` put before each sample; of keys and values,
    for `prefix-tuning`. They count in `data.max_length`."""
    init_text: Line | None = None
    """A text from whose tokens' embeddings these vectors start, repeated or cut to their number. Left out, it
    is the embeddings of tokens that are drawn from the vocabulary. `p-tuning` starts as in peft."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The encoder of `p-tuning`: three linear layers, or a bidirectional LSTM and two linear layers."""
    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65_536)
    """The width within that encoder. Left out, it is the width of the model's embeddings."""
    encoder_num_layers: int = Field(default=2, ge=1, le=64)
    """The layers of its LSTM."""
    weights: Line | None = None
    """A directory with an adapter to go on from, as `launcher export --adapter` or peft writes it; its sizes
    are those of the run. `model.name` may name it in place of its base."""

    @property
    def title(self) -> str:
        """Return the method by its name, with the rank: `LoRA, rank 8`, `LoRA, rank 8, DoRA`, `IA3`; of prompt
        tuning and P-tuning with their tokens."""
        if self.method == "ia3":
            return "IA3"
        if self.is_prompt:
            encoder = f" by {self.encoder.upper()}" if self.has_encoder else ""
            return f"{KINDS[self.method]}, {self.virtual_tokens} virtual tokens{encoder}"
        start = {"pissa": "PiSSA", "olora": "OLoRA"}.get(self.init)
        variants = [start, "DoRA" if self.dora else None, "rsLoRA" if self.rslora else None]
        return ", ".join(["LoRA", f"rank {self.rank}", *(name for name in variants if name)])

    @property
    def is_prompt(self) -> bool:
        """Return whether virtual tokens are trained, and no layer changes."""
        return self.method in ("prompt-tuning", "p-tuning", "prefix-tuning")

    @property
    def is_prefix(self) -> bool:
        """Return whether virtual tokens are keys and values in every layer, and none has an embedding."""
        return self.method == "prefix-tuning"

    @property
    def has_encoder(self) -> bool:
        """Return whether a learned network makes the vectors of virtual tokens."""
        return self.method == "p-tuning"

    @property
    def scale(self) -> float:
        """Return how many times B A counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def as_plain(self) -> Adapter:
        """Return PiSSA or OLoRA as a change of the weights before it: a LoRA of twice the rank."""
        times = math.sqrt(2) if self.rslora else 2
        return self.model_copy(update={"init": "lora", "rank": 2 * self.rank, "alpha": times * self.alpha})

    def takes(self, layer: str) -> bool:
        """Return whether a linear layer gets one by its name; with `all-linear` whoever asks has chosen the
        layers."""
        return not self.is_prompt and (self.targets == "all-linear" or _matches(layer, self.targets))

    def scales_input(self, layer: str) -> bool:
        """Return whether IA3 multiplies what goes into a layer, and not what comes out of it."""
        return _matches(layer, self.feedforward)

    def trains(self, name: str) -> bool:
        """Return whether a parameter is trained: an adapter's own, or one of `train_also`."""
        return is_own(name) or self.trains_also(name)

    def trains_also(self, name: str) -> bool:
        """Return whether a parameter of the model's own is trained in full."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.train_also)

    def unmatched(self, layers: Iterable[str], parameters: Iterable[str]) -> list[Problem]:
        """Return every pattern that matches nothing of a model, with the names most like it; `layers` are
        the linear ones that can have one."""
        layers, parameters = list(layers), list(parameters)
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        problems = []
        for pattern in self.feedforward:
            there = [name for name in layers if _matches(name, (pattern,))]
            if not any(self.takes(name) for name in there):
                reason = f"matches no linear layer; {_nearest(pattern, layers if '.' in pattern else ends)}"
                if there:
                    reason = "is none of the targets; name it in model.adapter.targets as well"
                problems.append(Problem("model.adapter.feedforward", pattern, reason))
        for pattern in () if self.targets == "all-linear" else self.targets:
            if not any(_matches(name, (pattern,)) for name in layers):
                reason = (
                    "matches no linear layer that can have one; "
                    f"{_nearest(pattern, layers if '.' in pattern else ends)}"
                )
                problems.append(Problem("model.adapter.targets", pattern, reason))
        # What an adapter's directory names is held against the model when the weights are read, tied names
        # too.
        for pattern in self.train_also if self.weights is None else ():
            if not fnmatch.filter(parameters, pattern):
                reason = f"matches no parameter; {_nearest(pattern, parameters)}"
                if any(fnmatch.fnmatchcase(head, pattern) for head in _HEADS):
                    reason += (
                        "; a head that is tied to the embedding has the embedding's name, and is trained "
                        "with it"
                    )
                problems.append(Problem("model.adapter.train_also", pattern, reason))
        return problems


def is_own(name: str) -> bool:
    """Return whether a parameter's name, without peft's wrappers, is that of an adapter's own."""
    return name.endswith(_OWN) or is_of_virtual_tokens(name)


def is_of_virtual_tokens(name: str) -> bool:
    """Return whether a parameter makes virtual tokens, so that no token of a text is multiplied with it."""
    return name.endswith((f".{PROMPT}", f".{PREFIX}")) or f".{ENCODER}." in name


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    """Return whether a layer's name, or the end of it, is of one of the patterns."""
    return any(
        fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(layer, f"*.{pattern}")
        for pattern in patterns
    )


def _nearest(pattern: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"the nearest are {', '.join(matches)}" if matches else "the model has none"
