"""Scores of answers to questions: the best span over the windows of a row, scored as SQuAD's scripts do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.lazy import Lazy
from launcher.tasks import squad
from launcher.tasks.answer_spans import best_spans, probabilities
from launcher.tasks.groups import by_length, measured
from launcher.tasks.task import Evaluator, Output, Sample

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

NUM_COMPARED = 20
"""Spans whose probabilities add up to 1, as in transformers' examples."""


class Pointed(NamedTuple):
    """A span of a row's text, in characters, with the sum of its two logits."""

    answer: str
    start: int
    end: int
    score: float


def pointed(sample: Sample, logits: np.ndarray, number: int, longest: int) -> tuple[list[Pointed], float]:
    """Return the best spans of a window by its logits [positions, 2], and the score of no answer."""
    first, begin, none = sample["place"].tolist()
    spans, text = sample["spans"], sample["text"].tobytes().decode()
    best = []
    for span in best_spans(logits[first : first + len(spans)], longest, number):
        start, end = int(spans[span.first, 0]), int(spans[span.last, 1])
        best.append(Pointed(text[start - begin : end - begin], start, end, span.score))
    return best, float(logits[none].astype(np.float64).sum())


def no_answer(none: float, best: float) -> float:
    """Return the probability of no answer, relative to the best answer."""
    return 1 / (1 + math.exp(min(best - none, 700))) if best > -math.inf else 1.0


def answer_of(parts: Sequence[dict[str, Any]], threshold: float | None) -> dict[str, Any]:
    """Return a row's answer from the best spans of its windows; `threshold` is None if every question has an
    answer."""
    options = parts[0]["options"]
    candidates: dict[tuple[int, int], Pointed] = {}
    for span in (Pointed(**span) for part in parts for span in part["spans"]):
        known = candidates.get((span.start, span.end))
        if known is None or span.score > known.score:  # windows share tokens, and both may point there
            candidates[span.start, span.end] = span
    best = sorted(candidates.values(), key=lambda span: (-span.score, span.start, span.end))[
        : max(NUM_COMPARED, options["top_k"] or 1)
    ]
    none = min(part["none"] for part in parts)
    doubt = no_answer(none, best[0].score if best else -math.inf)
    given = best[0] if best and (threshold is None or doubt <= threshold) else Pointed("", 0, 0, none)
    # No answer counts as one more candidate where it is possible, as in transformers' examples.
    scores = [span.score for span in best] + ([none] if threshold is not None else [])
    shares = probabilities(scores) if scores else []
    answer: dict[str, Any] = {"answer": given.answer, "start": given.start, "end": given.end}
    if options["probabilities"]:
        answer["probability"] = (
            shares[best.index(given)] if given in best else (shares[-1] if shares else 1.0)
        )
        answer |= {"no_answer": doubt} if threshold is not None else {}
    if options["top_k"]:
        shown = zip(best[: options["top_k"]], shares, strict=False)
        answer["answers"] = [
            {"answer": one.answer, "start": one.start, "end": one.end, "probability": share}
            for one, share in shown
        ]
    return answer


class AnswerScores(Evaluator):
    """`loss` of the windows; exact match and F1 of the questions, also of answerable and unanswerable ones
    apart."""

    def __init__(self, unanswerable: bool, threshold: float | None, longest: int) -> None:
        self._unanswerable, self._threshold, self._longest = unanswerable, threshold, longest
        self._sums = np.zeros(2)
        self._numbers: list[tuple[float, ...]] = []
        self._texts: list[bytes] = []
        self._details: dict[str, Any] = {}
        self._asked: list[squad.Asked] = []
        self._lengths: list[int] = []

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        assert output.predictions is not None
        logits = output.predictions.float().cpu().numpy()
        learned = (batch["positions"].numpy() < logits.shape[1]).any(axis=1) & (batch["weights"].numpy() > 0)
        self._sums += [float(output.loss_sum), float(np.count_nonzero(learned))]
        for scores, sample in zip(logits, batch["aside"]["samples"], strict=True):
            if sample.weight:
                spans, none = pointed(sample, scores, 1, self._longest)
                best = spans[0] if spans else Pointed("", 0, 0, -math.inf)
                end = int(sample["spans"][:, 1].max(initial=0))
                self._numbers.append((sample.id, sample.window, best.score, none, end))
                self._texts += [best.answer.encode(), sample["references"].tobytes()]

    def state(self) -> list[np.ndarray]:
        """Return the sums; for each window its row, its number, the scores of its answer and of no answer,
        and its end in the row's text; and the texts as bytes."""
        lengths = np.array([len(text) for text in self._texts], dtype=np.int64)
        numbers = np.array(self._numbers, dtype=np.float64).reshape(-1, 5)
        return [self._sums, numbers, lengths, np.frombuffer(b"".join(self._texts), dtype=np.uint8)]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum, num_learned = np.sum([sums for sums, *_ in states], axis=0).tolist()
        windows = sorted(window for state in states for window in _windows(state))
        rows: dict[int, list[_Window]] = {}
        for window in windows:
            rows.setdefault(window.row, []).append(window)
        self._asked = questions = [_asked(own) for own in rows.values()]
        self._lengths = [max(window.end for window in own) for own in rows.values()]
        loss = {"loss": loss_sum / max(1.0, num_learned)}
        if not self._unanswerable:
            self._details = {"num_questions": len(questions)}
            return loss | squad.answered(questions)
        metrics, self._details = squad.with_unanswerable(questions, self._threshold)
        return loss | metrics

    def details(self) -> dict[str, Any]:
        """Return the thresholds, the numbers of questions, and the scores by length of the text and by kind
        of question."""
        if not self._asked:
            return self._details
        kinds: dict[str, list[int]] = {"with an answer": [], "without one": []}
        for place, one in enumerate(self._asked):
            kinds["with an answer" if one.references else "without one"].append(place)
        groups = {"characters of the text": measured(by_length(self._lengths), self._of)}
        groups |= {"questions": measured(kinds, self._of)} if self._unanswerable else {}
        return {**self._details, "groups": groups}

    def _of(self, places: Sequence[int]) -> dict[str, float]:
        """Return F1 and exact match of some questions, with the threshold that is used for all."""
        questions = [self._asked[place] for place in places]
        if self._unanswerable:
            metrics, _ = squad.with_unanswerable(questions, self._details["no_answer_threshold"])
        else:
            metrics = squad.answered(questions)
        return {name: metrics[name] for name in ("f1", "exact_match")}

    def as_copy(self, state: Sequence[np.ndarray], copy: int) -> Sequence[np.ndarray]:
        sums, numbers, *texts = state
        return [sums, np.column_stack([np.full(len(numbers), float(copy)), numbers[:, 1:]]), *texts]


class _Window(NamedTuple):
    """The best answer in one window, and the score of no answer."""

    row: int
    number: int
    score: float
    none: float
    end: int
    answer: str
    references: str


def _windows(state: Sequence[np.ndarray]) -> Iterable[_Window]:
    _, numbers, lengths, content = state
    ends = np.cumsum(lengths).tolist()
    texts = [content[begin:end].tobytes().decode() for begin, end in zip([0, *ends], ends, strict=False)]
    for (row, number, score, none, end), answer, references in zip(
        numbers.tolist(), texts[::2], texts[1::2], strict=True
    ):
        yield _Window(int(row), int(number), score, none, int(end), answer, references)


def _asked(windows: Sequence[_Window]) -> squad.Asked:
    """Return the best answer of a row's windows; of equally good ones the earlier."""
    best = max(windows, key=lambda window: window.score)
    references = json.loads(windows[0].references)
    return squad.Asked(
        tuple(references), best.answer, no_answer(min(window.none for window in windows), best.score)
    )
