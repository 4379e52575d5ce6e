"""Answers to questions about a text, as spans of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launcher.data.columns import Column, Kind, Overview
from launcher.data.rows import BAD_LABEL, IfThere, RowProblem, text_of
from launcher.lazy import Lazy
from launcher.tasks import answer_spans, question_columns, roles
from launcher.tasks.answer_losses import span_loss
from launcher.tasks.answer_scores import NUM_COMPARED, AnswerScores, answer_of, pointed
from launcher.tasks.answer_spans import IMPOSSIBLE, Answer
from launcher.tasks.answer_windows import SEPARATORS, Asked, windows_of
from launcher.tasks.classes import without_head
from launcher.tasks.encoding import encode_usable, special_tokens, unfit
from launcher.tasks.padding import alone, padded, weights
from launcher.tasks.question_columns import QuestionColumns
from launcher.tasks.task import (
    Better,
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Output,
    Sample,
    Task,
    Traits,
    ends_of,
    sample_at,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from launcher.tasks.task import AnswerOptions
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_ANSWERED: dict[str, Better] = {"loss": "lower", "exact_match": "higher", "f1": "higher"}
_UNANSWERABLE: dict[str, Better] = dict.fromkeys(
    ("has_answer_exact_match", "has_answer_f1", "no_answer_accuracy", "best_exact_match", "best_f1"), "higher"
)


class QuestionAnswering(Task):
    """Questions about a text, answered by a part of it, or by none."""

    name = "question-answering"
    traits = Traits("padded", causal=False, head="every-position", peft_type="QUESTION_ANS", windows=True)
    keeps_losses = True
    Columns = QuestionColumns
    column_ways = (("question", "context", "answers"),)
    column_roles = roles.OF_QUESTIONS
    data: QuestionColumns

    def __init__(self, data: QuestionColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pad = 0
        self._finds_question = False
        """Whether the model finds the question by separators."""
        self._separator: int | None = None
        """If so, the separator; every sequence has three."""
        self._threshold = 0.5 if data.no_answer_threshold == "fit" else data.no_answer_threshold
        self._was_fitted = False

    @classmethod
    def settings_for(cls, columns: Mapping[str, Column], seen: Overview) -> dict[str, Any]:
        answers, settings = columns.get("answers"), dict[str, Any]()
        if answers is not None and answers.kind is not Kind.ANSWERS and "answer_start" in seen.names:
            settings["answer_start"] = "answer_start"
        if IMPOSSIBLE in seen.names or (answers is not None and answers.num_empty):
            settings["unanswerable"] = True
        return settings

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from question_columns.contradictions(self.data)

    @property
    def metrics(self) -> Mapping[str, Better]:
        return _ANSWERED | _UNANSWERABLE if self.data.unanswerable else _ANSWERED

    @property
    def key(self) -> Any:
        return self._separator

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    @property
    def columns(self) -> tuple[str, ...]:
        read = (self.data.question, self.data.context)
        if self.for_prediction:
            return read
        starts = () if self.data.answer_start is None else (self.data.answer_start,)
        return (*read, self.data.answers, *starts, IfThere(IMPOSSIBLE))

    def texts(self, row: dict[str, Any]) -> list[str]:
        question, context = (text_of(row, column) for column in (self.data.question, self.data.context))
        self._answers(row, context)
        return [question, context]

    def _answers(self, row: dict[str, Any], context: str) -> list[Answer]:
        if self.for_prediction:
            return []
        answers = answer_spans.answers_of(row, self.data.answers, self.data.answer_start, context)
        if not answers and not self.data.unanswerable:
            raise RowProblem(
                BAD_LABEL, "a question without an answer; write data.unanswerable: true to learn those too"
            )
        return answers

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return special_tokens(tokenizer, is_pair=True)

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        (question, context), limit = tokens, self.data.max_length
        room, whole = limit - question - added, question + context + added
        step = room - self.data.doc_stride
        if whole <= limit or self.data.too_long != "cut" or step <= 0:
            return [whole] if whole <= limit else []
        num_more = -(-(context - room) // step)
        return [limit] * num_more + [whole - num_more * step]

    def prepare(self, processor: Any) -> None:
        """Take the padding token and the separator. Raises ConfigurationError for a tokenizer without
        offsets, or with other separators than the model needs."""
        if not processor.is_fast:
            reason = (
                f"its tokenizer ({type(processor).__name__}) does not say where in the text its tokens "
                "stand; take a fast one"
            )
            raise unfit(processor, reason)
        self._pad = next(
            (one for one in (processor.pad_token_id, processor.eos_token_id) if one is not None), 0
        )
        if self._finds_question:
            self._separator = processor.sep_token_id
            if (number := processor("a", "a")["input_ids"].count(self._separator)) != SEPARATORS:
                reason = (
                    f"the model finds the question by {SEPARATORS} separators in a sequence, and its "
                    f"tokenizer puts {number} there"
                )
                raise unfit(processor, reason)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Raise ConfigurationError for a model without a head for answers that is not trained."""
        self._finds_question = config.model_type == "longformer"
        kinds = getattr(config, "architectures", None) or ()
        if as_it_stands and not any("ForQuestionAnswering" in kind for kind in kinds):
            raise without_head(
                config, f"the model ({', '.join(kinds) or 'of no known class'}) has no head for answers"
            )

    def configure(self, config: Any) -> None:
        """Set two outputs for each token, and the padding token if the model has none."""
        config.num_labels = 2
        for one in (config, config.get_text_config()):
            if getattr(one, "pad_token_id", None) is None:
                one.pad_token_id = self._pad
        self._pad = config.pad_token_id

    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> list[tuple[Encoded, ...] | RowProblem]:
        """Return each row's windows over its text.

        `input_ids` and, if the tokenizer returns them, `token_type_ids`, int32 [n]; `positions` of the
        answer's first and last token, int32 [2]; `spans`, the characters of each token of the text, int32
        [tokens, 2]; `place`, int32 [3]: where these tokens begin in the sequence and in the row's text, and
        the position for no answer; `text`, those characters; and in the first window `references`, a JSON
        list. Both texts are UTF-8 as uint8.
        """
        return encode_usable(
            rows, self._read, lambda asked: windows_of(asked, processor, self.data, self._separator)
        )

    def _read(self, row: dict[str, Any]) -> Asked:
        question, context = self.texts(row)
        return Asked(question, context, self._answers(row, context))

    def example(self, length: int) -> Sample:
        ids, nothing = np.zeros(length, dtype=np.int32), np.zeros(0, dtype=np.uint8)
        spans = np.zeros((length - 1, 2), dtype=np.int32)
        arrays = {
            "input_ids": ids,
            "positions": np.array([0, 0], dtype=np.int32),
            "spans": spans,
            "place": np.array([1, 0, 0]),
        }
        return Sample(arrays | {"text": nothing, "references": nothing}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, if there are any, `token_type_ids`, int64 [B, L] padded
        to the longest; `positions` int64 [B, 2]; `weights` float32 [B], 0 for padding samples; and the
        samples `aside`."""
        samples = [sample for item in items for sample in item]
        batch = padded(samples, {"input_ids": self._pad, "token_type_ids": 0})
        batch["positions"] = torch.from_numpy(
            np.stack([sample["positions"] for sample in samples]).astype(np.int64)
        )
        batch["weights"] = weights(samples)
        return batch | {"aside": {"samples": samples}}

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the shortened sample with every separator that the model finds the question by."""
        kept = ends_of(sample.length, length)
        if self._finds_question:
            kept = np.union1d(kept, np.flatnonzero(sample["input_ids"] == self._separator))
        short = sample_at(sample, kept)
        short["positions"] = np.zeros(2, dtype=np.int32)
        return short

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return alone(sample)

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        return span_loss(model, batch)

    def evaluator(self) -> Evaluator:
        fits = self.data.no_answer_threshold == "fit" and not (self.keeps_fitted and self._was_fitted)
        threshold = None if fits else self._threshold
        return AnswerScores(self.data.unanswerable, threshold, self.data.max_answer_length)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:
        """Take the threshold that an evaluation of the model fitted, if the job has `no_answer_threshold:
        fit`."""
        if self.data.no_answer_threshold == "fit" and "no_answer_threshold" in details:
            self._threshold, self._was_fitted = float(details["no_answer_threshold"]), True

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return each window's best spans, with their characters, and the score of no answer."""
        assert output.predictions is not None
        logits = output.predictions.float().cpu().numpy()
        number = max(options.top_k or 1, NUM_COMPARED)
        parts = []
        for scores, sample in zip(logits, samples, strict=True):
            spans, none = pointed(sample, scores, number, self.data.max_answer_length)
            parts.append(
                {"spans": [one._asdict() for one in spans], "none": none, "options": asdict(options)}
            )
        return parts

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return `answer`, with its `start` and `end` in characters of the text; empty for no answer.

        With probabilities also `probability` and `no_answer`; with top_k also `answers`, the best ones, with
        probabilities among the 20 best (or top_k, if more).
        """
        return answer_of(parts, self._threshold if self.data.unanswerable else None)
