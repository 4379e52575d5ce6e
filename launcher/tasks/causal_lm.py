"""Causal language modelling: plain text, prompt and completion, or chat."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import IfThere, RowProblem, check_encodable, text_of
from launcher.errors import DataError
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import causal_columns, roles
from launcher.tasks.causal_columns import CausalColumns
from launcher.tasks.causal_samples import encoded, nothing_left, num_asked
from launcher.tasks.chat.rows import chat_columns, messages_of, texts_of, tools_of
from launcher.tasks.companion import Companion
from launcher.tasks.distillation import TEACHER
from launcher.tasks.encoding import Borders, Tokens, Written, encode_usable, encode_written, too_long
from launcher.tasks.generation import padded_prompts
from launcher.tasks.padding import alone
from launcher.tasks.task import (
    IGNORE,
    AnswerOptions,
    Draws,
    Encoded,
    Finding,
    Left,
    Output,
    Sample,
    Traits,
    finding,
    virtual_ids,
)
from launcher.tasks.text_scores import EXACT, OVERLAP
from launcher.tasks.token_batches import joined, padded
from launcher.tasks.token_losses import likelihood
from launcher.tasks.writing import LOSSES, WritingTask, as_bytes
from launcher.tasks.written_logits import KEY, MATRIX, TEACHER_STATES

if TYPE_CHECKING:
    import numpy as np
    import torch

    from launcher.tasks.chat.template import ChatTemplate
else:
    np = Lazy("numpy")

MARKS = 5
"""Tokens that a chat template puts around a message: in ChatML `<|im_start|>`, the role, two line ends,
`<|im_end|>`."""


class CausalLM(WritingTask):
    """Prediction of the next token; the job's columns decide which tokens are supervised.

    Text: all tokens, and the end of the text. Prompt and completion: the completion and its end; the two are
    tokenised separately, so that no token spans the border, and nothing is put between them. Chat: the
    assistant's messages, and the end of each turn.
    """

    name = "causal-lm"
    traits = Traits(
        "packed", causal=True, head="every-position", peft_type="CAUSAL_LM", prompts=True, prefixes=True
    )
    Columns = CausalColumns
    column_ways = (("prompt", "completion"), ("messages",), ("text",))
    column_roles = roles.OF_CAUSAL_LM
    compared_by = EXACT | OVERLAP
    distils = True
    keeps_losses = True
    data: CausalColumns

    def __init__(self, data: CausalColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._borders: Borders | None = None
        self._chat: ChatTemplate | None = None

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from causal_columns.contradictions(self.data)
        if self.data.text and self.generates:
            reason = "plain text asks nothing: name prompt and completion, or messages, or leave it out"
            yield finding("evaluation.generate", None, reason, "data.text")

    @property
    def companions(self) -> Mapping[str, Companion]:
        if self.distillation is None or self.distillation.logits is None:
            return super().companions
        return {MATRIX: Companion(self.distillation.logits, KEY, only_matrix=True)}

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
            texts = [text_of(row, column) for column in self.required_columns]
        for text in texts:
            check_encodable(text, self.columns[0])
        return texts

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return 1 + self.virtual_tokens + (MARKS * num_texts if self.data.messages is not None else 0)

    def why_too_long(self, tokens: Sequence[int], added: int) -> RowProblem | None:
        # Two texts that are tokenised as one may have a token less, and a chat's template adds what it likes.
        length, limit = sum(tokens) - len(tokens) + 1, self.data.max_length
        if self.data.too_long != "cut":
            return too_long(length, limit, "at least ") if length > limit else None
        # Of a prompt and its completion, what is cut off is the completion.
        return nothing_left(limit) if self.data.prompt is not None and tokens[0] > limit else None

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
        """Find the tokens that begin and end a text. Raises ConfigurationError without an end token, or
        without a chat template for chats."""
        self.tokenizer, self._borders, self._chat = processor, None, None
        if self.data.messages is not None:
            from launcher.tasks.chat.template import ChatTemplate

            self._chat = ChatTemplate(processor, self.data)
            return
        self._borders = Borders.of(processor, has_parts=self.data.prompt is not None)

    @property
    def key(self) -> Any:
        chat = self._chat.key if self._chat is not None else None
        return ["references", self.for_prediction, chat] if self.generates else chat

    @property
    def _answers(self) -> bool:
        """Return whether rows are prompts without an answer."""
        return self.for_prediction and self.generates

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return `input_ids` and `targets`, int32 [n] each, for every row that can be used."""

        def samples(written: list[Written]) -> Iterator[Encoded | RowProblem]:
            if self._chat is not None:
                return map(self._sample, encode_written(processor, written))
            assert self._borders is not None
            tokens = self._borders.asked if self._answers else self._borders.learned
            return map(self._sample, tokens(processor, written))

        return encode_usable(rows, self._written, samples)

    def _written(self, row: dict[str, Any]) -> Written:
        """Return the row's text and its supervised spans."""
        if self._chat is not None:
            ask = self._chat.question if self._answers else self._chat.written
            written = ask(row, self.columns[0])
            check_encodable(written.text, self.columns[0])
            return written
        if self._answers:
            return Written("".join(self.texts(row)), [])
        *before, last = self.texts(row)
        text = "".join((*before, last))
        return Written(text, [(len(text) - len(last), len(text))])

    def _sample(self, tokens: Tokens | RowProblem) -> Encoded | RowProblem:
        if isinstance(tokens, RowProblem):
            return tokens
        if self.virtual_tokens and len(tokens.ids):
            # The first word is learned from the last virtual token, where it is learned at all, as in PEFT; but
            # not from learned keys and values, from which nothing is computed.
            before = virtual_ids(self.virtual_tokens)
            learned = np.concatenate([np.zeros(len(before), dtype=bool), tokens.learned])
            if self.virtual_prefix:
                learned[len(before)] = False
            tokens = Tokens(np.concatenate([before, tokens.ids]), learned)
        return encoded(tokens, self.data, self._answers, self.tokenizer if self.generates else None)

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return each sample up to its last supervised part: the completion, or the assistant's last turn."""
        padding = self.generation.arguments["pad_token_id"]
        prompts = [sample["input_ids"][: num_asked(sample)] for sample in samples]
        return padded_prompts(prompts, samples, padding, on_the_left=True)

    @property
    def end_tokens(self) -> Sequence[int]:
        # A chat's turn may end with another token than a text.
        return self._chat.end_ids if self._chat is not None else super().end_tokens

    def example(self, length: int) -> Sample:
        ids = np.zeros(length, dtype=np.int32)
        return Sample({"input_ids": ids, "targets": ids, "references": as_bytes([""])}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the samples concatenated, or padded to a row each (`token_batches`)."""
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
        following = np.append(short["input_ids"][1:], IGNORE).astype(np.int32)
        short["targets"] = np.where(following < 0, IGNORE, following)  # virtual tokens are not learned
        return short

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        """Return the tokens, and the same tokens as labels."""
        return alone(sample, labels="input_ids")

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any], others: Mapping[str, Any] | None = None
    ) -> Output:
        """Return the summed loss of the supervised tokens; in training mixed with the divergence from a
        teacher, if any."""
        from launcher.training.heads import causal_lm

        if others and self.distillation is not None and model.training:
            from launcher.training.distillation import causal_lm as distilled
            from launcher.training.distillation import from_states

            if TEACHER in others:
                return distilled(model, batch, others[TEACHER], self.distillation)
            if TEACHER_STATES in batch:
                return from_states(model, batch, others[MATRIX], self.distillation)
        return causal_lm(model, batch, self.head)

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the generated answer to each sample; without generation, the log-probability, the number and
        the perplexity of its supervised tokens."""
        if output.generated is not None:
            return self.texts_of(output)
        assert output.losses is not None
        losses, targets = output.losses.double().cpu().numpy(), batch["targets"].numpy()
        lengths = np.array(batch["lengths"])
        begins = np.cumsum(lengths) - lengths
        if self.layout != "packed":
            begins = np.arange(len(lengths)) * batch["input_ids"].shape[1]
        ends = begins + lengths
        return [
            likelihood(losses[begin:end], targets[begin:end]) for begin, end in zip(begins, ends, strict=True)
        ]
