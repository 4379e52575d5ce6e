"""Decide how samples share a pass: packed, padded, or the job is refused."""

from __future__ import annotations

import importlib.util

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.job.script_job import OWN
from launcher.planner.decider import Decider
from launcher.planner.model.model_config import config_of
from launcher.planner.model.model_support import Support, Way, choose, fitting, support, unknown, untried

_FLASH = "write sdpa or auto, which have no padding either"


def choose_way(decider: Decider, device: str) -> Way:
    """Decide attention, layout and head together; what cannot give transformers' own loss is refused with
    what to write instead."""
    job, model = decider.job, decider.job.model
    if job.data.train.name == OWN:  # a script brings its own model and data
        return Way("packed", "eager")
    if model.attention == "flash_attention_2":
        reason = f"needs a GPU, and this runs on the CPU; {_FLASH}" if device == "cpu" else ""
        if device != "cpu" and importlib.util.find_spec("flash_attn") is None and decider.local:
            reason = f"the package flash-attn is not installed; {_FLASH}"
        if reason:
            decider.refuse("model.attention", model.attention, reason)
    config = config_of(model)
    known = _support(job)
    try:
        kind = str((config or {}).get("model_type"))
        wishes = model.attention, job.data.packing, job.batch.micro_batch_size
        way = choose(known, model.name, kind, *wishes)
    except ConfigurationError as error:
        decider.problems += error.problems
        return unknown(model.task).ways[0]
    _write_down(decider, way, known)
    return way


def one_a_pass(job: Job) -> Job:
    """The job with one sample a pass where its model can do no other, and the job leaves that open."""
    if job.batch.micro_batch_size != "auto" or job.data.train.name == OWN:
        return job
    ways = fitting(_support(job), job.model.attention)
    if not ways or ways[0].layout != "single":
        return job
    return job.model_copy(update={"batch": job.batch.model_copy(update={"micro_batch_size": 1})})


def _support(job: Job) -> Support:
    model, data = job.model, job.data
    return support(model.task, config_of(model), model.trust_remote_code, data.max_length, data.one_length)


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
