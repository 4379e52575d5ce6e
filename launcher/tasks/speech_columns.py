"""The section `data` of a job that writes down what is said in a sound."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launcher.tasks.audio_columns import SoundColumns


class SpeechColumns(SoundColumns):
    """Rows of a sound with what is said in it."""

    text: str = "text"
    """The column of what is said."""
    too_long: Literal["drop", "refuse"] = "drop"
    """Whether a sound of more than `seconds`, or a text of more than `max_target_length`, is dropped or
    refused: of a part of a sound nobody knows which words are in it."""
    max_target_length: int = Field(default=448, ge=8, le=100_000_000)
    """Tokens of the longest text of a model that writes (Whisper has 448 positions). A CTC model has a frame
    for each character at least."""
    case: Literal["keep", "lower", "upper"] = "keep"
    """Whether texts are written in lower or upper case, as a model's own characters may be."""
    vocabulary: Literal["model", "text"] | None = None
    """Of a CTC model: the characters that it writes are those of its tokenizer, or of the training texts
    (with a new head). Left out, its tokenizer's where it has one."""
    language: str | None = None
    """The language that a multilingual Whisper writes, by its code (`de`) or name. Left out, as its tokenizer
    says."""
    translate: bool = False
    """Have Whisper's token say that it translates into English, in place of writing down what is said."""
    normalization: Literal["none", "basic", "english"] = "none"
    """How answers and texts are made alike before errors are counted: `basic` without case, punctuation and
    what stands in brackets, `english` beside that without the spelling of numbers and contractions. Both are
    Whisper's (Radford et al. 2022, arXiv 2212.04356, appendix C)."""
