"""Scores of transcripts: word and character error rates, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks.groups import by_length, measured
from launcher.tasks.task import Evaluator, Output
from launcher.tasks.text_scores import scores
from launcher.tasks.writing import WritingTask, answered, as_bytes, from_bytes

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

ERRORS: dict[str, Better] = {"wer": "lower", "cer": "lower"}
_NUM_WORST = 10
"""Rows that details show."""


def normalized(text: str, how: str, tokenizer: Any) -> str:
    """Return a text normalised for comparison by Whisper's own normalizers, or unchanged."""
    if how == "none":
        return text
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if how == "basic":
        return str(BasicTextNormalizer()(text)).strip()
    spelling = getattr(tokenizer, "english_spelling_normalizer", None) or {}
    return str(EnglishTextNormalizer(spelling)(text)).strip()


def error_rates(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return `wer` and `cer`: the words, and characters, that are substituted, deleted or inserted, as a
    share of the references'. It can exceed 1; for empty references it is the number of insertions, as in
    jiwer."""
    import jiwer

    return {
        "wer": float(jiwer.wer(list(references), list(answers))),
        "cer": float(jiwer.cer(list(references), list(answers))),
    }


class SpeechScores(Evaluator):
    """`loss` per clip (CTC) or per token (encoder-decoder), and the error rates of transcripts."""

    def __init__(self, task: WritingTask) -> None:
        self._task = task
        self._sums = np.zeros(2)
        self._rows: list[tuple[int, int, str, list[str], bool]] = []
        self._texts: tuple[list[str], list[str]] = [], []
        self._num_at_limit = 0

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        aside = batch["aside"]
        self._sums += [float(output.loss_sum), sum(aside["supervised"])]
        if output.generated is not None:
            self._rows += answered(self._task, output, batch)

    def state(self) -> list[np.ndarray]:
        return [self._sums, as_bytes(self._rows)]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum, num_supervised = np.sum([sums for sums, _ in states], axis=0).tolist()
        rows = sorted((row for _, written in states for row in from_bytes(written)), key=lambda row: row[:2])
        answers, references = [row[2] for row in rows], [row[3][0] for row in rows]
        self._num_at_limit = sum(row[4] for row in rows)
        how, tokenizer = self._task.data.normalization, self._task.tokenizer
        self._texts = (
            [normalized(text, how, tokenizer) for text in answers],
            [normalized(text, how, tokenizer) for text in references],
        )
        own = scores(answers, [[text] for text in references], self._task.evaluation, ())
        return {"loss": loss_sum / max(num_supervised, 1)} | error_rates(*self._texts) | own

    def details(self) -> dict[str, Any]:
        """Return how many answers differ, the worst of them, and the error rates by words of the text."""
        answers, references = self._texts
        if not answers:
            return {}

        def scored(places: Sequence[int]) -> dict[str, float]:
            return error_rates([answers[place] for place in places], [references[place] for place in places])

        wrong = [
            (error_rates([answer], [text])["cer"], answer, text)
            for answer, text in zip(answers, references, strict=True)
        ]
        worst = sorted((one for one in wrong if one[0] > 0), key=lambda one: -one[0])[:_NUM_WORST]
        groups = by_length([len(text.split()) for text in references])
        return {
            "num_answers": len(answers),
            "num_distinct_answers": len(set(answers)),
            **self._task.limit_details(self._num_at_limit),
            "worst": [{"cer": rate, "written": answer, "text": text} for rate, answer, text in worst],
            "groups": {"words of the text": measured(groups, scored)},
        }
