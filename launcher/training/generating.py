"""Text generation by transformers' `generate`, with sharded or gathered parameters, on all ranks together.

If parameters are gathered in every forward pass, each rank must make as many passes as the rank with the longest
text: `synced_gpus` ensures this. If the full parameters fit into memory, they are gathered once, and each rank
generates independently.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from torch import distributed
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip

from launcher.errors import ConfigurationError, Problem
from launcher.tasks.generation import Generate, GenerationOptions
from launcher.training.heads import READ
from launcher.training.model.attention import PACKED
from launcher.training.model.forward import SEES, Batch, accepted, model_class_of

EachToken = Callable[[], bool]
"""A callback before every forward pass; True ends this rank's generation and keeps the text so far."""
SHARE_FOR_PARAMETERS = 0.5
"""The share of the memory free before generation that full parameters may take. The rest is for keys, values
and logits."""


def generate(
    model: PreTrainedModel, batch: Batch, options: GenerationOptions, each_token: EachToken, synced: bool
) -> torch.Tensor:
    """Return the tokens generated for the prompts of `batch`, int64 [B, n], padded after the end token. A causal
    LM's prompt is not included.

    `synced`: parameters are gathered in every forward pass, so all ranks must make equally many.
    """
    names = dict.fromkeys((*READ, *SEES, "decoder_input_ids"))
    prompts = {key: batch[key] for key in names if key in batch}
    arguments: dict[str, Any] = {**options.arguments, "eos_token_id": _ends(model, options)}
    if options.drawn is not None:
        rows = list(zip(batch["ids"], batch["windows"], strict=True))
        arguments["logits_processor"] = LogitsProcessorList(
            [_Drawn(options.drawn, model.generation_config, rows)]
        )
    leaving = _Leaving()
    arguments["stopping_criteria"] = StoppingCriteriaList([leaving])
    with (
        _own_forward(model, each_token, leaving),
        _plain_attention(model),
        _goes_on_with_text(model, prompts),
        _penalises_words_alone(model),
        torch.compiler.set_stance("force_eager"),
    ):
        # Not Whisper's own `generate`: it splits long audio into clips, so ranks would make unequal passes.
        written: torch.Tensor = GenerationMixin.generate(model, **prompts, **arguments, synced_gpus=synced)
    # An encoder-decoder's output begins with the decoder's prompt: usually one start token, which may equal the
    # end token.
    told = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    first = prompts[told].shape[1] if told in prompts else 1
    return _padded_behind_ends(written[:, first:], arguments["eos_token_id"] or [], arguments["pad_token_id"])


def fits_whole(num_bytes: int, device: torch.device, ranks_per_node: int) -> bool:
    """Return whether `num_bytes` of parameters fit into the memory of every rank, with room for generation.
    Called by all ranks together."""
    if device.type == "cuda":
        free = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    else:
        free = psutil.virtual_memory().available // ranks_per_node
    fits = torch.tensor(float(num_bytes <= SHARE_FOR_PARAMETERS * free), device=device)
    if distributed.get_world_size() > 1:
        distributed.all_reduce(fits, distributed.ReduceOp.MIN)
    return bool(fits)


def _ends(model: PreTrainedModel, options: GenerationOptions) -> list[int] | None:
    """Return the end tokens: the model's own and the task's."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, *options.arguments.get("eos_token_id", ())}) or None


def _padded_behind_ends(written: torch.Tensor, ends: list[int], padding: int) -> torch.Tensor:
    """Pad after the first end token; beam search repeats end tokens there if the padding token's id is 0."""
    is_end = torch.isin(written, torch.tensor(ends, device=written.device, dtype=written.dtype)).long()
    return written.masked_fill(is_end.cumsum(dim=1) - is_end > 0, padding)


class _Leaving(StoppingCriteria):
    """A stopping criterion that ends all rows of a batch once this rank must leave."""

    leaves = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.leaves, dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _own_forward(model: PreTrainedModel, each_token: EachToken, leaving: _Leaving) -> Iterator[None]:
    """Restore the forward of the model's own class within this context, in place of the task's loss; each pass
    calls `each_token`."""
    task_loss = model.__dict__["forward"]
    own = types.MethodType(model_class_of(model).forward, model)
    routes = getattr(model.config.get_text_config(), "output_router_logits", False)
    # Their loss takes a mask of the tokens that are routed, and not one of those before them too.
    plain = accepted(model_class_of(model), {"output_router_logits": False}) if routes else {}

    @functools.wraps(own)  # `generate` inspects its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaving.leaves = each_token() or leaving.leaves
        return own(*args, **{**kwargs, **plain})

    model.forward = forward
    try:
        yield
    finally:
        model.forward = task_loss


@contextlib.contextmanager
def _goes_on_with_text(model: PreTrainedModel, prompts: Batch) -> Iterator[None]:
    """Make generation continue the prompt's text within this context, even if the class's main input is the
    image (BLIP). BLIP's own `generate` calls submodules directly, which sharding does not gather."""
    if "input_ids" not in prompts or model.main_input_name == "input_ids":
        yield
        return
    model.main_input_name = "input_ids"
    try:
        yield
    finally:
        del model.main_input_name


@contextlib.contextmanager
def _penalises_words_alone(model: PreTrainedModel) -> Iterator[None]:
    """Hide virtual tokens from the repetition penalty within this context: it looks every token's score up, and
    they have none."""
    build = model._get_logits_processor

    @functools.wraps(build)
    def built(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        wrapped = (
            _OfWords(one) if isinstance(one, RepetitionPenaltyLogitsProcessor) else one
            for one in build(*args, **kwargs)
        )
        return LogitsProcessorList(wrapped)

    model._get_logits_processor = built
    try:
        yield
    finally:
        del model._get_logits_processor


class _OfWords(LogitsProcessor):
    """A processor by the set of a row's tokens, which gets a word of the row for each virtual token."""

    def __init__(self, plain: LogitsProcessor) -> None:
        self._plain = plain

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        words = input_ids.where(input_ids >= 0, input_ids.amax(dim=1, keepdim=True))
        return self._plain(words, scores)


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use an attention with masks and a cache within this context: the one for packed samples has neither."""
    before = model.config._attn_implementation
    if before != PACKED:
        yield
        return
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # a class without sdpa
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


_WARPERS: dict[str, tuple[Callable[[Any], LogitsProcessor], float | None, float | None]] = {
    "temperature": (TemperatureLogitsWarper, 1.0, 1.0),
    "top_h": (TopHLogitsWarper, None, None),
    "top_k": (TopKLogitsWarper, 50, 0),
    "top_p": (TopPLogitsWarper, 1.0, 1.0),
    "min_p": (MinPLogitsWarper, 0.0, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0, 0.0),
}
"""Filters of the tokens to sample from, in transformers' order: the class, the default value
(`GenerationConfig._get_default_generation_params`), and the value that has no effect."""


class _Drawn(LogitsProcessor):
    """Sampling by Gumbel noise on the logits, whose maximum is then the sampled token (arXiv 1411.0030).

    The noise depends only on the seed, the row and the position, so any number of ranks samples the same tokens.
    """

    def __init__(self, how: Generate, own: Any, rows: list[tuple[int, int]]) -> None:
        """Choose each setting: the job's, else that of `own` (the model's generation config), else
        transformers' default."""
        self._seed, self._rows, self._position = how.seed, rows, 0
        self._warpers = LogitsProcessorList()
        for name, (warper, usual, neutral) in _WARPERS.items():
            values = (getattr(how, name, None), getattr(own, name, None), usual)
            if (value := next((one for one in values if one is not None), None)) == neutral:
                continue
            try:
                self._warpers.append(warper(value))
            except (TypeError, ValueError) as error:
                reason = f"{name} of the model's generation_config.json: {error}; mend it there"
                raise ConfigurationError(Problem("evaluation.generate", str(value), reason)) from None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self._warpers(input_ids, scores.float())
        of_rows = [
            np.random.default_rng((self._seed, *row, self._position)).gumbel(size=scores.shape[-1])
            for row in self._rows
        ]
        self._position += 1
        return scores + torch.from_numpy(np.stack(of_rows).astype(np.float32)).to(scores.device)
