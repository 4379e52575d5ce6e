"""Causal language modelling: plain text, prompt and completion, or chat."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, NOTHING_TO_LEARN, TOO_LONG, RowProblem, check_encodable, text_of
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
from launcher.tasks.task import (
    IGNORE,
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Left,
    Output,
    Sample,
    Task,
    Traits,
    finding,
)
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


class CausalLM(Task):
    """Predict the next token; which tokens are learned depends on the columns that the job names.

    Text: all of them, and the end of the text. Prompt and completion: the completion and its end; the two are
    tokenised apart, so that no token spans the border, and nothing is put between them. Chat: what the
    assistant says, and the end of its turn.
    """

    name = "causal-lm"
    traits = Traits("packed", causal=True, head="every-position", peft_type="CAUSAL_LM")
    Columns = CausalColumns
    column_ways = (("prompt", "completion"), ("messages",), ("text",))
    data: CausalColumns

    def __init__(self, data: CausalColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._first: list[int] = []
        self._end: int | None = None
        self._spaced = False
        self._chat: ChatTemplate | None = None

    def checks(self) -> Iterator[Finding]:
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
        return {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}

    @property
    def columns(self) -> tuple[str, ...]:
        if self.data.messages is not None:
            return chat_columns(self.data.messages, self.data.tools)
        if self.data.prompt is not None and self.data.completion is not None:
            return (self.data.prompt, self.data.completion)
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    def texts(self, row: dict[str, Any]) -> list[str]:
        if (column := self.data.messages) is not None:
            texts = list(texts_of(messages_of(row, column), tools_of(row, self.data.tools)))
        else:
            texts = [text_of(row, column) for column in self.columns]
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
        return self._chat.key if self._chat is not None else None

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
                written = self._chat.written(row, self.columns[0])
                check_encodable(written.text, self.columns[0])
                return written
            *before, last = self.texts(row)
        except RowProblem as problem:
            return problem
        text = "".join((*before, last))
        return Written(text, [(len(text) - len(last), len(text))])

    def _apart(self, written: Sequence[Written], tokenizer: Any) -> list[Tokens]:
        """Between the tokens that begin and end a text: what is read and what is learned, each by itself."""
        assert self._end is not None
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
        if length > self.data.max_length and self.data.too_long != "cut":
            return RowProblem(TOO_LONG, f"{length:,} tokens, and max_length is {self.data.max_length:,}")
        ids, learned = tokens.ids[: self.data.max_length], tokens.learned[: self.data.max_length]
        if length == 0:
            return RowProblem(EMPTY, "no tokens")
        targets = np.full(len(ids), IGNORE, dtype=np.int32)
        targets[:-1] = np.where(learned[1:], ids[1:], IGNORE)
        num_supervised = int(np.count_nonzero(learned[1:]))
        if num_supervised == 0:
            detail = (
                f"what is not learned fills max_length = {self.data.max_length:,}"
                if length > len(ids)
                else "too few tokens"
            )
            return RowProblem(NOTHING_TO_LEARN, detail)
        return Encoded(
            {"input_ids": ids, "targets": targets}, num_supervised, len(ids), cut=length > len(ids)
        )

    def example(self, length: int) -> Sample:
        ids = np.zeros(length, dtype=np.int32)
        return Sample({"input_ids": ids, "targets": ids}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Packed: all samples end to end, `input_ids` and `position_ids` int64 [1, T], the latter from 0 in
        every sample, `cu_seq_lens` int32 [num_samples + 1], where samples begin and end, and `max_length`,
        the longest sample. Else one row a sample, padded on the right: `input_ids` int64 [B, L] and, where
        they differ in length, `attention_mask` int64 [B, L].

        Both: `targets` int64 [T] or [B x L], and `lengths` of the samples."""
        samples = [sample for item in items for sample in item]
        lengths = np.array([sample.length for sample in samples], dtype=np.int64)
        if self.layout != "packed":
            return self._padded(samples, lengths)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return {
            "input_ids": torch.from_numpy(
                np.concatenate([s["input_ids"] for s in samples]).astype(np.int64)
            ).unsqueeze(0),
            "position_ids": torch.from_numpy(positions).unsqueeze(0),
            "targets": torch.from_numpy(
                np.concatenate([_targets(sample) for sample in samples]).astype(np.int64)
            ),
            "cu_seq_lens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            "max_length": int(lengths.max()),
            "lengths": lengths.tolist(),
        }

    def _padded(self, samples: Sequence[Sample], lengths: np.ndarray) -> dict[str, Any]:
        real = np.arange(lengths.max()) < lengths[:, None]
        # Of padding nothing is seen or learned, so that any token will do: the first is in every vocabulary.
        input_ids = np.zeros(real.shape, dtype=np.int64)
        targets = np.full(real.shape, IGNORE, dtype=np.int64)
        input_ids[real] = np.concatenate([sample["input_ids"] for sample in samples])
        targets[real] = np.concatenate([_targets(sample) for sample in samples])
        # Without padding there is nothing to mask, and fused attention has a faster way.
        mask = {} if real.all() else {"attention_mask": torch.from_numpy(real.astype(np.int64))}
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "targets": torch.from_numpy(targets.reshape(-1)),
            "lengths": lengths.tolist(),
        }
        return batch | mask

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        ids, targets = sample["input_ids"], sample["targets"]
        learned = targets[:-1] != IGNORE
        if targets[-1] != IGNORE or not np.array_equal(targets[:-1][learned], ids[1:][learned]):
            raise DataError(
                "a prepared sample's targets are not its next tokens; remove the cache of prepared "
                "data and run again"
            )
        short = super().shortened(sample, length, ends)
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
        return TokenLosses()


def _targets(sample: Sample) -> np.ndarray:
    return sample["targets"] if sample.weight else np.full_like(sample["targets"], IGNORE)


class TokenLosses(Evaluator):
    """`loss` and `perplexity` per supervised token, and `accuracy`, the share of them predicted.

    The routers' loss of a mixture of experts is part of `loss`, as it is of transformers' own, and not of
    `perplexity`.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(4)

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        router = 0.0 if output.router_loss_sum is None else float(output.router_loss_sum)
        num_supervised = int((batch["targets"] != IGNORE).sum())
        self._sums += [float(output.loss_sum), float(output.num_correct), num_supervised, router]

    def state(self) -> list[np.ndarray]:
        return [self._sums]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum, num_correct, num_supervised, router_loss_sum = np.sum(
            [sums for sums, *_ in states], axis=0
        ).tolist()
        num_tokens = max(num_supervised, 1)
        entropy = (loss_sum - router_loss_sum) / num_tokens
        perplexity = math.exp(entropy) if entropy < 700 else math.inf
        return {"loss": loss_sum / num_tokens, "perplexity": perplexity, "accuracy": num_correct / num_tokens}
