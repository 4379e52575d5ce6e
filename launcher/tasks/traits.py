"""Describe a kind of task to the planner, the loader and PEFT, in place of its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SampleLayout = Literal["packed", "padded", "single"]
"""How samples share a pass: joined end to end, padded on the right, or not at all."""
Head = Literal["chunked", "model", "forward"]
"""Where a causal LM's loss comes from: the output matrix in chunks, the model's own head in chunks, or its
whole forward."""

HEADS = "task_heads"
"""The attribute of a config that says which heads a model of several tasks has: by task, the name of an Auto
class under `auto_class`, and what is special to that head's config."""


@dataclass(frozen=True)
class Traits:
    """A kind of task as the planner, the loader and PEFT see it, in place of its name."""

    layout: SampleLayout
    """How its samples share a pass in most models."""
    causal: bool
    """Whether a token sees only those before it."""
    head: Literal["every-position", "one-per-sample", "few-per-position"]
    """Where the model's head computes: logits of the vocabulary at every position, one vector for each
    sample, or a few numbers at every position, as tags have."""
    encoder_decoder: bool = False
    """Whether the model reads one sequence and writes another."""
    peft_type: str | None = None
    """PEFT's name for it (`peft.TaskType`); None where PEFT has none."""
    windows: bool = False
    """Whether a row that is too long for one sample becomes several."""
    unit: str = "token"
    """What a sample's length counts."""
    reads_files: bool = False
    """Whether `encode` and `collate` read and decode files, so that processes do it ahead of the step."""
