"""The section `evaluation` of a job file: text generation during an evaluation, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from launcher.lazy import Lazy
from launcher.values import Section

if TYPE_CHECKING:
    import numpy as np

    from launcher.tasks.sample import Sample
else:
    np = Lazy("numpy")


class Generate(Section):
    """Settings of how answers are written, by the names of transformers' GenerationConfig.

    What is left out is as the model's own `generation_config.json` has it, else as transformers does. Two
    keys have values of their own all the same: an evaluation ends, by `max_new_tokens`, and says the same
    twice, as long as `do_sample` is not asked for.
    """

    max_new_tokens: int = Field(default=128, ge=1, le=1_000_000)
    """Tokens of the longest answer."""
    num_beams: int | None = Field(default=None, ge=1, le=1000)
    """Beams of beam search; 1 is greedy. Left out: as the model has it, else 1."""
    length_penalty: float | None = None
    """With beams: above 0 longer answers are favoured, below 0 shorter ones. Left out: as the model has it,
    else 1."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    """The length of word pieces' runs that may stand in an answer only once; 0 allows all. Left out: as the
    model has it, else 0."""
    do_sample: bool = False
    """Draw each token by its probability, in place of taking the likeliest; with one beam."""
    temperature: float | None = Field(default=None, gt=0)
    """When drawing: logits are divided by it. Left out: as the model has it, else 1."""
    top_k: int | None = Field(default=None, ge=0)
    """When drawing: only from the likeliest so many tokens; 0 is all. Left out: as the model has it, else
    50."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """When drawing: only from the likeliest tokens that have this share of the probability together. Left
    out: as the model has it, else 1."""
    seed: int = Field(default=17, ge=0)
    """The seed of what is drawn. The same row draws the same on any number of ranks."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts at which an answer ends; they are not part of it."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate` that are set, which override the model's own."""
        names = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size", "do_sample")
        drawing = ("temperature", "top_k", "top_p") if self.do_sample else ()
        values = {name: getattr(self, name) for name in (*names, *drawing)}
        if self.do_sample:
            values["num_beams"] = 1
        if self.stop_strings:
            values["stop_strings"] = list(self.stop_strings)
        return {name: value for name, value in values.items() if value is not None}


def as_section(value: object) -> object:
    """Return an empty section for `true` and None for `false`; other values unchanged."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class Evaluation(Section):
    """The section `evaluation`: what is done with held-out rows beside computing their loss."""

    samples: int = Field(default=4, ge=0, le=1000)
    """Rows whose answers each evaluation writes to RUN/samples and to the trackers; 0 for none."""
    generate: Annotated[Generate | None, BeforeValidator(as_section)] = None
    """Have the model write an answer to each row, and compare it with what the row has; `true` leaves every
    key out."""
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """How sacrebleu cuts texts into words: `zh` for Chinese, `char` for languages without spaces."""
    scorer: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """A function of your own, as `module:function`. It gets all answers and, for each, the list of its
    references, and returns a number, higher being better; its name is the metric's."""

    @property
    def scorer_name(self) -> str | None:
        """Return the name of the metric that the user's own function computes."""
        return None if self.scorer is None else self.scorer.partition(":")[2]


@dataclass(frozen=True)
class AnswerOptions:
    """Options for what a prediction contains besides the answer itself."""

    probabilities: bool = False
    """Whether to give the probability of every class, if the task has classes."""
    top_k: int | None = None
    """The number of most likely candidates; None for the most likely alone."""


@dataclass(frozen=True)
class GenerationOptions:
    """The arguments of transformers' `generate` that come with every batch of prompts."""

    arguments: Mapping[str, Any]
    """The keyword arguments that do not depend on the batch; `tokenizer` is one of them, for stop strings."""
    drawn: Generate | None = None
    """The sampling settings; None without sampling. A draw depends only on the seed, the row and the
    position."""

    def also(self, **arguments: Any) -> GenerationOptions:
        """Return the options with more arguments."""
        return replace(self, arguments={**self.arguments, **arguments})


def options_of(settings: Generate, tokenizer: Any, end_tokens: Sequence[int] = ()) -> GenerationOptions:
    """Return the settings as keyword arguments of `generate`, which override the model's generation config.

    `end_tokens` end an answer in addition to those of the model's generation config.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    arguments: dict[str, Any] = {
        **settings.arguments,
        "pad_token_id": padding,
        "tokenizer": tokenizer,
        # One answer a row, as a tensor, whatever the model's own settings are.
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        # launcher samples with its own logits processors, so that a draw does not depend on the rest of the
        # batch.
        "do_sample": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
    }
    if end_tokens:
        arguments["eos_token_id"] = sorted(set(end_tokens))
    return GenerationOptions(arguments, settings if settings.do_sample else None)


def padded_prompts(
    prompts: Sequence[np.ndarray], samples: Sequence[Sample], padding: int, on_the_left: bool
) -> dict[str, Any]:
    """Return prompts, int [n] each, as a batch: `input_ids` and `attention_mask` int64 [B, L], and the ids
    and windows of their rows."""
    import torch

    lengths = np.array([len(prompt) for prompt in prompts])
    places = np.arange(lengths.max())
    real = places >= (lengths.max() - lengths)[:, None] if on_the_left else places < lengths[:, None]
    ids = np.full(real.shape, padding, dtype=np.int64)
    ids[real] = np.concatenate(prompts)
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
    }
    return batch | {
        "ids": [sample.id for sample in samples],
        "windows": [getattr(sample, "window", 0) for sample in samples],
    }
