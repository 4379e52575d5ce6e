"""What the measured models compute: the trainer's own heads, and plain ones where the trainer has no task
yet."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from launcher.tasks.sequence_classification import label_loss
from launcher.tasks.task import Output
from launcher.training import heads
from launcher.training.loss import chunked_cross_entropy


def _ids(length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (length,))


class Causal:
    """Samples one after another in one row."""

    auto_class = AutoModelForCausalLM
    loss = staticmethod(heads.causal_lm)

    @staticmethod
    def batch(request: Any, config: Any) -> dict[str, Any]:
        lengths = torch.tensor(request.lengths)
        ids = [_ids(length, config.vocab_size) for length in request.lengths]
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(length) for length in request.lengths])[None],
            "targets": torch.cat([torch.cat([sample[1:], torch.tensor([-100])]) for sample in ids]),
            "cu_seq_lens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
            "max_length": max(request.lengths),
        }


class Classifying:
    """Samples padded to the longest."""

    auto_class = AutoModelForSequenceClassification

    @staticmethod
    def loss(model: Any, batch: dict[str, Any]) -> Output:
        return label_loss(model, batch, "single-label")

    @staticmethod
    def batch(request: Any, config: Any) -> dict[str, Any]:
        longest = max(request.lengths)
        ids = [
            functional.pad(_ids(length, config.vocab_size), (0, longest - length))
            for length in request.lengths
        ]
        inputs = torch.stack(ids)
        mask = torch.arange(longest) < torch.tensor(request.lengths)[:, None]
        return {
            "input_ids": inputs,
            "attention_mask": mask.long(),
            "labels": torch.randint(0, config.num_labels, (len(ids),)),
            "weights": torch.ones(len(ids)),
        }


class Translating:
    """An encoder-decoder: padded sources, padded targets."""

    auto_class = AutoModelForSeq2SeqLM

    @staticmethod
    def loss(model: Any, batch: dict[str, Any]) -> Output:
        targets = batch.pop("targets")
        hidden = _decoded(model, batch)
        head = model.get_output_embeddings()
        loss = chunked_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten(), bias=head.bias)
        return Output(loss.loss_sum, loss.num_correct)

    @staticmethod
    def batch(request: Any, config: Any) -> dict[str, Any]:
        source = Classifying.batch(request, config)
        longest = max(request.other_lengths)
        targets = torch.full((len(request.other_lengths), longest), -100)
        for row, length in zip(targets, request.other_lengths, strict=True):
            row[:length] = _ids(length, config.vocab_size)
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "decoder_input_ids": targets.clamp(min=0),
            "targets": targets,
        }


def _decoded(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What goes into the output matrix. The class of T5 that has one is no head around another model."""
    if model.base_model is not model:
        hidden: torch.Tensor = model.base_model(use_cache=False, **batch).last_hidden_state
        return hidden
    mask = batch["attention_mask"]
    encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    hidden = model.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return (
        hidden * model.config.d_model**-0.5
        if getattr(model.config, "scale_decoder_outputs", True)
        else hidden
    )


class Seeing:
    """Images of the config's size, classified."""

    auto_class = AutoModelForImageClassification

    @staticmethod
    def loss(model: Any, batch: dict[str, Any]) -> Output:
        return label_loss(model, batch, "single-label")

    @staticmethod
    def batch(request: Any, config: Any) -> dict[str, Any]:
        num = len(request.lengths)
        pixels = torch.randn(num, config.num_channels, config.image_size, config.image_size)
        return {
            "pixel_values": pixels,
            "labels": torch.randint(0, config.num_labels, (num,)),
            "weights": torch.ones(num),
        }


TASKS: dict[str, Any] = {
    "causal": Causal,
    "classifying": Classifying,
    "translating": Translating,
    "seeing": Seeing,
}
