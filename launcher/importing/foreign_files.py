"""Foreign files: found, parsed without executing anything, and recognised by their kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConfigurationError, Problem
from launcher.importing import (
    accelerate,
    axolotl,
    command_line,
    deepspeed_config,
    llama_factory,
    seq2seq,
    sft,
    trainer,
)
from launcher.importing.reading import Reading, as_number, brief
from launcher.job import paths
from launcher.job.yaml_text import parse
from launcher.plain_files import parse_json, read_bytes

Kind = Literal[
    "deepspeed", "accelerate", "trainer", "llama-factory", "axolotl", "command line", "job", "plan"
]
RANKS: dict[Kind, int] = {"command line": 0, "deepspeed": 1, "trainer": 2, "accelerate": 3}
RANKS |= {"llama-factory": RANKS["trainer"], "axolotl": RANKS["trainer"]}
"""The precedence of each kind of file if two set different values; the lower wins."""
WINNERS = {
    "command line": "a command line overrides files",
    "deepspeed": "the engine runs by its own file",
    "trainer": "the Trainer's arguments are nearer to the script than Accelerate's file",
    "accelerate": "it is the first that says so",
}
"""The reason why a kind of file wins over another that sets a different value, in order of precedence."""
_READERS: dict[Kind, Callable[[dict[str, Any], Reading], None]] = {
    "deepspeed": deepspeed_config.read,
    "accelerate": accelerate.read,
    "llama-factory": llama_factory.read,
    "axolotl": axolotl.read,
}
_KNOWN = (
    "a DeepSpeed JSON, an Accelerate YAML, TrainingArguments as JSON or YAML, a file of TRL, "
    "alignment-handbook, LLaMA-Factory or axolotl, or a script with a command line"
)
_LARGEST_BYTES = 4 << 20


def _unreadable(path: Path | str, reason: str) -> ConfigurationError:
    return ConfigurationError(Problem("FILE", str(path), reason))


def content_of(path: Path) -> Any:
    """Return the values of a JSON or YAML file, or the text of any other. Raises ConfigurationError."""
    try:
        text = read_bytes(path, _LARGEST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise _unreadable(path, f"no such file{paths.nearest_file(path)}") from None
    except IsADirectoryError:
        raise _unreadable(path, "a directory; name the files in it") from None
    except UnicodeDecodeError:
        raise _unreadable(path, "not UTF-8 text; write JSON, YAML or a shell script") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from None
    if path.suffix.lower() in (".sh", ".txt", ".sbatch", ".bash", ".slurm", ".job") or text.startswith("#!"):
        return text
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _json(text, path)
    try:
        return parse(text, str(path))
    except ConfigurationError as error:
        problems = [Problem("FILE", str(path), problem.reason) for problem in error.problems]
        raise ConfigurationError(problems) from None


def _json(text: str, path: Path) -> Any:
    try:
        content = parse_json(text)
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        try:
            return parse(text, str(path))  # DeepSpeed reads Hjson: comments, trailing commas
        except ConfigurationError:
            where = f"line {error.lineno}, column {error.colno}"
            raise _unreadable(path, f"not JSON: {error.msg} at {where}") from None
    except UnicodeEncodeError:
        raise _unreadable(path, "has a text with half a character in it (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError):
        raise _unreadable(path, "not JSON: a number or a nesting beyond any sense") from None
    return content


def kind_of(content: Any) -> Kind | None:
    """Return the kind of a file, from keys that only that kind has; None if it cannot be recognised."""
    if isinstance(content, str):
        return "command line"
    if not isinstance(content, dict):
        return None
    keys = {str(key) for key in content}
    marks: dict[Kind, set[str]] = {"plan": {"mesh", "batch", "length"}, "job": {"model", "data", "name"}}
    for kind, needed in marks.items():
        if needed <= keys:
            return kind
    if "base_model" in keys and keys & axolotl.MARKS:
        return "axolotl"
    if keys & {"finetuning_type", "cutoff_len", "lora_target"} or (
        "dataset" in keys and keys & llama_factory.MARKS
    ):
        return "llama-factory"
    if keys & accelerate.MARKS and not keys & trainer.MARKS:
        return "accelerate"
    if keys & deepspeed_config.MARKS:
        return "deepspeed"
    if keys & (trainer.MARKS | seq2seq.MARKS | sft.MARKS | {"model_name_or_path"}):
        return "trainer"
    return None


def read(path: Path) -> Reading:
    """Return the reading of the file at `path`, which includes problems of its keys. Raises ConfigurationError
    if it cannot be read."""
    return read_content(content_of(path), str(path))


def read_content(content: Any, source: str, is_sft: bool = False) -> Reading:
    """Return the reading of values or a text. `source` is their name; `is_sft`: TRL's SFTTrainer reads them."""
    kind = kind_of(content)
    if kind is None:
        is_mapping = "of another kind" if isinstance(content, dict) else "no mapping of keys"
        shown = "empty" if content in (None, {}) else is_mapping
        raise _unreadable(source, f"is {shown}; write {_KNOWN}")
    if kind in ("job", "plan"):
        command = "launcher run" if kind == "job" else "launcher diff"
        raise _unreadable(source, f"is launcher's own {kind}, and needs no import; `{command}` reads it")
    reading = Reading(source, RANKS[kind])
    if kind == "command line":
        command_line.read_script(content, reading)
        return reading
    values = {str(key): value for key, value in content.items()}
    if kind == "trainer":
        trainer.read(values, reading, is_sft)
    else:
        _READERS[kind](values, reading)
    return reading


def follow(readings: list[Reading], folders: dict[str, Path]) -> None:
    """Read the files that the readings name, if they exist; else remark that they are missing."""
    known = {Path(reading.source).resolve() for reading in readings}
    queue = list(readings)
    for reading in queue:
        for name in reading.follow:
            folder = folders.get(reading.source, Path())
            overrides, is_sft = reading.overrides.get(name, ({}, False))
            file = next((path for path in (folder / name, Path(name)) if path.is_file()), None)
            if file is None:
                text = "is not here; import it together with this one"
                reading.fill_in("(a file that it names)", name, text)
                if name in reading.overrides:
                    reading.is_partial = True
                    command_line.read_arguments(overrides, is_sft, "", reading)
                else:
                    reading.lacks_engine = True
            elif file.resolve() not in known or overrides:
                known.add(file.resolve())
                readings[:] = [
                    other
                    for other in readings
                    if not overrides or Path(other.source).resolve() != file.resolve()
                ]
                more = _overridden(file, overrides, is_sft)
                folders[more.source] = file.parent
                readings.append(more)
                queue.append(more)


def _overridden(path: Path, overrides: dict[str, Any], is_sft: bool) -> Reading:
    """Return the reading of a file with some of its keys overridden."""
    content = content_of(path)
    if not overrides or not isinstance(content, dict):
        return read_content(content, str(path), is_sft)
    reading = read_content({**content, **overrides}, str(path), is_sft)
    for key, value in overrides.items():
        if key in content and str(content[key]) != str(value) and as_number(content[key]) != as_number(value):
            text = f"the command line says {brief(value)}, which won: it overrides the file"
            reading.remark("conflict", key, brief(content[key]), text)
    return reading
