"""The texts of speech rows, as the ids that a model learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from launcher.data.rows import TOO_LONG, Row, RowProblem, text_of
from launcher.tasks.speech_columns import SpeechColumns
from launcher.tasks.speech_processor import frames_needed

TEXT_TOO_LONG = "text too long for its sound"
UNKNOWN_CHARACTERS = "characters that the model does not know"


def spoken(row: dict[str, Any], data: SpeechColumns) -> str:
    """Return a row's transcript, in one line and in the job's case. Raises RowProblem if it has none."""
    text = " ".join(text_of(row, data.text).split())
    return {"keep": text, "lower": text.lower(), "upper": text.upper()}[data.case]


def spoken_in(rows: Iterable[Row], data: SpeechColumns) -> Iterator[str]:
    """Yield the transcripts of the rows that have one."""
    for row in rows:
        if not isinstance(row.values, RowProblem):
            try:
                yield spoken(row.values, data)
            except RowProblem:
                continue


def token_ids(text: str, tokenizer: Any, config: Any, longest: int, begins: str) -> list[int]:
    """Return a decoder's target ids, with its prefix but without its start token. Raises RowProblem for more
    than `longest`, or than the model's positions."""
    ids = list(tokenizer(text)["input_ids"])
    ids = ids[1:] if ids[:1] == [config.decoder_start_token_id] else ids
    limit = min(longest, config.max_target_positions)
    if len(ids) > limit:
        raise RowProblem(TOO_LONG, f"{begins}{len(ids):,} tokens, above {limit:,}")
    return ids


def character_ids(text: str, tokenizer: Any, num_frames: int, begins: str) -> list[int]:
    """Return CTC's target ids. Raises RowProblem if the model does not know most of the characters, or if
    they need more frames than the sound has."""
    ids = list(tokenizer(text)["input_ids"])
    unknown = sum(one == tokenizer.unk_token_id for one in ids)
    if 2 * unknown > len(ids):
        shown = "".join(sorted(set(text) - set(tokenizer.get_vocab()) - {" "}))[:20]
        others = {"lower": text.lower(), "upper": text.upper()}
        cures = [
            case
            for case, other in others.items()
            if tokenizer.unk_token_id not in tokenizer(other)["input_ids"]
        ]
        hint = f"write data.case: {cures[0]}" if cures else "write data.vocabulary: text"
        raise RowProblem(UNKNOWN_CHARACTERS, f"{unknown} of {len(ids)} are ({shown}); {hint}")
    if (needed := frames_needed(ids)) > num_frames:
        reason = f"{begins}{len(ids)} characters need {needed} frames, and the sound has {num_frames}"
        raise RowProblem(TEXT_TOO_LONG, reason)
    return ids
