"""Causal language modelling: plain text, prompt and completion, or chat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Data
from launcher.sources.chats import chat_columns
from launcher.sources.rows import EMPTY, NOTHING_TO_LEARN, TOO_LONG, RowProblem, check_encodable, text_of
from launcher.training.data.dataset import Sample
from launcher.training.tasks.chat import ChatTemplate
from launcher.training.tasks.encoding import Tokens, Written, continue_texts, encode_written, puts_space_before, tokenise
from launcher.training.tasks.task import IGNORE, Encoded, Task


class CausalLM(Task):
    """Predict the next token; which tokens are learned depends on the columns that the job names.

    Text: all of them, and the end of the text. Prompt and completion: the completion and its end; the two are tokenised apart,
    so that no token spans the border, and nothing is put between them. Chat: what the assistant says, and the end of its turn.
    """

    name = "causal-lm"
    layout = "packed"

    def __init__(self, data: Data, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._first: list[int] = []
        self._end: int | None = None
        self._spaced = False
        self._chat: ChatTemplate | None = None

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @property
    def columns(self) -> tuple[str, ...]:
        if self.data.messages is not None:
            return chat_columns(self.data)
        if self.data.prompt is not None and self.data.completion is not None:
            return (self.data.prompt, self.data.completion)
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    def bind(self, tokenizer: Any) -> None:
        """Find the tokens that begin and end a text. Raises ConfigurationError without an end token, or a template for chat."""
        if self.data.messages is not None:
            self._chat = ChatTemplate(tokenizer, self.data)
            return
        if tokenizer.eos_token_id is None:
            reason = "its tokenizer has no end-of-text token (eos_token), so that the model could not learn where a text ends"
            raise ConfigurationError(Problem("model.name", tokenizer.name_or_path or None, reason))
        self._end = tokenizer.eos_token_id
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._first = [tokenizer.bos_token_id] if begins else []
        self._spaced = self.data.prompt is not None and puts_space_before(tokenizer)

    @property
    def key(self) -> Any:
        return self._chat.key if self._chat is not None else None

    def encode_batch(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Encoded | RowProblem]:
        """`input_ids` and `targets`, int32 [n] each, for every row that can be used."""
        written = [self._written(row) for row in rows]
        good = [one for one in written if not isinstance(one, RowProblem)]
        encoded = iter(encode_written(tokenizer, good) if self._chat is not None else self._apart(good, tokenizer))
        return [one if isinstance(one, RowProblem) else self._sample(next(encoded)) for one in written]

    def _written(self, row: dict[str, Any]) -> Written | RowProblem:
        """The row's text and what of it is learned."""
        try:
            if self._chat is not None:
                written = self._chat.written(row, self.columns[0])
            else:
                texts = [text_of(row, column) for column in self.columns]
                written = Written("".join(texts), [(len("".join(texts[:-1])), len("".join(texts)))])
            check_encodable(written.text, self.columns[0])
        except RowProblem as problem:
            return problem
        return written

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
            detail = f"what is not learned fills max_length = {self.data.max_length:,}" if length > len(ids) else "too few tokens"
            return RowProblem(NOTHING_TO_LEARN, detail)
        return Encoded({"input_ids": ids, "targets": targets}, num_supervised, cut=length > len(ids))

    def collate(self, items: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """Packed: all samples end to end, `input_ids` and `position_ids` int64 [1, T], the latter from 0 in every sample, `cu_seq_lens`
        int32 [num_samples + 1], where samples begin and end, and `max_length`, the longest sample. Else one row a sample, padded on the
        right: `input_ids` int64 [B, L] and, where they differ in length, `attention_mask` int64 [B, L].

        Both: `targets` int64 [T] or [B x L], and `lengths` of the samples."""
        samples = [sample for item in items for sample in item]
        lengths = np.array([sample.length for sample in samples], dtype=np.int64)
        if self.layout != "packed":
            return self._padded(samples, lengths)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return {
            "input_ids": torch.from_numpy(np.concatenate([s["input_ids"] for s in samples]).astype(np.int64)).unsqueeze(0),
            "position_ids": torch.from_numpy(positions).unsqueeze(0),
            "targets": torch.from_numpy(np.concatenate([s["targets"] for s in samples]).astype(np.int64)),
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
        targets[real] = np.concatenate([sample["targets"] for sample in samples])
        # Without padding there is nothing to mask, and fused attention has a faster way.
        mask = {} if real.all() else {"attention_mask": torch.from_numpy(real.astype(np.int64))}
        batch = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets.reshape(-1)), "lengths": lengths.tolist()}
        return batch | mask

    def configure(self, config: Any) -> None:
        """A causal language model needs nothing but its own config."""

    def forward(self, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        """Summed loss of the supervised tokens."""
        from launcher.training import heads

        return heads.causal_lm(model, batch, self.head)

    def metrics(self, totals: dict[str, float], predictions: np.ndarray | None, labels: np.ndarray | None) -> dict[str, float]:
        """`loss` and `perplexity` per supervised token, and `accuracy`, the share of them predicted.

        The routers' loss of a mixture of experts is part of `loss`, as it is of transformers' own, and not of `perplexity`.
        """
        num_tokens = max(totals["num_supervised"], 1)
        loss, entropy = totals["loss_sum"] / num_tokens, (totals["loss_sum"] - totals["router_loss_sum"]) / num_tokens
        perplexity = math.exp(entropy) if entropy < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "accuracy": totals["num_correct"] / num_tokens}
