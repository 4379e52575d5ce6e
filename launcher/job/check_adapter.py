"""Checks of `model.adapter` beside the rest of a job."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.job.adapter import Adapter
from launcher.job.schema import Job
from launcher.tasks.task import Finding, finding


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
    yield from _of_ia3(model.adapter) if model.adapter.method == "ia3" else _of_lora(model.adapter)


def _of_ia3(adapter: Adapter) -> Iterator[Finding]:
    for key in ("rank", "alpha", "rslora", "dora", "init", "dropout"):
        if (value := getattr(adapter, key)) != Adapter.model_fields[key].default:
            reason = "is of low-rank matrices, and IA3 has a vector for each layer; leave it out"
            yield finding(f"model.adapter.{key}", value, reason, "model.adapter.method")
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
