"""Causal language models: every way of training held against the model's own loss of each sample alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from launcher.training import heads
from tests.families.facts import Family, facts, logits_of
from tests.families.layouts import packed, samples, single
from tests.families.numbers import LOSS, NEAR, Numbers, close, figures, is_ok, measured, message
from tests.families.own import Auxiliary, call, forward
from tests.training.batches import batch_of_samples

CANDIDATES = [
    *(("packed", attention) for attention in ("packed", "sdpa", "eager")),
    *((layout, attention) for layout in ("padded", "single") for attention in ("sdpa", "eager")),
]
"""The fastest first: the first that is right is a family's own."""
HEADS = ("chunked", "model", "forward")
"""The cheapest first."""
_PACKAGES = ("flash-linear-attention",)


def causal_lm(model_type: str) -> dict[str, Any]:
    """Try every candidate on one type and say which are right."""
    began = time.monotonic()
    family, ids = Family(model_type), samples()
    reference = family.reference_attention()
    model = family.model(reference)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "layout": None,
        "attention": None,
        "head": None,
        "reference": reference,
    }
    found |= facts(family, model, ids)
    auxiliary = Auxiliary(model, ids[2])
    found["aux"] = bool(auxiliary.coefficient)
    right = {torch.float32: measured(model, own_loss(model, ids))}
    plain = measured(model, of_logits(model, ids, auxiliary))
    found["own_loss_is_cross_entropy"] = close(plain.against(right[torch.float32]))
    if not found["own_loss_is_cross_entropy"]:
        found["own_loss"], found["cross_entropy"] = right[torch.float32].loss, plain.loss
        found["own_loss_is_unshifted"] = bool(
            abs(_unshifted(model, ids) / right[torch.float32].loss - 1) < LOSS
        )
        right[torch.float32] = plain
    found["eval_differs"] = _differs(model, ids, own_loss)
    found["leak"] = leak(model, ids, auxiliary)
    found["tried"] = {}
    for layout, attention in CANDIDATES:
        for head in HEADS:
            if layout == "single" and any(is_ok(said) for said in found["tried"].values()):
                continue
            name = f"{layout}/{attention}/{head}"
            found["tried"][name] = verdict(
                family, reference, auxiliary, ids, right, (layout, attention, head)
            )
    best = next((name for name, said in found["tried"].items() if is_ok(said)), None)
    if best is not None:
        found["layout"], found["attention"], found["head"] = best.split("/")
    found["reason"] = "; ".join(_reasons(found)) or None
    found["needs"] = next(
        (each for each in _PACKAGES if any(each in said for said in found["tried"].values())), None
    )
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _reasons(found: dict[str, Any]) -> list[str]:
    """What to know of a family beside its way."""
    return [
        text
        for text, holds in {
            "no candidate is right": found["layout"] is None,
            "not causal: a later token changes earlier logits": not found["causal"],
            "its own loss asks each position for its own token": found.get("own_loss_is_unshifted", False),
            "its own loss is more than cross entropy and the router's": not found["own_loss_is_cross_entropy"]
            and not found.get("own_loss_is_unshifted"),
            "causal only with is_decoder": found.get("causal_without_is_decoder") is False,
        }.items()
        if holds
    ]


def verdict(
    family: Family, reference: str, auxiliary: Auxiliary, ids: Any, right: Any, candidate: Any
) -> str:
    """`ok`, or by how much this candidate is wrong, or with which message it fails."""
    layout, attention, head = candidate

    def numbers(dtype: torch.dtype) -> Numbers:
        model = family.model(attention, dtype)
        passes = [[one] for one in ids] if layout == "single" else [ids]
        outputs = [heads.causal_lm(model, batch_of_samples(shared, layout), head) for shared in passes]
        return measured(model, sum(output.loss_sum for output in outputs))

    try:
        wrong = numbers(torch.float32).against(right[torch.float32])
    except Exception as error:
        return message(error)
    if close(wrong):
        return "ok"
    if all(each < NEAR for each in wrong):
        try:
            if torch.float64 not in right:
                model = family.model(reference, torch.float64)
                right[torch.float64] = measured(model, of_logits(model, ids, auxiliary))
            exact = numbers(torch.float64).against(right[torch.float64])
            return f"{'ok' if close(exact) else 'wrong'}: float32 {figures(wrong)}; float64 {figures(exact)}"
        except Exception as error:
            return f"near: {figures(wrong)}; float64 fails: {message(error)}"
    return f"wrong: {figures(wrong)}"


def own_loss(model: Any, ids: list[torch.Tensor]) -> Any:
    """The loss that the model itself gives each sample alone, weighted by supervised tokens."""
    total: Any = 0.0
    for one in single(ids):
        labels = one.inputs["input_ids"]
        total = total + call(model, {**one.inputs, "labels": labels}).loss * (labels.shape[1] - 1)
    return total


def of_logits(model: Any, ids: list[torch.Tensor], auxiliary: Auxiliary) -> Any:
    """The same from the logits of each sample alone."""
    return sum(forward(model, one, auxiliary) for one in single(ids))


def leak(model: Any, ids: list[torch.Tensor], auxiliary: Auxiliary) -> str:
    """How far two samples in one row move the numbers where nothing tells them apart: far more than what
    counts as right."""
    pair = [ids[7], ids[13]]
    together = next(packed(pair))
    together.inputs = {"input_ids": together.inputs["input_ids"], "use_cache": False}
    try:
        wrong = measured(model, forward(model, together, auxiliary))
        return figures(wrong.against(measured(model, of_logits(model, pair, auxiliary))))
    except Exception as error:
        return message(error)


def _unshifted(model: Any, ids: list[torch.Tensor]) -> float:
    """What the loss would be if each position were asked for its own token."""
    with torch.no_grad():
        means = [(functional.cross_entropy(logits_of(model, each), each), len(each) - 1) for each in ids]
    return float(sum(mean * weight for mean, weight in means))


def _differs(model: Any, ids: list[torch.Tensor], loss: Callable[..., Any]) -> bool:
    with torch.no_grad():
        training = float(loss(model, ids))
        model.eval()
        evaluating = float(loss(model, ids))
        model.train()
    return abs(evaluating / training - 1) > LOSS
