"""Seq2SeqTrainingArguments, and the arguments of transformers' scripts for translation and summarisation.

The Trainer's own arguments are read elsewhere.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from launcher.importing.reading import Reading
from launcher.plain_files import read_json
from launcher.planner.model.model_config import locate

MARKS = {"predict_with_generate", "generation_max_length", "generation_num_beams", "sortish_sampler"}
"""Names that only Seq2SeqTrainingArguments have: any of them means a sequence-to-sequence model."""
PLACEHOLDERS = {"data.source": "FILL-IN-source", "data.target": "FILL-IN-target"}
HELD_OUT = "FILL-IN-held-out.jsonl"
_LENGTHS = ("generation_max_length", "val_max_target_length", "max_target_length")
"""Keys for the length; the first one that is set counts, as in transformers' scripts
(examples/pytorch/translation of 5.23)."""
_BEAMS = ("num_beams", "generation_num_beams")
_COLUMNS = {"text_column": "data.source", "summary_column": "data.target"}
_SORTED = "launcher draws batches by seed alone, whatever the lengths"
READ = {
    *MARKS, *_LENGTHS, *_BEAMS, *_COLUMNS, "generation_config", "source_prefix", "source_lang", "target_lang",
    "label_smoothing_factor",
}  # fmt: skip


def read(content: dict[str, Any], reading: Reading) -> set[str]:
    """Record the facts of these arguments, and the keys to fill in; return the keys that were read."""
    reading.record("model.task", "sequence-to-sequence", next(key for key in content if key in MARKS))
    _rows(content, reading)
    if (share := reading.number(content, "label_smoothing_factor")) is not None:
        reading.record("data.label_smoothing", share, "label_smoothing_factor")
    if reading.flag(content, "sortish_sampler"):
        reading.cannot_say("sortish_sampler", True, _SORTED)
    if content.get("generation_config") is not None:
        text = "a file of its own kind; write its keys under evaluation.generate"
        reading.cannot_say("generation_config", "{...}", text)
    _generation(content, reading)
    return READ


def _rows(content: dict[str, Any], reading: Reading) -> None:
    reading.take(content, {"max_target_length": "data.max_target_length"}, Reading.count)
    reading.take(content, _COLUMNS, Reading.word)
    if isinstance(prefix := content.get("source_prefix"), str):
        reading.record("data.prefix", prefix, "source_prefix")  # as it is: a space may stand at its end
    for key in ("source_lang", "target_lang"):
        if (language := reading.word(content, key)) is not None:
            text = (
                f"a name inside `translation` there. Write the column of these sentences as data.{key[:6]}; a "
                f"multilingual model wants its tokenizer's code as data.{key[:6]}_language"
            )
            reading.fill_in(key, language, text)
    for key, value in PLACEHOLDERS.items():
        if not reading.has(key):
            reading.record(key, value, "(no key)")
            what = "read" if key.endswith("source") else "written"
            reading.fill_in(key, value, f"the column of the text that is {what}")


def _generation(content: dict[str, Any], reading: Reading) -> None:
    """Record how an evaluation generates. There, a length includes the decoder's start token.

    If the number of beams is not given, both tools take it from the model's generation_config.json.
    """
    named = [key for key in (*_LENGTHS[:2], *_BEAMS) if content.get(key) is not None]
    if not reading.flag(content, "predict_with_generate"):
        if named:
            text = "counts where predict_with_generate is true: nothing is written in an evaluation"
            reading.ignore(", ".join(named), None, text)
        return
    longest = next((key for key in _LENGTHS if content.get(key) is not None), None)
    length = None if longest is None else reading.count(content, longest, least=2)
    if longest is not None and length is not None:
        reading.record("evaluation.generate.max_new_tokens", length - 1, longest)
        text = f"evaluation.generate.max_new_tokens = {length - 1}: the decoder's first token counts there"
        reading.change(longest, length, text)
    elif longest is None:
        _own_length(content, reading)
    beams = next((key for key in _BEAMS if content.get(key) is not None), None)
    if beams is not None and (number := reading.count(content, beams)) is not None:
        reading.record("evaluation.generate.num_beams", number, beams)
    elif not reading.has("evaluation.generate.max_new_tokens"):
        reading.record("evaluation.generate", True, "predict_with_generate")
    if content.get("validation_file") is None and not reading.has("data.evaluation.name"):
        reading.record("data.evaluation.path", HELD_OUT, "(no key)")
        reading.fill_in("data.evaluation", HELD_OUT, "the rows to which the model writes in an evaluation")


def _own_length(content: dict[str, Any], reading: Reading) -> None:
    """Record the length of predictions from the model's generation_config.json, if it is here and has one."""
    own: Any = None
    with contextlib.suppress(OSError, ValueError):
        revision = content.get("model_revision")
        folder = locate(str(content.get("model_name_or_path")), None if revision is None else str(revision))
        own = read_json(Path(folder) / "generation_config.json")
    own = own if isinstance(own, dict) else {}
    longest = next((key for key in ("max_new_tokens", "max_length") if isinstance(own.get(key), int)), None)
    length = 0 if longest is None else own[longest] - (longest == "max_length")
    if length < 1:
        text = "left out there: the model's own then, 20 where it has none; launcher's is 128 tokens"
        reading.fill_in("evaluation.generate.max_new_tokens", None, text)
        return
    reading.record("evaluation.generate.max_new_tokens", length, "predict_with_generate")
    text = f"left out there: by the model's generation_config.json, {longest} = {own[longest]}"
    reading.change("evaluation.generate.max_new_tokens", length, text)
