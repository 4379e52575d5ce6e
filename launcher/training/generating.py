"""Have a model write texts by transformers' `generate`, sharded or not, on all ranks together.

Where a model's parameters are gathered pass by pass, every rank has to make as many passes as the one that
writes longest: `synced_gpus` sees to that. Where they fit into memory whole they are gathered once, and each
rank writes by itself.
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
"""Called before every pass of the model; a yes ends the writing of this rank, with what is written so far."""
SHARE_FOR_PARAMETERS = 0.5
"""Of the memory that is free when writing begins: as much may become whole parameters. The rest is for keys,
values and logits."""


def generate(
    model: PreTrainedModel, batch: Batch, options: GenerationOptions, each_token: EachToken, synced: bool
) -> torch.Tensor:
    """Return what the model writes to the prompts of `batch`, int64 [B, n], padded behind its end; of a
    causal LM without the prompt.

    `synced`: parameters are gathered in every pass, so that all ranks must make equally many.
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
        torch.compiler.set_stance("force_eager"),
    ):
        # Whisper's own `generate` goes on clip by clip, for longer sounds than it hears: ranks would part.
        written: torch.Tensor = GenerationMixin.generate(model, **prompts, **arguments, synced_gpus=synced)
    # What an encoder-decoder writes begins with what its decoder is told: of most its first token, which may be
    # the one that ends texts.
    told = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    first = prompts[told].shape[1] if told in prompts else 1
    return _padded_behind_ends(written[:, first:], arguments["eos_token_id"] or [], arguments["pad_token_id"])


def fits_whole(num_bytes: int, device: torch.device, ranks_per_node: int) -> bool:
    """Return whether so many bytes fit into the memory of every rank, beside what writing needs. Called by
    all ranks together."""
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
    """The tokens at which an answer ends: the model's own and the task's."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, *options.arguments.get("eos_token_id", ())}) or None


def _padded_behind_ends(written: torch.Tensor, ends: list[int], padding: int) -> torch.Tensor:
    """Beam search fills with end tokens what is behind an end, where the padding token's id is 0."""
    is_end = torch.isin(written, torch.tensor(ends, device=written.device, dtype=written.dtype)).long()
    return written.masked_fill(is_end.cumsum(dim=1) - is_end > 0, padding)


class _Leaving(StoppingCriteria):
    """Ends all rows of a batch once this rank is to leave."""

    leaves = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.leaves, dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _own_forward(model: PreTrainedModel, each_token: EachToken, leaving: _Leaving) -> Iterator[None]:
    """While inside, the model computes as its own class does, in the place of the task's loss, and each pass
    asks `each_token`."""
    task_loss = model.__dict__["forward"]
    own = types.MethodType(model_class_of(model).forward, model)
    routes = getattr(model.config.get_text_config(), "output_router_logits", False)
    # Their loss takes a mask of the tokens that are routed, and not one of those before them too.
    plain = accepted(model_class_of(model), {"output_router_logits": False}) if routes else {}

    @functools.wraps(own)  # `generate` asks for its signature
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
    """While inside, what is written goes behind a prompt's text, also of a class that names the image as what it
    is told (BLIP). Its own `generate` calls parts of the model, which sharding does not gather."""
    if "input_ids" not in prompts or model.main_input_name == "input_ids":
        yield
        return
    model.main_input_name = "input_ids"
    try:
        yield
    finally:
        del model.main_input_name


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """While inside, attention is one that takes masks and a cache: that for packed samples has neither."""
    before = model.config._attn_implementation
    if before != PACKED:
        yield
        return
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # a class that has none
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
"""What decides from which tokens is drawn, in transformers' order: what does it, the value where nobody says one
(`GenerationConfig._get_default_generation_params`), and the one that changes nothing."""


class _Drawn(LogitsProcessor):
    """Turns the likeliest token into one that is drawn, by Gumbel noise on the logits (arXiv 1411.0030).

    The noise of a row hangs on the seed, the row and the position alone, so that the same is drawn on any
    number of ranks.
    """

    def __init__(self, how: Generate, own: Any, rows: list[tuple[int, int]]) -> None:
        """`own`: the model's generation config, for what the job leaves open; where it does too,
        transformers' values are taken."""
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
