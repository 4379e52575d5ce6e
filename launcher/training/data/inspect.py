"""Description of a job's prepared data, for `launcher data`."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.folder import PlacedColumn
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Source
from launcher.data.streams import row_number
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.tasks.task import IGNORE, Encoded, Sample, Task
from launcher.training import entry
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import MixedDataset
from launcher.training.data.prepare import refuse_mostly_dropped
from launcher.training.data.sheet import write_sheet
from launcher.training.data.sources import of_source, open_source
from launcher.training.data.spread import balance, spread
from launcher.training.inputs import TrainingInputs
from launcher.training.model import pretrained
from launcher.training.signals import StopRequest


def inspect(
    scratch: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Prepare the data sets that request.json names, and write data.json: {"datasets": [the report on each,
    with samples on request]}."""
    request = read_json(scratch.path / "request.json")
    if "evaluation" not in request["roles"]:
        plan = plan.model_copy(update={"data": plan.data.model_copy(update={"evaluation": None})})
    plan = pretrained.settled(plan)
    material = TrainingInputs.of(scratch, plan, stop, streams="train" in request["roles"])
    try:
        wanted = [dataset for dataset in material.datasets if dataset.report.role in request["roles"]]
        if not request["show"]:
            for report in (report for dataset in wanted for report in dataset.reports):
                refuse_mostly_dropped(report, plan)
        datasets = [
            _shown(dataset, material, plan, request) if request["show"] else dataset.report.to_dict()
            for dataset in wanted
        ]
        if request.get("sheet"):
            path, number = request["sheet"]
            drawn = write_sheet(Path(path), wanted[0], material, plan, number)
            datasets[0]["sheet"] = {"path": path, "num_samples": drawn}
    finally:
        if material.stream is not None:
            material.stream.close()
    write_atomically(scratch.path / "data.json", json.dumps({"datasets": datasets}) + "\n")
    events.event(scratch.events_file, "finished", step=0, metrics={})


def _shown(dataset: Dataset, material: TrainingInputs, plan: Plan, request: dict[str, Any]) -> dict[str, Any]:
    """Describe a data set, or each of its sources. Raises ConfigurationError for an unknown source, and for a
    row without naming one."""
    given = plan.data.train if dataset.report.role == "train" else plan.data.evaluation
    assert given is not None
    name = request.get("source")
    if not isinstance(dataset, MixedDataset):
        if name is not None:
            reason = f"the {dataset.report.role} data is one source; leave it out"
            raise ConfigurationError(Problem("--source", name, reason))
        shown = _described(given, dataset, material, plan, request)
        return shown | ({"streaming": True} if material.stream and dataset is material.train else {})
    there = ", ".join(dataset.aliases)
    if name is not None and name not in dataset.aliases:
        near = difflib.get_close_matches(name, dataset.aliases, n=1, cutoff=0.0)[0]
        reason = f"no such source; there are {there}; the nearest is {near}"
        raise ConfigurationError(Problem("--source", name, reason))
    if name is None and request["row"] is not None:
        reason = f"there are several sources; name the one whose row it is by --source: {there}"
        raise ConfigurationError(Problem("--row", request["row"], reason))
    sources = []
    for number, (alias, source) in enumerate(zip(dataset.aliases, given.parts, strict=True)):
        if name in (None, alias):
            task = of_source(material.task, plan, source)
            task.prepare(material.tokenizer)
            own = replace(material, task=task)
            shown = _described(source, dataset.parts[number], own, plan, request)
            sources.append({"source": alias, "in_an_epoch": dataset.counts[number], **shown})
    return {**dataset.report.to_dict(), "sources": sources}


def _described(
    source: Source, dataset: Dataset, material: TrainingInputs, plan: Plan, request: dict[str, Any]
) -> dict[str, Any]:
    lengths = dataset.sample_lengths
    return {
        **dataset.report.to_dict(),
        "num_dropped": dataset.report.num_dropped,
        "refused": _refused(dataset, material, plan),
        "too_long": plan.data.too_long,
        "max_length": plan.data.max_length,
        "lengths": {**spread(lengths), "quantile_95": float(np.quantile(lengths, 0.95))},
        "emptiest": float(dataset.item_lengths.min() / plan.data.max_length)
        if dataset.report.fill is not None
        else None,
        "balance": balance(dataset),
        "samples": list(_samples(source, dataset, material, request)),
    }


def _refused(dataset: Dataset, material: TrainingInputs, plan: Plan) -> str | None:
    """Return why a run would not start; None if it would."""
    try:
        if material.stream is not None and dataset is material.train:
            material.stream.judge(material.stream.first())
        else:
            refuse_mostly_dropped(dataset.report, plan)
    except DataError as error:
        return f"a run is refused: {error}"
    return None


def _samples(
    source: Source, dataset: Dataset, material: TrainingInputs, request: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the first samples, or one row's, or why it has none. Raises ConfigurationError for an unknown
    row."""
    streamed = material.stream if dataset is material.train else None
    if streamed is not None and request["row"] is not None:
        reason = "streamed rows have no number among all of them; leave it out, and the first ones are shown"
        raise ConfigurationError(Problem("--row", request["row"], reason))
    ids = dataset.first_ids(request["num_rows"]) if request["row"] is None else [request["row"] - 1]
    rows = iter(open_source(source, material.task.columns) if streamed is None else streamed.rows())
    for wanted in ids:
        row = next((row for row in rows if row.id == wanted), None)
        if row is None:
            reason = f"the {dataset.report.role} data has {dataset.report.rows_read:,} rows"
            raise ConfigurationError(Problem("--row", request["row"], reason))
        yield {
            "row": (wanted if streamed is None else row_number(wanted)) + 1,
            "file": row.file,
            "line": row.line,
            **_place(row, material.task),
            **_sample(row, dataset, material, request["tokens"]),
        }


def _place(row: Row, task: Task) -> dict[str, str]:
    """Return the path of a row's file, if rows name files."""
    values = {} if isinstance(row.values, RowProblem) else row.values
    names = [column for column in task.columns if isinstance(column, PlacedColumn)]
    paths = [path for name in names for path in name.paths(values.get(name))]
    return {"path": paths[0]} if paths else {}


def _sample(row: Row, dataset: Dataset, material: TrainingInputs, with_tokens: bool) -> dict[str, Any]:
    """Return a row's sample: tokens and the label in the prepared data."""
    index = dataset.find(row.id)
    encoded = (
        row.values
        if isinstance(row.values, RowProblem)
        else material.task.encode([row.values], material.tokenizer)[0]
    )
    if isinstance(encoded, tuple) and not isinstance(encoded, Encoded):
        encoded = encoded[0]
    if isinstance(encoded, RowProblem) or index is None:
        problem = encoded if isinstance(encoded, RowProblem) else RowProblem("not used")
        return {"reason": problem.reason, "detail": problem.detail}
    beside, sample = index
    # A processor of images or sounds contains a tokenizer if the task generates text.
    tokenizer = getattr(material.tokenizer, "tokenizer", material.tokenizer)
    ids, learned = _tokens(sample, material.task.traits.encoder_decoder)
    if not ids or tokenizer is None:
        return {
            "cut": bool(encoded.cut),
            "num_beside": beside,
            "label": _label(sample, dataset),
            "pieces": [],
        }
    shown: dict[str, Any] = {
        "num_tokens": len(ids),
        "num_learned": sum(learned),
        "cut": bool(encoded.cut),
        "num_beside": beside,
    }
    shown["label"] = _label(sample, dataset)
    shown["pieces"] = list(_pieces(ids, learned, tokenizer))
    if with_tokens:
        shown["tokens"] = [
            _token(token, is_learned, tokenizer) for token, is_learned in zip(ids, learned, strict=True)
        ]
    return shown


def _tokens(sample: Sample, writes_another: bool) -> tuple[list[int], list[bool]]:
    """Return the tokens of a sample, and which of them are supervised; for an encoder-decoder the source's,
    then the target's."""
    read = sample["input_ids"].tolist() if "input_ids" in sample else []
    if "labels" in sample and (writes_another or not read):
        written = sample["labels"].tolist()
        return read + written, [False] * len(read) + [True] * len(written)
    return read, _learned(sample) if read else []


def _learned(sample: Sample) -> list[bool]:
    """Return for each token whether it is a target (stored at the position before it), has its own label, or
    is in the answer's span."""
    if "positions" in sample:  # of the first and the last token of a span
        first, last = sample["positions"].tolist()
        return [first <= place <= last for place in range(sample.length)]
    if "labels" in sample:
        return [bool(label != IGNORE) for label in sample["labels"]]
    if "targets" not in sample:
        return [False] * sample.length
    return [False, *(sample["targets"][:-1] != IGNORE).tolist()]


def _label(sample: Sample, dataset: Dataset) -> Any:
    """Return the names of the classes, or the number; None if tokens are the targets."""
    if "label" not in sample:
        return None
    label, names = sample["label"], dataset.report.labels
    if names is None:
        return float(label[0])
    if np.issubdtype(label.dtype, np.integer):
        return [names[int(label[0])]]
    return [name for name, has in zip(names, label.tolist(), strict=True) if has]


def _pieces(ids: list[int], learned: list[bool], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield runs of tokens, supervised or not, special or not, with their text; together they are the full
    text."""
    special = set(tokenizer.all_special_ids) | {
        number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    marks = [(is_learned, token in special) for token, is_learned in zip(ids, learned, strict=True)]
    end, before = 0, ""
    for (is_learned, is_special), run in itertools.groupby(marks):
        start, end = end, end + len(list(run))
        until = _text(ids[:end], tokenizer)
        # Decoded alone, a run would lose the space that some tokenizers put before a word; but a run may end
        # inside a character.
        text = until[len(before) :] if until.startswith(before) else _text(ids[start:end], tokenizer)
        before = until
        yield {"text": text, "learned": is_learned, "special": is_special}


def _token(token: int, learned: bool, tokenizer: Any) -> dict[str, Any]:
    return {
        "id": token,
        "token": tokenizer.convert_ids_to_tokens(token),
        "text": _text([token], tokenizer),
        "learned": learned,
    }


def _text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


if __name__ == "__main__":
    entry.main(train=inspect)
