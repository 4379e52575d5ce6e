"""Checks of `model.adapter` beside the rest of a job."""

from __future__ import annotations

from collections.abc import Iterator

from launcher import tasks
from launcher.job.adapter import KINDS, Adapter
from launcher.job.schema import Job
from launcher.tasks.task import Finding, finding

_OF_MATRICES = ("rank", "alpha", "rslora", "dora", "init", "dropout")
"""Keys of low-rank matrices."""
_OF_ENCODER = ("encoder", "encoder_hidden_size", "encoder_num_layers")
"""Keys of the network that makes virtual tokens' vectors."""


def findings(job: Job) -> Iterator[Finding]:
    """Yield everything that does not go with an adapter, and keys of the other method."""
    model = job.model
    if model.adapter is None:
        return
    if model.freeze:
        reason = (
            "an adapter leaves all weights as they are but those of "
            "model.adapter.train_also; leave freeze out"
        )
        shown = list(model.freeze.parameters) or str(model.freeze.model_dump(exclude_defaults=True))
        yield finding("model.freeze", shown, reason, "model.adapter")
    if model.weights == "random":
        reason = (
            "an adapter is trained beside weights that were learned; write pretrained, or leave "
            "model.adapter out"
        )
        yield finding("model.weights", model.weights, reason, "model.adapter")
    if model.adapter.init != "lora" and model.adapter.dora:
        reason = "DoRA takes the lengths of whole weights, which then lack a part; write one of both"
        yield finding("model.adapter.init", model.adapter.init, reason, "model.adapter.dora")
    if model.compile is True:
        yield finding(
            "model.compile",
            True,
            "layers with adapters are not compiled; write false, or leave model.adapter out",
            "model.adapter",
        )
    if model.adapter.is_prompt:
        yield from _of_prompt(job, model.adapter)
        return
    for key in ("virtual_tokens", "init_text", *_OF_ENCODER):
        method = "p-tuning" if key in _OF_ENCODER else "prompt-tuning"
        yield from _set(model.adapter, key, f"is of virtual tokens; write method: {method}, or leave it out")
    yield from _of_ia3(model.adapter) if model.adapter.method == "ia3" else _of_lora(model.adapter)


def _set(adapter: Adapter, key: str, reason: str) -> Iterator[Finding]:
    """Yield a key of another method, if it has another value than the default."""
    if (value := getattr(adapter, key)) != Adapter.model_fields[key].default:
        shown = list(value) if isinstance(value, tuple) else value
        yield finding(f"model.adapter.{key}", shown, reason, "model.adapter.method")


def _of_prompt(job: Job, adapter: Adapter) -> Iterator[Finding]:
    """Yield keys that change layers, and everything that virtual tokens before a sample do not go with."""
    for key in (*_OF_MATRICES, "targets", "feedforward", "train_also"):
        kind = KINDS[adapter.method]
        reason = f"is of a layer, and {kind} changes none; leave it out, or write method: lora"
        yield from _set(adapter, key, reason)
    if adapter.is_prefix:
        reason = "keys and values are no words that a text could be; write method: prompt-tuning"
        yield from _set(adapter, "init_text", reason)
    if adapter.has_encoder:
        reason = "the encoder makes the vectors, and starts as in peft; write method: prompt-tuning"
        yield from _set(adapter, "init_text", reason)
        if adapter.encoder == "mlp":
            reason = "is of an LSTM, and an MLP has three layers; leave it out, or write encoder: lstm"
            yield from _set(adapter, "encoder_num_layers", reason)
    else:
        for key in _OF_ENCODER:
            reason = "is of P-tuning's encoder; write method: p-tuning, or leave it out"
            yield from _set(adapter, key, reason)
    if adapter.is_prefix and not tasks.find(job.model.task).traits.prefixes:
        able = ", ".join(name for name in tasks.names() if tasks.find(name).traits.prefixes)
        reason = (
            f"a {job.model.task} task reads no learned keys and values ({able} does); write prompt-tuning"
        )
        yield finding("model.adapter.method", adapter.method, reason, "model.task")
    elif not tasks.find(job.model.task).traits.prompts:
        able = ", ".join(name for name in tasks.names() if tasks.find(name).traits.prompts)
        reason = f"a {job.model.task} task puts no virtual tokens before a sample ({able} do); write lora"
        yield finding("model.adapter.method", adapter.method, reason, "model.task")
    if adapter.virtual_tokens >= job.data.max_length:
        reason = (
            f"leaves no room for a text: virtual tokens count in data.max_length, which is "
            f"{job.data.max_length}; write fewer, or raise that"
        )
        yield finding("model.adapter.virtual_tokens", adapter.virtual_tokens, reason, "data.max_length")
    if adapter.init_text is not None and adapter.weights is not None:
        reason = "an adapter that is gone on with has its vectors already; leave it out"
        yield finding("model.adapter.init_text", adapter.init_text, reason, "model.adapter.weights")
    if job.distillation is not None:
        reason = "a teacher has none of the student's virtual tokens; leave it out, or write method: lora"
        yield finding("distillation", None, reason, "model.adapter.method")
    if (alpha := job.training.neftune_noise_alpha) is not None:
        reason = "noise is for embeddings of words, and would fall on virtual tokens too; leave it out"
        yield finding("training.neftune_noise_alpha", alpha, reason, "model.adapter.method")


def _of_ia3(adapter: Adapter) -> Iterator[Finding]:
    for key in _OF_MATRICES:
        yield from _set(
            adapter, key, "is of low-rank matrices, and IA3 has a vector for each layer; leave it out"
        )
    if adapter.targets == "all-linear" and adapter.weights is None:
        reason = (
            "IA3 multiplies keys, values and what goes into the last layer of each feed-forward part; name "
            "them, of a llama as [k_proj, v_proj, down_proj] with feedforward: [down_proj]"
        )
        yield finding("model.adapter.targets", adapter.targets, reason, "model.adapter.method")


def _of_lora(adapter: Adapter) -> Iterator[Finding]:
    if adapter.feedforward:
        reason = "is of IA3; write method: ia3, or leave it out"
        yield finding("model.adapter.feedforward", list(adapter.feedforward), reason, "model.adapter.method")
