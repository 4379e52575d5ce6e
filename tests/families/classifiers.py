"""Sequence classification: which batches give each sample the logits that it has alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional

from tests.families import tiny
from tests.families.numbers import NEAR, close, figures, is_ok, measured, message

LENGTHS = (2, 3, 40, 7, 13, 9, 10, 33, 4, 21, 5, 17, 6, 28, 11, 40)
CANDIDATES = [
    ("padded", "sdpa"),
    ("padded", "eager"),
    ("padded-left", "sdpa"),
    ("padded-left", "eager"),
    ("single", "sdpa"),
    ("single", "eager"),
]


def samples(shortest: int, multiple: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw samples that end with the end token, and their labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = [-(-max(length, shortest) // multiple) * multiple for length in LENGTHS]
    ids = [torch.randint(5, tiny.VOCABULARY, (length,), generator=generator) for length in lengths]
    for each in ids:
        each[0], each[-1] = tiny.BEGIN, tiny.END
    return ids, torch.randint(0, 3, (len(ids),), generator=generator)


def batch(ids: list[torch.Tensor], pad: int, left: bool = False) -> dict[str, torch.Tensor]:
    """One rectangle with its mask."""
    width = max(len(each) for each in ids)
    rows = torch.full((len(ids), width), pad)
    mask = torch.zeros_like(rows)
    for index, each in enumerate(ids):
        place = slice(width - len(each), width) if left else slice(0, len(each))
        rows[index, place], mask[index, place] = each, 1
    return {"input_ids": rows, "attention_mask": mask}


def total(model: Any, ids: list[torch.Tensor], labels: torch.Tensor, layout: str) -> Any:
    """The summed loss under a layout."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", tiny.PAD)
    if layout == "alone":
        return sum(
            model(**batch([each], pad), labels=label[None]).loss
            for each, label in zip(ids, labels, strict=True)
        )
    if layout == "single":
        inputs = [{"input_ids": each[None]} for each in ids]
        logits = torch.cat([model(**each).logits for each in inputs])
    else:
        logits = model(**batch(ids, pad, layout == "padded-left")).logits
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def classification_of(model_type: str) -> dict[str, Any]:
    """Try every candidate on one type and say which are right."""
    began = time.monotonic()
    models: dict[Any, Any] = {}

    def model_of(attention: str, dtype: torch.dtype) -> Any:
        if (attention, dtype) not in models:
            experts = "eager" if dtype == torch.float64 else None
            model = tiny.model_of(
                model_type, tiny.SEQUENCE_CLASSIFICATION, attention, dropout=0.0, experts=experts
            )
            models[attention, dtype] = model.train().to(dtype)
        return models[attention, dtype]

    reference = "eager"
    try:
        model = model_of("eager", torch.float32)
    except (ValueError, ImportError, NotImplementedError):
        reference, model = "sdpa", model_of("sdpa", torch.float32)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "layout": None,
        "attention": None,
        "reference": reference,
        "reason": None,
    }
    last: Exception | None = None
    for shortest, multiple in ((2, 1), (8, 1), (16, 1), (16, 8)):
        ids, labels = samples(shortest, multiple)
        try:
            right = {torch.float32: measured(model, total(model, ids, labels, "alone"))}
            break
        except Exception as error:
            last = last or error
            model.zero_grad()
    else:
        assert last is not None
        raise last
    if last is not None:
        found["note"] = f"samples of {shortest} tokens or more, multiples of {multiple}: {message(last)}"
    again = measured(model, total(model, ids, labels, "alone"))
    if not close(again.against(right[torch.float32])):
        found["note"] = f"not the same twice: {figures(again.against(right[torch.float32]))}"
    found["tried"] = {}
    for layout, attention in CANDIDATES:
        try:
            model = model_of(attention, torch.float32)
            wrong = measured(model, total(model, ids, labels, layout)).against(right[torch.float32])
            said = "ok" if close(wrong) else f"wrong: {figures(wrong)}"
            if said != "ok" and all(each < NEAR for each in wrong):
                if torch.float64 not in right:
                    exact = model_of(reference, torch.float64)
                    right[torch.float64] = measured(exact, total(exact, ids, labels, "alone"))
                exact = model_of(attention, torch.float64)
                precise = measured(exact, total(exact, ids, labels, layout)).against(right[torch.float64])
                said = (
                    f"{'ok' if close(precise) else 'wrong'}: float32 {figures(wrong)}; float64 "
                    f"{figures(precise)}"
                )
        except Exception as error:
            said = message(error)
        found["tried"][f"{layout}/{attention}"] = said
    best = next((name for name, said in found["tried"].items() if is_ok(said)), None)
    if best is not None:
        found["layout"], found["attention"] = best.split("/")
    else:
        found["reason"] = "no candidate is right"
    return found | {"seconds": round(time.monotonic() - began, 1)}
