"""Properties of a kind of task that the planner, the loader and PEFT use instead of its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SampleLayout = Literal["packed", "padded", "single"]
"""How samples share a pass: joined end to end, padded on the right, or not at all."""
Head = Literal["chunked", "model", "forward"]
"""How a causal LM's loss is computed: by the output matrix in chunks, the model's own head in chunks, or its
full forward."""

HEADS = "task_heads"
"""The config attribute that lists the heads of a multi-task model: by task, an Auto class's name under
`auto_class`, and the settings of that head's own config."""


@dataclass(frozen=True)
class Traits:
    """The properties of a kind of task."""

    layout: SampleLayout
    """How its samples share a pass in most models."""
    causal: bool
    """Whether a token attends only to those before it."""
    head: Literal["every-position", "one-per-sample", "few-per-position"]
    """The size of the head's output: logits of the vocabulary at every position, one vector for each sample,
    or a few numbers at every position, as for tags."""
    encoder_decoder: bool = False
    """Whether the model is an encoder-decoder."""
    peft_type: str | None = None
    """PEFT's name for it (`peft.TaskType`); None where PEFT has none."""
    prompts: bool = False
    """Whether the virtual tokens of prompt tuning can stand before its samples, with PEFT's own loss."""
    prefixes: bool = False
    """Whether the keys and values of prefix tuning can, with PEFT's own loss."""
    windows: bool = False
    """Whether a row that is too long for one sample becomes several."""
    unit: str = "token"
    """The unit of a sample's length."""
    reads_files: bool = False
    """Whether `encode` and `collate` read and decode files, so that worker processes do it ahead of the
    step."""
