"""Causal language modelling: plain text, prompt and completion, or chat."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import (
    EMPTY,
    NOTHING_TO_LEARN,
    TOO_LONG,
    IfThere,
    RowProblem,
    check_encodable,
    required,
    text_of,
)
from launcher.data.section import Data
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks.chat.rows import chat_columns, messages_of, texts_of, tools_of
from launcher.tasks.encoding import (
    Tokens,
    Written,
    continue_texts,
    encode_written,
    puts_space_before,
    tokenise,
)
from launcher.tasks.generation import padded_prompts
from launcher.tasks.task import (
    IGNORE,
    AnswerOptions,
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Left,
    Output,
    Sample,
    Traits,
    finding,
)
from launcher.tasks.text_scores import EXACT, OVERLAP
from launcher.tasks.token_batches import joined, padded
from launcher.tasks.token_losses import TokenLosses
from launcher.tasks.writing import LOSSES, TextEvaluator, WritingTask, as_bytes
from launcher.values import Columns, Day, Tools

if TYPE_CHECKING:
    import numpy as np
    import torch

    from launcher.tasks.chat.template import ChatTemplate
else:
    np, torch = Lazy("numpy"), Lazy("torch")

MARKS = 5
"""Tokens that a chat's template puts around a message: in ChatML `<|im_start|>`, the role, two ends of lines,
`<|im_end|>`."""


class CausalColumns(Data):
    """Rows of text, of prompts with completions, or of chats."""

    text: Columns | None = None
    """The column of plain text: all of it is learned."""
    prompt: str | None = None
    """The column of the prompt: read, not learned."""
    completion: str | None = None
    """The column of the completion: learned."""
    messages: str | None = None
    """The column of a chat's messages; the assistant's are learned."""
    tools: Tools | None = None
    """The column of a chat's tools, or a list of tools for rows that have none. Left out, it is the column
    `tools`, where rows have it."""
    date: Day | None = None
    """The date that a chat template writes, where it writes one. Left out, the day of the plan, for all
    attempts of a run."""


class CausalLM(WritingTask):
    """Predict the next token; which tokens are learned depends on the columns that the job names.

    Text: all of them, and the end of the text. Prompt and completion: the completion and its end; the two are
    tokenised apart, so that no token spans the border, and nothing is put between them. Chat: what the
    assistant says, and the end of its turn.
    """

    name = "causal-lm"
    traits = Traits("packed", causal=True, head="every-position", peft_type="CAUSAL_LM")
    Columns = CausalColumns
    column_ways = (("prompt", "completion"), ("messages",), ("text",))
    compared_by = EXACT | OVERLAP
    data: CausalColumns

    def __init__(self, data: CausalColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._first: list[int] = []
        self._end: int | None = None
        self._spaced = False
        self._chat: ChatTemplate | None = None

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        if self.data.text and self.generates:
            reason = "plain text asks nothing: name prompt and completion, or messages, or leave it out"
            yield finding("evaluation.generate", None, reason, "data.text")
        data, kinds = self.data, ("data.text", "data.prompt", "data.completion", "data.messages")
        if (data.prompt is None) != (data.completion is None):
            there, absent = ("prompt", "completion") if data.completion is None else ("completion", "prompt")
            reason = f"prompt and completion go together; name the column for data.{absent}"
            yield finding(f"data.{there}", getattr(data, there), reason, *kinds)
        named = {
            "text": data.text,
            "prompt + completion": data.prompt or data.completion,
            "messages": data.messages,
        }
        ways = [way for way, column in named.items() if column]
        if len(ways) != 1:
            there = f"there are {' and '.join(ways)}" if ways else "there is none"
            yield finding(
                "data",
                None,
                f"causal-lm reads exactly one of text, prompt + completion, or messages; {there}",
                *kinds,
            )
        for key in ("tools", "date") if data.messages is None else ():
            if (value := getattr(data, key)) is not None:
                shown = None if isinstance(value, tuple) else value
                yield finding(
                    f"data.{key}",
                    shown,
                    "belongs to chats: name the column data.messages, or leave it out",
                    *kinds,
                )
        if isinstance(data.text, tuple) and len(data.text) != 1:
            reason = "causal-lm reads one column of text; for two parts name prompt and completion"
            yield finding("data.text", list(data.text), reason, *kinds)

    @property
    def metrics(self) -> Mapping[str, Better]:
        return {**LOSSES, **self.written_metrics}

    @property
    def columns(self) -> tuple[str, ...]:
        if self.data.messages is not None:
            return chat_columns(self.data.messages, self.data.tools)
        if self.data.prompt is not None and self.data.completion is not None:
            completion = IfThere(self.data.completion) if self._answers else self.data.completion
            return (self.data.prompt, completion)
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    def texts(self, row: dict[str, Any]) -> list[str]:
        if (column := self.data.messages) is not None:
            messages = messages_of(row, column, is_answered=not self._answers)
            texts = list(texts_of(messages, tools_of(row, self.data.tools)))
        else:
            texts = [text_of(row, column) for column in required(self.columns)]
        for text in texts:
            check_encodable(text, self.columns[0])
        return texts

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return 1 + (MARKS * num_texts if self.data.messages is not None else 0)

    def left_open(self) -> Iterator[Left]:
        if self.data.messages is not None and self.data.date is None:
            yield Left(
                "date",
                datetime.date.today().isoformat(),
                "the day of the plan, for chat templates that write a date",
            )

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def chance_loss(self, config: Any) -> float | None:
        return math.log(config.get_text_config().vocab_size)

    def prepare(self, processor: Any) -> None:
        """Find the tokens that begin and end a text. Raises ConfigurationError without an end token, or a
        template for chat."""
        self.tokenizer = processor
        if self.data.messages is not None:
            from launcher.tasks.chat.template import ChatTemplate

            self._chat = ChatTemplate(processor, self.data)
            return
        if processor.eos_token_id is None:
            reason = (
                "its tokenizer has no end-of-text token (eos_token), so that the model could not learn "
                "where a text ends"
            )
            raise ConfigurationError(Problem("model.name", processor.name_or_path or None, reason))
        self._end = processor.eos_token_id
        begins = processor.bos_token_id is not None and processor("")["input_ids"][:1] == [
            processor.bos_token_id
        ]
        self._first = [processor.bos_token_id] if begins else []
        self._spaced = self.data.prompt is not None and puts_space_before(processor)

    @property
    def key(self) -> Any:
        chat = self._chat.key if self._chat is not None else None
        return ["references", self.for_prediction, chat] if self.generates else chat

    @property
    def generates(self) -> bool:
        return self.evaluation.generate is not None

    @property
    def _answers(self) -> bool:
        """Whether rows are questions alone."""
        return self.for_prediction and self.generates

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return `input_ids` and `targets`, int32 [n] each, for every row that can be used."""
        written = [self._written(row) for row in rows]
        good = [one for one in written if not isinstance(one, RowProblem)]
        encoded = iter(
            encode_written(processor, good) if self._chat is not None else self._apart(good, processor)
        )
        return [one if isinstance(one, RowProblem) else self._sample(next(encoded)) for one in written]

    def _written(self, row: dict[str, Any]) -> Written | RowProblem:
        """The row's text and what of it is learned."""
        try:
            if self._chat is not None:
                ask = self._chat.question if self._answers else self._chat.written
                written = ask(row, self.columns[0])
                check_encodable(written.text, self.columns[0])
                return written
            if self._answers:
                return Written("".join(self.texts(row)), [])
            *before, last = self.texts(row)
        except RowProblem as problem:
            return problem
        text = "".join((*before, last))
        return Written(text, [(len(text) - len(last), len(text))])

    def _apart(self, written: Sequence[Written], tokenizer: Any) -> list[Tokens]:
        """Between the tokens that begin and end a text: what is read and what is learned, each by itself."""
        assert self._end is not None
        if self._answers:
            asked = tokenise(tokenizer, [one.text for one in written])["input_ids"] if written else []
            questions = [np.array([*self._first, *ids], dtype=np.int32) for ids in asked]
            return [Tokens(ids, np.zeros(len(ids), dtype=bool)) for ids in questions]
        pairs = [(one.text[: one.learned[0][0]], one.text[one.learned[0][0] :]) for one in written]
        flat = tokenise(tokenizer, [text for pair in pairs for text in pair])["input_ids"] if pairs else []
        seconds = continue_texts(tokenizer, pairs) if self._spaced else flat[1::2]
        found = []
        for first, second in zip(flat[::2], seconds, strict=True):
            ids = np.array([*self._first, *first, *second, self._end], dtype=np.int32)
            found.append(Tokens(ids, np.arange(len(ids)) >= len(self._first) + len(first)))
        return found

    def _sample(self, tokens: Tokens | RowProblem) -> Encoded | RowProblem:
        if isinstance(tokens, RowProblem):
            return tokens
        length = len(tokens.ids)
        if length > self.data.max_length and (self.data.too_long != "cut" or self._answers):
            return RowProblem(TOO_LONG, f"{length:,} tokens, and max_length is {self.data.max_length:,}")
        ids, learned = tokens.ids[: self.data.max_length], tokens.learned[: self.data.max_length]
        if length == 0:
            return RowProblem(EMPTY, "no tokens")
        targets = np.full(len(ids), IGNORE, dtype=np.int32)
        targets[:-1] = np.where(learned[1:], ids[1:], IGNORE)
        num_supervised = int(np.count_nonzero(learned[1:]))
        if self._answers:
            return Encoded({"input_ids": ids, "targets": targets, "references": as_bytes([])}, 1, len(ids))
        if num_supervised == 0:
            detail = (
                f"what is not learned fills max_length = {self.data.max_length:,}"
                if length > len(ids)
                else "too few tokens"
            )
            return RowProblem(NOTHING_TO_LEARN, detail)
        arrays = {"input_ids": ids, "targets": targets}
        if self.generates:
            arrays["references"] = as_bytes([self._last_learned(tokens, _asked(arrays))])
        return Encoded(arrays, num_supervised, len(ids), cut=length > len(ids))

    def _last_learned(self, tokens: Tokens, begin: int) -> str:
        """The text that is learned from `begin` on, in one piece, though the sample may be cut before its
        end."""
        unlearned = np.flatnonzero(~tokens.learned[begin:])
        end = begin + int(unlearned[0]) if len(unlearned) else len(tokens.ids)
        return str(self.tokenizer.decode(tokens.ids[begin:end], skip_special_tokens=True)).strip()

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return of each sample what stands before the last that is learned: before the completion, or
        before the assistant's last turn."""
        padding = self.generation.arguments["pad_token_id"]
        asked = [sample["input_ids"][: _asked(sample)] for sample in samples]
        return padded_prompts(asked, samples, padding, on_the_left=True)

    @property
    def end_tokens(self) -> Sequence[int]:
        # A chat's turn ends otherwise than a text may.
        return self._chat.end_ids if self._chat is not None else super().end_tokens

    def example(self, length: int) -> Sample:
        ids = np.zeros(length, dtype=np.int32)
        return Sample({"input_ids": ids, "targets": ids, "references": as_bytes([""])}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the samples end to end, or a row for each, as `token_batches` has them."""
        samples = [sample for item in items for sample in item]
        aside = {"aside": self.aside(samples)} if self.generates else {}
        return (joined(samples) if self.layout == "packed" else padded(samples)) | aside

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        ids, targets = sample["input_ids"], sample["targets"]
        learned = targets[:-1] != IGNORE
        if targets[-1] != IGNORE or not np.array_equal(targets[:-1][learned], ids[1:][learned]):
            raise DataError(
                "a prepared sample's targets are not its next tokens; remove the cache of prepared "
                "data and run again"
            )
        short = super().shortened(sample, length, ends)
        if "references" in sample:
            short["references"] = sample["references"]
        short["targets"] = np.append(short["input_ids"][1:], IGNORE).astype(np.int32)
        return short

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        """Return the tokens, and the same tokens as labels."""
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the supervised tokens."""
        from launcher.training.heads import causal_lm

        return causal_lm(model, batch, self.head)

    def evaluator(self) -> Evaluator:
        return TextEvaluator(self) if self.generates else TokenLosses()

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the answer to each sample where the model writes; else the log-probability of what is
        learned of it, the number of its tokens, and its perplexity."""
        if output.generated is not None:
            return self.texts_of(output)
        assert output.losses is not None
        losses, targets = output.losses.double().cpu().numpy(), batch["targets"].numpy()
        lengths = np.array(batch["lengths"])
        packed, width = self.layout == "packed", batch["input_ids"].shape[1]
        begins = np.cumsum(lengths) - lengths if packed else np.arange(len(lengths)) * width
        found = []
        for begin, end in zip(begins, begins + lengths, strict=True):
            total, num_tokens = float(losses[begin:end].sum()), int((targets[begin:end] != IGNORE).sum())
            perplexity = math.exp(min(total / max(num_tokens, 1), 700.0))
            found.append({"log_probability": -total, "tokens": num_tokens, "perplexity": perplexity})
        return found


def _asked(sample: Mapping[str, np.ndarray]) -> int:
    """The number of tokens before the last piece that is learned; all of them where none is."""
    learned = np.flatnonzero(sample["targets"] != IGNORE) + 1
    if not len(learned):
        return len(sample["input_ids"])
    begins = np.flatnonzero(np.diff(learned) > 1) + 1
    return int(learned[begins[-1] if len(begins) else 0])
