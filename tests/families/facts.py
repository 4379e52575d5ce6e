"""What a class of causal language models reads, hides and refuses, whatever the way in which it is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from launcher.training.model.attention import PACKED, packed_attention, register
from tests.families import tiny
from tests.families.layouts import LAYOUTS
from tests.families.numbers import message
from tests.families.own import call

_STATE = re.compile(
    r"Mamba|Mixer|ShortConv|Gated?Delta|Lightning|Recurrent|Rwkv|xLSTM|KimiDelta|DeltaAttention|DeltaNet|Rglru|^Conv1d$"
)
_EYES = re.compile("vision|audio|image")


@dataclass
class Family:
    """The models of one type with equal weights, by attention and precision, and what is right for them."""

    model_type: str
    models: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)

    def model(self, attention: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model with this attention; what refuses to be built says so each time."""
        if (attention, dtype) not in self.models:
            experts = "eager" if dtype == torch.float64 else None  # fused experts know no float64
            model = tiny.model_of(
                self.model_type, tiny.CAUSAL_LM, register(attention), dropout=0.0, experts=experts
            )
            self.models[attention, dtype] = model.train().to(dtype)
        return self.models[attention, dtype]

    def reference_attention(self) -> str:
        """Eager, or fused where the class refuses eager."""
        try:
            self.model("eager")
        except (ValueError, ImportError, NotImplementedError):
            return "sdpa"
        return "eager"


def told_apart(family: Family, ids: list[torch.Tensor]) -> str:
    """What reaches launcher's packed attention of where samples begin: `all`, or what is lost on the way."""
    calls: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("cu_seq_lens_q") is not None)
        return packed_attention(*args, **kwargs)

    try:
        model = family.model("packed")
        AttentionInterface.register(PACKED, spy)
        with torch.no_grad():
            call(model, next(LAYOUTS["packed"](ids)).inputs)
    except Exception as error:
        return message(error)
    finally:
        register("packed")
    return (
        "never called"
        if not calls
        else "all"
        if all(calls)
        else f"cu_seq_lens lost in {calls.count(False)} of {len(calls)} calls"
    )


def facts(family: Family, model: Any, ids: list[torch.Tensor]) -> dict[str, Any]:
    """What the class reads, whether a later token changes earlier ones, and how long a sample may be."""
    sample = ids[2]
    with torch.no_grad():
        plain = logits_of(model, sample)
        other = sample.clone()
        other[-10:] = (other[-10:] - 5 + 31) % (tiny.VOCABULARY - 5) + 5
        causal = _same(logits_of(model, other)[:-10], plain[:-10])
        found: dict[str, Any] = {
            "causal": causal,
            "state": any(
                _STATE.search(type(each).__name__)
                for name, each in model.named_modules()
                if not _EYES.search(name)
            ),
        }
        mask = torch.ones(1, len(sample), dtype=torch.long)
        mask[:, :5] = 0
        positions = 2 * torch.arange(len(sample))[None] % tiny.MAX_POSITIONS
        found["reads_mask"] = _reads(
            lambda: _same(logits_of(model, sample, attention_mask=mask)[10:], plain[10:])
        )
        found["reads_positions"] = _reads(
            lambda: _same(logits_of(model, sample, position_ids=positions), plain)
        )
        found |= _longest(model)
    found["packed_attention"] = told_apart(family, ids)
    if getattr(model.config, "is_decoder", False):
        found["causal_without_is_decoder"] = _causal_encoder(family.model_type, sample, other)
    return found


def _causal_encoder(model_type: str, sample: torch.Tensor, other: torch.Tensor) -> bool | str:
    """Whether the class is causal as a checkpoint of an encoder has it: with is_decoder false."""
    config = tiny.config_of(model_type, tiny.CAUSAL_LM, 0.0)
    config.is_decoder = False
    try:
        model = tiny.model_of(model_type, tiny.CAUSAL_LM, "eager", config=config)
        with torch.no_grad():
            return _same(logits_of(model, other)[:-10], logits_of(model, sample)[:-10])
    except Exception as error:
        return message(error)


def _longest(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    names = [
        *(
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "max_target_positions",
            "model_max_length",
            "context_length",
        )
    ]
    name = next(
        (each for each in names if each in vars(config) or each in (config.attribute_map or {})), None
    )
    if name is None:
        return {"max_position": None, "hard_limit": False}
    try:
        logits_of(model, torch.randint(5, tiny.VOCABULARY, (getattr(config, name) + 16,)))
    except Exception as error:
        return {"max_position": name, "hard_limit": True, "beyond": message(error)}
    return {"max_position": name, "hard_limit": False}


def logits_of(model: Any, sample: torch.Tensor, **more: Any) -> torch.Tensor:
    return call(model, {"input_ids": sample[None], "use_cache": False, **more}).logits[0].float()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() < 1e-4 * right.abs().max())


def _reads(same: Callable[[], bool]) -> bool | str:
    try:
        return not same()
    except Exception as error:
        return message(error)
