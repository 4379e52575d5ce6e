"""Tasks of encoders and encoder-decoders: launcher's loss of a batch held to the class's own of each sample alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from launcher.data.section import Source
from launcher.tasks.masked_lm import MaskedColumns, MaskedLM
from launcher.tasks.question_answering import QuestionAnswering, QuestionColumns
from launcher.tasks.sequence_to_sequence import PairColumns, SequenceToSequence
from launcher.tasks.task import IGNORE, Sample, Task
from launcher.tasks.token_classification import TaggedColumns, TokenClassification
from launcher.training.model.attention import register
from tests.families import tiny
from tests.families.numbers import NEAR, Numbers, close, figures, is_ok, measured, message
from tests.families.special import UNABLE

LENGTHS = (2, 3, 40, 7, 13, 9, 33, 4, 21, 5, 28, 40)
MASK = 4
PADDED = tuple((layout, attention) for layout in ("padded", "single") for attention in ("sdpa", "eager"))
PACKED = tuple(("packed", attention) for attention in ("packed", "sdpa", "eager"))
ROWS = Source(path="rows.jsonl")


def _hidden(ids: np.ndarray, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Every third token is learned, and most of those are masked."""
    learned = np.arange(len(ids)) % 3 == 1
    masked = np.where(learned & (draws.random(len(ids)) < 0.8), MASK, ids)
    return {"input_ids": masked, "targets": np.where(learned, ids, IGNORE)}


def _tagged(ids: np.ndarray, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Every other token is a word with a tag."""
    places = np.arange(0, len(ids), 2)
    labels = np.full(len(ids), IGNORE)
    labels[places] = draws.integers(0, tiny.NUM_LABELS, len(places))
    return {
        "input_ids": ids,
        "labels": labels,
        "words": places // 2,
        "places": places,
        "tags": labels[places],
    }


def _asked(ids: np.ndarray, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Three separators, of which Longformer counts the ones before the text, and an answer in the text."""
    ids[[min(2, len(ids) - 1), min(3, len(ids) - 1)]] = tiny.END
    return {"input_ids": ids, "positions": np.sort(draws.integers(0, len(ids), 2))}


def _written(ids: np.ndarray, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """A target that is longer than its source in one half of the samples, and shorter in the other."""
    labels = draws.integers(5, tiny.VOCABULARY, 1 + (7 * len(ids)) % 29)
    labels[-1] = tiny.END
    return {"input_ids": ids, "labels": labels}


def _mean_of_learned(name: str) -> Callable[[Any, Sample], torch.Tensor]:
    def summed(model: Any, sample: Sample) -> torch.Tensor:
        labels = torch.from_numpy(sample[name].astype(np.int64))[None]
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
        return loss * (labels != IGNORE).sum()

    return summed


def _of_span(model: Any, sample: Sample) -> torch.Tensor:
    ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
    first, last = torch.from_numpy(sample["positions"].astype(np.int64))[:, None]
    loss: torch.Tensor = model(input_ids=ids, start_positions=first, end_positions=last).loss
    return loss


@dataclass(frozen=True)
class Kind:
    """What a task of the sweep is tried with."""

    task: Callable[[], Task]
    sample: Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]]
    """The arrays of a sample, of its tokens, int64 [n]."""
    own_loss: Callable[[Any, Sample], torch.Tensor]
    """The loss that a model's class gives a sample alone, times what is learned of it."""
    ways: tuple[tuple[str, str], ...] = PADDED
    """The fastest first: the first that is right is a type's own."""
    heads: tuple[str, ...] = ("chunked",)


KINDS = {
    tiny.MASKED_LM: Kind(
        lambda: MaskedLM(MaskedColumns(train=ROWS, text="text")),
        _hidden,
        _mean_of_learned("targets"),
        PACKED + PADDED,
        ("model", "forward"),
    ),
    tiny.TOKEN_CLASSIFICATION: Kind(
        lambda: TokenClassification(
            TaggedColumns(train=ROWS, words="words", tags="tags"), ["O", "B-a", "I-a"]
        ),
        _tagged,
        _mean_of_learned("labels"),
    ),
    tiny.QUESTION_ANSWERING: Kind(lambda: QuestionAnswering(QuestionColumns(train=ROWS)), _asked, _of_span),
    tiny.SEQUENCE_TO_SEQUENCE: Kind(
        lambda: SequenceToSequence(PairColumns(train=ROWS, source="source", target="target")),
        _written,
        _mean_of_learned("labels"),
    ),
}


@dataclass
class Type:
    """One type's models with equal weights, by attention and precision, and the samples that its class takes."""

    name: str
    task_name: str
    models: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()

    @property
    def kind(self) -> Kind:
        return KINDS[self.task_name]

    def model(self, attention: str, dtype: torch.dtype = torch.float32) -> Any:
        if (attention, dtype) not in self.models:
            experts = "eager" if dtype == torch.float64 else None  # fused experts know no float64
            made = tiny.model_of(self.name, self.task_name, register(attention), dropout=0.0, experts=experts)
            self.models[attention, dtype] = made.train().to(dtype)
        return self.models[attention, dtype]

    def reference(self) -> str:
        """Eager, or fused where the class refuses eager."""
        try:
            self.model("eager")
        except (ValueError, ImportError, NotImplementedError):
            return "sdpa"
        return "eager"

    def alone(self, attention: str, dtype: torch.dtype = torch.float32) -> Numbers:
        """What the class makes of each sample by itself."""
        model = self.model(attention, dtype)
        return measured(model, sum(self.kind.own_loss(model, sample) for sample in self.samples))

    def ours(self, layout: str, attention: str, head: str, dtype: torch.dtype = torch.float32) -> Numbers:
        """What launcher's task makes of all samples."""
        model, task = self.model(attention, dtype), self.kind.task()
        task.configure(model.config)
        task.layout, task.head = layout, head  # type: ignore[assignment]
        passes = [[sample] for sample in self.samples] if layout == "single" else [self.samples]
        outputs = [task.loss(model, task.collate([[sample] for sample in shared])) for shared in passes]
        return measured(model, sum(output.loss_sum for output in outputs))

    def draw(self, shortest: int, multiple: int) -> None:
        """Draw samples of no fewer tokens, in numbers that are multiples, ending with the end token."""
        draws = np.random.default_rng(0)
        self.samples = []
        for number, length in enumerate(LENGTHS):
            ids = draws.integers(5, tiny.VOCABULARY, -(-max(length, shortest) // multiple) * multiple)
            ids[0], ids[-1] = tiny.BEGIN, tiny.END
            arrays = self.kind.sample(ids, draws)
            self.samples = [*self.samples, Sample(arrays, number, len(ids))]


def found_of(task_name: str, model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right."""
    began, of = time.monotonic(), Type(model_type, task_name)
    reference, last = of.reference(), None
    for shortest, multiple in ((2, 1), (8, 1), (16, 1), (16, 8)):
        of.draw(shortest, multiple)
        try:
            right = {torch.float32: of.alone(reference)}
            break
        except Exception as error:
            last = last or error
            of.model(reference).zero_grad()
    else:
        assert last is not None
        raise last
    found: dict[str, Any] = {
        "class": type(of.model(reference)).__name__, "layout": None, "attention": None, "head": None,
        "reference": reference, "reason": None,
    }  # fmt: skip
    if last is not None:
        found["note"] = f"samples of {shortest} tokens or more, multiples of {multiple}: {message(last)}"
    if not close(wrong := of.alone(reference).against(right[torch.float32])):
        found["note"] = f"not the same twice: {figures(wrong)}"
    found["tried"] = {}
    for layout, attention in of.kind.ways:
        for head in of.kind.heads:
            if layout == "single" and any(map(is_ok, found["tried"].values())):
                continue
            found["tried"][f"{layout}/{attention}/{head}"] = verdict(
                of, right, reference, layout, attention, head
            )
    best = next((name for name, said in found["tried"].items() if is_ok(said)), None)
    if best is not None:
        found["layout"], found["attention"], found["head"] = best.split("/")
    else:
        found["reason"] = UNABLE.get((task_name, model_type), "no candidate is right")
    return found | {"seconds": round(time.monotonic() - began, 1)}


def verdict(of: Type, right: dict[torch.dtype, Numbers], reference: str, *way: str) -> str:
    """`ok`, or by how much this way is wrong, or with which message it fails."""
    try:
        wrong = of.ours(*way).against(right[torch.float32])
        if close(wrong):
            return "ok"
        if not all(each < NEAR for each in wrong):
            return f"wrong: {figures(wrong)}"
        if torch.float64 not in right:
            right[torch.float64] = of.alone(reference, torch.float64)
        exact = of.ours(*way, dtype=torch.float64).against(right[torch.float64])
        return f"{'ok' if close(exact) else 'wrong'}: float32 {figures(wrong)}; float64 {figures(exact)}"
    except Exception as error:
        return message(error)
