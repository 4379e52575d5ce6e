"""Facts about speech models: Auto class, keys of a job, frames, and the decoder's prefix."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks.clips import Clips
from launcher.tasks.speech_columns import SpeechColumns

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_MULTILINGUAL = 51_865
"""The smallest vocabulary of a multilingual Whisper, as in OpenAI's own code."""


@functools.cache
def auto_class() -> Any:
    """Return one Auto class for encoder-decoder and CTC models: transformers has one for each."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = OrderedDict(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    names.update(modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES)
    mapping = {"_model_mapping": _LazyAutoMapping(CONFIG_MAPPING_NAMES, names)}
    return type("AutoModelForSpeechRecognition", (_BaseAutoModelClass,), mapping)


def refuse_keys(config: Any, data: SpeechColumns, generate: Any) -> None:
    """Raise ConfigurationError for keys of the other kind of model (encoder-decoder or CTC), and for a
    missing language. `generate`: the job's `evaluation.generate`."""
    decodes = getattr(config, "is_encoder_decoder", False)
    if decodes:
        values: dict[str, Any] = {"data.vocabulary": None if data.vocabulary == "model" else data.vocabulary}
        reason = f"is for CTC, and a {config.model_type} model writes the tokens of its tokenizer"
    else:
        values = {"data.language": data.language, "data.translate": data.translate or None}
        values["evaluation.generate"] = None if generate is None else True
        reason = f"is for a model that writes word by word, and a {config.model_type} model does not"
    for key, value in values.items():
        if value is not None:
            raise ConfigurationError(Problem(key, value, f"{reason}; leave it out"))
    if decodes and data.language is None and config.vocab_size >= _MULTILINGUAL:
        reason = "is missing: a Whisper of many languages is told which, as `en`"
        raise ConfigurationError(Problem("data.language", None, reason))


def num_frames(config: Any, clips: Clips, num_samples: int) -> int:
    """Return the number of CTC frames for a clip of `num_samples`, by the rule of the model's own class."""
    rule = getattr(auto_class()._model_mapping[type(config)], "_get_feat_extract_output_lengths", None)
    if rule is None:
        return num_samples
    if clips.input_name != "input_values":
        features, mask = clips.features(np.zeros(num_samples, dtype=np.float32))
        num_samples = len(features) if mask is None else int(mask.sum())
    return int(rule(SimpleNamespace(config=config), torch.tensor(num_samples)))


def tell(generation: Any, tokenizer: Any, told: Sequence[int], has_language: bool) -> None:
    """Write the tokens after Whisper's first decoder token into a GenerationConfig, so that its own
    `generate` uses the same. The last of `told` is the token for no timestamps."""
    generation.return_timestamps, generation.no_timestamps_token_id = False, told[-1]
    if not has_language:
        return
    generation.is_multilingual, generation.forced_decoder_ids = True, None
    generation.language, generation.task = tokenizer.language, tokenizer.task
    language, task = tokenizer.convert_ids_to_tokens(list(told[:2]))
    generation.lang_to_id = {**(getattr(generation, "lang_to_id", None) or {}), language: told[0]}
    generation.task_to_id = {**(getattr(generation, "task_to_id", None) or {}), task[2:-2]: told[1]}
