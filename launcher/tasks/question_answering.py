"""Answers to questions about a text, as spans of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from launcher.data.rows import BAD_LABEL, IfThere, RowProblem, text_of
from launcher.data.section import Data
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import answer_spans
from launcher.tasks.answer_scores import NUM_COMPARED, AnswerScores, answer_of, pointed
from launcher.tasks.answer_spans import IMPOSSIBLE, Answer
from launcher.tasks.answer_windows import SEPARATORS, Asked, windows_of
from launcher.tasks.padding import padded
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
    finding,
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


class QuestionColumns(Data):
    """Rows of a question, a text and the answers in it."""

    question: str = "question"
    """The column of the question."""
    context: str = "context"
    """The column of the text that holds the answer."""
    answers: str = "answers"
    """The column of the answers: `{text: [...], answer_start: [...]}`, a list of `{text, answer_start}`, or
    text beside `answer_start`."""
    answer_start: str | None = None
    """The column of the character, counted from 0, at which the answer begins, where `answers` holds its text
    alone."""
    doc_stride: int = Field(default=128, ge=0, le=1_000_000)
    """Tokens of the text that a window shares with the one before, where question and text together have more
    than max_length."""
    max_answer_length: int = Field(default=30, ge=1, le=100_000)
    """Tokens of the longest answer that is given."""
    unanswerable: bool = False
    """Whether a question may have no answer in its text, as in SQuAD 2.0; else a row without one cannot be
    used."""
    no_answer_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["fit"] = "fit"
    """The probability of there being no answer above which none is given; `fit` takes the one with the best
    F1 on the evaluation."""


class QuestionAnswering(Task):
    """A question and a text to the part of the text that answers it, or to none."""

    name = "question-answering"
    traits = Traits("padded", causal=False, head="every-position", peft_type="QUESTION_ANS", windows=True)
    Columns = QuestionColumns
    column_ways = (("question", "context", "answers"),)
    data: QuestionColumns

    def __init__(self, data: QuestionColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pad = 0
        self._finds_question = False
        """Whether the model itself finds the question, by separators."""
        self._separator: int | None = None
        """Where it does, the token of which every sequence has three."""
        self._threshold = 0.5 if data.no_answer_threshold == "fit" else data.no_answer_threshold

    def checks(self) -> Iterator[Finding]:
        data = self.data
        if data.packing:
            reason = "only language models pack; set it to false: windows are sorted by length and padded"
            yield finding("data.packing", True, reason, "model.task")
        if data.doc_stride >= data.max_length:
            reason = (
                f"windows of max_length = {data.max_length} tokens would share all of their text; write at "
                f"most {data.max_length // 3}"
            )
            yield finding("data.doc_stride", data.doc_stride, reason, "data.max_length")
        if data.no_answer_threshold != "fit" and not data.unanswerable:
            reason = "every question has an answer here; leave it out, or write data.unanswerable: true"
            yield finding("data.no_answer_threshold", data.no_answer_threshold, reason, "data.unanswerable")
        names = {
            "question": data.question,
            "context": data.context,
            "answers": data.answers,
            "answer_start": data.answer_start,
        }
        for key, name in names.items():
            if (
                name is not None
                and (same := next(other for other, value in names.items() if value == name)) != key
            ):
                yield finding(f"data.{key}", name, f"is the column of data.{same} too", f"data.{same}")

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
        return 3 if tokenizer is None else int(tokenizer.num_special_tokens_to_add(True))

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        (question, context), limit = tokens, self.data.max_length
        room, whole = limit - question - added, question + context + added
        step = room - self.data.doc_stride
        if whole <= limit or self.data.too_long != "cut" or step <= 0:
            return [whole] if whole <= limit else []
        num_more = -(-(context - room) // step)
        return [limit] * num_more + [whole - num_more * step]

    def prepare(self, processor: Any) -> None:
        """Take the padding token and the one that stands for no answer. Raises ConfigurationError for a
        tokenizer without offsets."""
        if not processor.is_fast:
            reason = (
                f"its tokenizer ({type(processor).__name__}) does not say where in the text its tokens "
                "stand; take a fast one"
            )
            raise ConfigurationError(Problem("model.name", processor.name_or_path or None, reason))
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
                raise ConfigurationError(Problem("model.name", processor.name_or_path or None, reason))

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Raise ConfigurationError where a model that stands has no head for answers."""
        self._finds_question = config.model_type == "longformer"
        kinds = getattr(config, "architectures", None) or ()
        if as_it_stands and not any("ForQuestionAnswering" in kind for kind in kinds):
            reason = (
                f"the model ({', '.join(kinds) or 'of no known class'}) has no head for answers; train it "
                "first, and measure the run"
            )
            raise ConfigurationError(Problem("MODEL", getattr(config, "name_or_path", None) or None, reason))

    def configure(self, config: Any) -> None:
        """Two numbers for each token, and the padding token where the model has none."""
        config.num_labels = 2
        for one in (config, config.get_text_config()):
            if getattr(one, "pad_token_id", None) is None:
                one.pad_token_id = self._pad
        self._pad = config.pad_token_id

    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> list[Encoded | tuple[Encoded, ...] | RowProblem]:
        """Return the windows of each row, as many as its text needs.

        `input_ids` and, where the tokenizer gives them, `token_type_ids`, int32 [n]; `positions`, of the
        answer's first and last token, int32 [2]; `spans`, the characters of each token of the text, int32
        [tokens, 2]; `place`, int32 [3]: where these tokens begin in the sequence and in the row's text, and
        the position of no answer; `text`, those characters, and in the first window `references`, a JSON
        list: both UTF-8 as uint8.
        """
        read = [self._read(row) for row in rows]
        good = [one for one in read if not isinstance(one, RowProblem)]
        windows = iter(windows_of(good, processor, self.data, self._separator))
        return [one if isinstance(one, RowProblem) else next(windows) for one in read]

    def _read(self, row: dict[str, Any]) -> Asked | RowProblem:
        try:
            question, context = self.texts(row)
            return Asked(question, context, self._answers(row, context))
        except RowProblem as problem:
            return problem

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
        """Return `input_ids`, `attention_mask` and, where there are any, `token_type_ids`, int64 [B, L]
        padded to the longest; `positions` int64 [B, 2]; `weights` float32 [B], 0 for filler; and the samples
        `aside`."""
        samples = [sample for item in items for sample in item]
        batch = padded(samples, {"input_ids": self._pad, "token_type_ids": 0})
        batch["positions"] = torch.from_numpy(
            np.stack([sample["positions"] for sample in samples]).astype(np.int64)
        )
        batch["weights"] = torch.tensor([float(sample.weight) for sample in samples])
        return batch | {"aside": {"samples": samples}}

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Keep every separator by which the model finds the question."""
        kept = np.r_[: min(length, sample.length) - 1, sample.length - 1]
        if self._finds_question:
            kept = np.union1d(kept, np.flatnonzero(sample["input_ids"] == self._separator))
        short = sample_at(sample, kept)
        short["positions"] = np.zeros(2, dtype=np.int32)
        return short

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        names = ("input_ids", "token_type_ids")
        return {
            name: torch.from_numpy(sample[name].astype(np.int64))[None] for name in names if name in sample
        }

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the sum over windows of the mean cross entropy of where the answer begins and ends, and the
        logits [B, L, 2] in fp32.

        As transformers has it for each window by itself: positions beyond the sequence count for nothing.
        """
        from torch.nn import functional

        from launcher.training.heads import own_forward

        outputs = own_forward(
            model,
            {
                name: batch[name]
                for name in ("input_ids", "attention_mask", "token_type_ids")
                if name in batch
            },
        )
        logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1).float()
        # Padding is no place to answer; counted in, it would have a window's loss hang on the others of its
        # pass.
        logits = logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, -torch.inf)
        beyond = logits.shape[1]
        positions = batch["positions"].clamp(0, beyond)
        losses = functional.cross_entropy(logits, positions, ignore_index=beyond, reduction="none").mean(
            dim=-1
        )
        correct = (logits.argmax(dim=1) == positions).all(dim=-1).float()
        return Output(
            (losses * batch["weights"]).sum(), (correct * batch["weights"]).sum().detach(), logits.detach()
        )

    def evaluator(self) -> Evaluator:
        threshold = None if self.data.no_answer_threshold == "fit" else self.data.no_answer_threshold
        return AnswerScores(self.data.unanswerable, threshold, self.data.max_answer_length)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:
        """Take the threshold that an evaluation of the model fitted, where the job leaves it to that."""
        if self.data.no_answer_threshold == "fit":
            self._threshold = float(details.get("no_answer_threshold", self._threshold))

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return of each window its best spans with the characters where they stand, and the score of no
        answer."""
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
        """Return `answer`, its `start` and `end` in characters of the text; an empty answer where there is
        none.

        With probabilities `probability` and `no_answer`, with top_k `answers`: the best ones with their
        probabilities, of the 20 best.
        """
        return answer_of(parts, self._threshold if self.data.unanswerable else None)
