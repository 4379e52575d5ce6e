"""Comparison of a teacher with its student by processor and classes; export of a teacher's run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.tasks import classes
from launcher.tasks.distillation import SOURCE, Distillation
from launcher.tasks.task import Sample, Task
from launcher.training.checkpoint.export import export
from launcher.training.data.dataset import Dataset
from launcher.training.model import pretrained

KEY = "distillation.teacher"
_TEXTS = ("The teacher's tokens, one by one.", " 12,345 Zeichen\n\tund «Umlaute»: äöü — 漢字 🙂", "a")
"""Texts on which tokenizers with equal vocabularies may differ: case, spaces, accents, digits."""


def check_teacher(plan: Plan, task: Task, processor: Any, rows: Dataset) -> None:
    """Compare a plan's teacher with its model, by their processors and configs, before any weight is read.

    Raises ConfigurationError if they do not match.
    """
    if plan.distillation is None or plan.distillation.teacher is None:
        return
    try:
        of_teacher = plan.of_teacher()
        there = pretrained.read_config(of_teacher)
        other = pretrained.read_processor(of_teacher)
        reads = None if not task.has_processor else tasks.build(of_teacher, other)
        if reads is not None:
            reads.adopt(there, as_it_stands=True)
    except ConfigurationError as error:
        raise _problem(plan, error.problems[0].reason) from None
    if reads is not None:
        if reason := _sees_otherwise(task, reads, rows.item(0)[0]):
            raise _problem(plan, f"it sees an image otherwise than the model: {reason}")
    elif reason := unlike_tokenizers(processor, other):
        raise _problem(plan, f"its tokenizer is not the model's: {reason}")
    num_rows = None if reads else getattr(there.get_text_config(), "vocab_size", None)
    if num_rows is not None and num_rows < (num_ids := pretrained.num_ids(processor)):
        raise _problem(plan, f"its embedding has {num_rows:,} rows, and the tokenizer {num_ids:,} tokens")
    if (head := getattr(task, "head_name", None)) is None:
        return
    own = classes.of_model(there, head)
    if own is None:
        raise _problem(plan, "it has no classification head, so that it has nothing to teach")
    names = list(task.labels or ())
    by_number = names == [str(number) for number in range(len(names))]
    unnamed = by_number and own == [f"LABEL_{name}" for name in names]
    if task.needs_labels and own != names and not unnamed:
        reason = (
            f"its classes are {_shown(own)}, and the model's {_shown(names)}: they must be the same, in order"
        )
        raise _problem(plan, reason)
    if not task.needs_labels and len(own) != 1:
        raise _problem(plan, f"it has {len(own)} outputs, and a number is one")


def written_out(run: RunDirectory, plan: Plan) -> Distillation | None:
    """Return a plan's section `distillation`, with a directory of weights if the teacher is a run.

    That is RUN/teacher. Rank 0 writes it in the first attempt, and again if another checkpoint becomes the
    teacher. It has the averaged weights of a run that evaluates those (`training.ema.evaluate`). Called by
    all ranks together. Raises CheckpointError if the teacher's checkpoint is incomplete, StorageError if it
    cannot be written.
    """
    settings = plan.distillation
    if settings is None or settings.checkpoint is None or settings.teacher is None:
        return settings
    target = run.path / "teacher"
    if distributed.get_rank() == 0 and not settings.written_out(run.path):
        of, new = RunDirectory(Path(settings.teacher).parent), run.path / ".teacher-new"
        shutil.rmtree(new, ignore_errors=True)
        average = Plan.read(of.plan_file).training.ema
        export(of, new, settings.checkpoint, ema=average is not None and average.evaluate)
        write_atomically(new / SOURCE, json.dumps(settings.source) + "\n")
        shutil.rmtree(
            target, ignore_errors=True
        )  # only now: a teacher that cannot be read must not remove the old one
        new.rename(target)
    distributed.barrier()
    return settings.model_copy(update={"teacher": str(target)})


def _shown(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _problem(plan: Plan, reason: str) -> ConfigurationError:
    assert plan.distillation is not None
    return ConfigurationError(Problem(KEY, plan.distillation.teacher, reason))


def _sees_otherwise(own: Task, other: Task, sample: Sample) -> str:
    """Return how two tasks' inputs for a sample differ; empty if the teacher gets the same as the model."""
    ours, theirs = own.plain_batch(sample) or {}, other.plain_batch(sample) or {}
    for name, value in theirs.items():
        if name not in ours:
            return f"it needs {name}, as the image has another size than it was trained with"
        if isinstance(value, torch.Tensor) and value.shape != ours[name].shape:
            mine, its = (list(one.shape[1:]) for one in (ours[name], value))
            return f"{name} of an image are {its} in place of {mine}; write data.image_size"
        if isinstance(value, torch.Tensor) and not torch.allclose(value, ours[name], atol=1e-5):
            return f"the same image has other {name}: compare their preprocessor_config.json"
    return ""


def unlike_tokenizers(own: Any, other: Any) -> str:
    """Return how two tokenizers differ; empty if they agree."""
    ours, theirs = own.get_vocab(), other.get_vocab()
    for token in sorted(ours.keys() | theirs.keys(), key=lambda one: (ours.get(one, 1 << 60), one)):
        if ours.get(token) != theirs.get(token):
            numbers = [str(one.get(token, "none")) for one in (ours, theirs)]
            return f"{token!r} has the number {numbers[0]} in the model's and {numbers[1]} in the teacher's"
    for texts in ((_TEXTS[0],), (_TEXTS[1],), (_TEXTS[0], _TEXTS[2])):
        mine, its = own(*texts), other(*texts)
        if mine["input_ids"] != its["input_ids"]:
            return f"they cut {texts[0]!r} into other tokens"
        if len(texts) > 1 and (missing := set(its) - set(mine)):
            return f"of a pair of texts the teacher also reads {', '.join(sorted(missing))}"
    return ""
