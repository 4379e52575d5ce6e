"""Decide how samples share a micro-batch: packed or padded; or refuse the job."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job, Model
from launcher.job.script_job import OWN
from launcher.planner.decider import Decider
from launcher.planner.model.model_config import config_of
from launcher.planner.model.model_support import (
    COSTS_BY_TOKEN,
    Support,
    Way,
    choose,
    fitting,
    support,
    support_of_tasks,
    unknown,
    untried,
)
from launcher.tasks.distillation import Distillation

_FLASH = "write sdpa or auto, which have no padding either"


def choose_way(decider: Decider, device: str) -> Way:
    """Decide attention, layout and head together. Settings that cannot give transformers' own loss are
    refused with those that can."""
    job, model = decider.job, decider.job.model
    if job.data.train.name == OWN:  # a script brings its own model and data
        return Way("packed", "eager")
    if model.attention == "flash_attention_2":
        reason = f"needs a GPU, and this runs on the CPU; {_FLASH}" if device == "cpu" else ""
        if device != "cpu" and importlib.util.find_spec("flash_attn") is None and decider.local:
            reason = f"the package flash-attn is not installed; {_FLASH}"
        if reason:
            decider.refuse("model.attention", model.attention, reason)
    known = _support(job, decider.config)
    try:
        kind = str((decider.config or {}).get("model_type"))
        wishes = model.attention, job.data.packing, job.batch.micro_batch_size
        possible = known if job.distillation is None else _with_teacher(known, kind, job, job.distillation)
        way = choose(possible, model.name, kind, *wishes)
    except ConfigurationError as error:
        decider.problems += error.problems
        return unknown(model.task).ways[0]
    _write_down(decider, way, known)
    return way


def balances(job: Job, way: Way) -> bool:
    """Return whether passes of short samples may hold more of them than micro_batch_size says: those of encoders
    of texts, whose memory is then at most what was planned for the longest samples."""
    model, task = job.model, tasks.find(job.model.task)
    config = config_of(model) or {}
    return (
        way.layout == "padded"
        and not task.traits.causal
        and not task.traits.reads_files
        and not model.trust_remote_code
        and job.distillation is None
        and config.get("model_type") in COSTS_BY_TOKEN
    )


def _with_teacher(known: Support, kind: str, job: Job, distillation: Distillation) -> Support:
    """Return the student's ways in which the teacher can read the same batches, or with precomputed logits,
    those in which logits can be compared.

    Raises ConfigurationError if there is none.
    """
    model = job.model
    speaks = tasks.find(model.task).traits.head == "every-position"
    learns = [way for way in known.ways if not speaks or way.head == "chunked"]
    if known.ways and not learns:
        reason = (
            f"a {kind} model's own head is not only a matrix, and what is compared with a teacher goes through "
            "that; leave it out, or train a model such as llama or qwen3"
        )
        raise ConfigurationError(Problem("distillation", None, reason))
    if distillation.teacher is None:
        return replace(known, ways=tuple(learns))
    named = Model(name=distillation.teacher, revision=distillation.revision, task=model.task)
    config = config_of(named)
    teaches = support(model.task, config, model.trust_remote_code, job.data.max_length)
    able = {(way.layout, way.attention) for way in teaches.ways if not speaks or way.head != "forward"}
    ways = tuple(way for way in learns if (way.layout, way.attention) in able)
    if learns and not ways:
        other = str((config or {}).get("model_type"))
        reason = teaches.refused or (
            f"a {other} model cannot read the batches of a {kind} model: {_words(teaches.ways)} where that has "
            f"{_words(learns)}; name a teacher of the same architecture"
        )
        raise ConfigurationError(Problem("distillation.teacher", distillation.teacher, reason))
    return replace(known, ways=ways)


def _words(ways: Iterable[Way]) -> str:
    """Return the layouts and attentions of some ways, in words."""
    return ", ".join(dict.fromkeys(f"{way.layout} samples with {way.attention} attention" for way in ways))


def one_a_pass(job: Job) -> Job:
    """Return the job with micro-batch 1 if its model supports no other, and the job leaves that open."""
    if job.batch.micro_batch_size != "auto" or job.data.train.name == OWN:
        return job
    ways = fitting(_support(job, config_of(job.model)), job.model.attention)
    if not ways or ways[0].layout != "single":
        return job
    return job.model_copy(update={"batch": job.batch.model_copy(update={"micro_batch_size": 1})})


def _support(job: Job, config: dict[str, Any] | None) -> Support:
    trusted, data = job.model.trust_remote_code, job.data
    names = tasks.names_of(job.model.task, data)
    return support_of_tasks(names, config, trusted, data.max_length, data.one_length)


def _write_down(decider: Decider, way: Way, known: Support) -> None:
    task, requested = decider.job.model.task, decider.job.model.attention
    tried = known is not untried(task)
    proof = "its loss was held to transformers' own"
    if known is unknown(task):
        proof = "the model's config is not here: looked at again once it is"
    elif not tried:
        proof = "an architecture that launcher has not tried: held to its own loss after loading"
    if way.attention == "packed":
        decider.decide(
            "model.attention",
            "packed",
            f"samples stand one after another without padding, and never see each other; {proof}",
        )
    elif requested == "auto":
        why = (
            "PyTorch's own fused attention"
            if way.attention == "sdpa"
            else "as fused attention gives another loss"
        )
        decider.decide("model.attention", way.attention, f"{why if tried else 'every class has it'}; {proof}")
    if tasks.find(task).traits.layout == "packed" and way.layout == "padded":
        why = (
            "joined end to end they would see each other in this architecture"
            if tried
            else "every class can; packing: true has it tried"
        )
        decider.decide("layout", "padded", f"one sample a row: {why}")
    if way.layout == "single":
        decider.decide(
            "layout",
            "single",
            "one sample a pass: with others in it its loss would be another one in this architecture",
        )
    if way.head != "chunked":
        whose = "some hundred positions at a time" if way.head == "model" else "all logits at once"
        why = (
            "does more than multiply with the output matrix"
            if tried
            else "may do more than multiply with the output matrix"
        )
        decider.decide(
            "head",
            way.head,
            f"the model's own {'head' if way.head == 'model' else 'forward'}, {whose}: it {why}",
        )
