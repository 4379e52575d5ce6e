"""Check a job against its model's files and its rows: lengths, tokens, columns."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job, Model
from launcher.job.script_job import OWN
from launcher.planner.dataset.findings import Findings
from launcher.planner.dataset.usable_rows import look_at_rows
from launcher.planner.model import positions
from launcher.planner.model.model_config import config_of, locate, num_embeddings
from launcher.planner.model.model_support import WITHOUT_ADAPTER, why_no_prompt
from launcher.planner.model.vocabulary import Vocabulary, read_vocabulary

_SHOWN = 4
NO_EVALUATION = (
    "no held-out rows: nothing says how good the model is on rows that it has not learned, and nothing ends "
    "the training early; `launcher data split FILE` makes a file for data.evaluation.path"
)


def look(job: Job) -> Findings:
    """Return the conflicts among a job's model, tokenizer and rows; none if they are not here, or for a
    script's own data."""
    if job.data.train.name == OWN or job.model.name == OWN:
        return Findings()
    model, most = job.model, job.data.max_length
    config = config_of(model, as_stored=True) or {}
    vocabulary = read_vocabulary(locate(model.name, model.revision))
    of_model = (_lengths(config, most), _tokens(model, config, vocabulary), _adapter(model, config))
    return Findings.joined((*of_model, _teacher(job, vocabulary), look_at_rows(job)))


def check(job: Job) -> list[Problem]:
    """Return the remarks on a job. Raises ConfigurationError with all problems."""
    findings = look(job)
    if findings.problems:
        raise ConfigurationError(list(findings.problems))
    trackers = () if job.trackers == "auto" else job.trackers
    reason = "its package is not installed here; a run on this machine would be refused"
    away = [Problem("trackers", name, reason) for name in trackers if find_spec(name) is None]
    return [*findings.remarks, *away]


def _lengths(config: dict[str, Any], max_length: int) -> Findings:
    if (table := positions.held(config)) is not None and max_length > table[0]:
        reason = (
            f"a {config['model_type']} model has no positions beyond {table[0]:,} ({table[1]}); write "
            f"{table[0]} or less"
        )
        return Findings((Problem("data.max_length", max_length, reason),))
    if (made_for := positions.trained(config)) is not None and max_length > made_for[0]:
        reason = (
            f"the model was made for {made_for[0]:,} positions ({made_for[1]}): those beyond are new to "
            "it, and no error says so"
        )
        return Findings((), (Problem("data.max_length", max_length, reason),))
    return Findings()


def _tokens(model: Model, config: dict[str, Any], vocabulary: Vocabulary | None) -> Findings:
    num_rows = num_embeddings(config)
    if vocabulary is None or num_rows is None or not (missing := vocabulary.without_row(num_rows)):
        return Findings()
    shown = ", ".join(f"{name!r} ({number})" if name else str(number) for number, name in missing[:_SHOWN])
    shown += f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    what = (
        f"the tokenizer has {vocabulary.num_ids:,} tokens and the embedding {num_rows:,} rows "
        f"(vocab_size): there is none for {shown}"
    )
    if model.resize_embeddings is None:
        reason = (
            f"{what}. Write model.resize_embeddings: true for new rows, or false where no row of data has "
            "such a token"
        )
        return Findings((Problem("model.name", model.name, reason),))
    if model.resize_embeddings:
        reason = f"{what}. It gets {vocabulary.num_ids - num_rows:,} new rows, the mean of the old ones"
        return Findings((), (Problem("model.resize_embeddings", True, reason),))
    return Findings(
        (), (Problem("model.resize_embeddings", False, f"{what}. Data with such a token will be refused"),)
    )


def _teacher(job: Job, own: Vocabulary | None) -> Findings:
    """Return the problems of the teacher's positions and tokenizer. own: the student's tokens."""
    if (distillation := job.distillation) is None or (name := distillation.teacher) is None:
        return Findings()
    key, most = "distillation.teacher", job.data.max_length
    config = config_of(Model(name=name, revision=distillation.revision, task=job.model.task)) or {}
    problems = [
        Problem(key, name, f"{one.reason}, and data.max_length is {most}")
        for one in _lengths(config, most).problems
    ]
    other = read_vocabulary(locate(name, distillation.revision))
    if own is not None and other is not None and (own.num_ids, own.names) != (other.num_ids, other.names):
        reason = (
            f"its tokenizer has {other.num_ids:,} tokens and the model's {own.num_ids:,}, or other special "
            "ones: they are not the same, and the same token must have the same number in both"
        )
        problems.append(Problem(key, name, reason))
    return Findings(tuple(problems))


def _adapter(model: Model, config: dict[str, Any]) -> Findings:
    kind = config.get("model_type")
    if model.adapter is not None and model.adapter.is_prompt:
        reason = why_no_prompt(model.adapter, model.task, config)
        problem = Problem("model.adapter.method", model.adapter.method, str(reason))
        return Findings() if reason is None else Findings((problem,))
    if (
        model.adapter is None
        or (layer := WITHOUT_ADAPTER.get(str(kind))) is None
        or not model.adapter.takes(layer)
    ):
        return Findings()
    what = f"{layer} of a {kind} model can have no adapter, as its kernels take the matrix past the layer"
    if model.adapter.targets == "all-linear":
        return Findings(
            (), (Problem("model.adapter.targets", "all-linear", f"{what}: the other linear layers get one"),)
        )
    return Findings(
        (
            Problem(
                "model.adapter.targets",
                list(model.adapter.targets),
                f"{what}; name others, or write all-linear",
            ),
        )
    )
