"""The loss of a model that predicts a character or a blank at every frame (CTC; Graves et al. 2006)."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.tasks.task import IGNORE, Output
from launcher.training.model.forward import Batch, own_forward


def ctc(model: PreTrainedModel, batch: Batch) -> Output:
    """Return the summed loss of a collated micro-batch. Each sample's loss is that of the model's own class
    for the sample alone.

    `input_values` or `input_features` [B, longest, ...]; `attention_mask` [B, longest], if clips differ in
    length; `labels` [B, longest text], padded with -100; `weights` [B], 0 for padding samples. `generated` is
    the likeliest token of each frame, int64 [B, frames], padded with the blank.

    Raises NotImplementedError for a model class without a rule for the number of frames.
    """
    names = ("input_values", "input_features")
    inputs = {name: batch[name] for name in (*names, "attention_mask") if name in batch}
    logits = own_forward(model, inputs).logits
    frames = frames_of(model, inputs)
    losses = _losses(model, logits.float().log_softmax(dim=-1).transpose(0, 1), frames, batch["labels"])
    loss_sum = (losses * batch["weights"]).sum()
    num_correct = loss_sum.new_zeros(())
    if torch.is_grad_enabled():
        return Output(loss_sum, num_correct)
    behind = torch.arange(logits.shape[1], device=logits.device) >= frames[:, None]
    likeliest = logits.argmax(dim=-1).masked_fill(behind, model.config.pad_token_id)
    return Output(loss_sum, num_correct, generated=likeliest)


def frames_of(model: PreTrainedModel, inputs: Batch) -> torch.Tensor:
    """Return the number of frames of each clip, int64 [B], by the rule of the model's own class."""
    if (rule := getattr(model, "_get_feat_extract_output_lengths", None)) is None:
        raise NotImplementedError(f"{type(model).__name__} does not say how many frames a clip has")
    heard = next(value for name, value in inputs.items() if name != "attention_mask")
    mask = inputs.get("attention_mask")
    if mask is None:
        return rule(torch.full((len(heard),), heard.shape[1], device=heard.device)).long()
    return rule(mask.sum(dim=-1)).long()


def _losses(
    model: PreTrainedModel, log_probabilities: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each sample, fp32 [B], of log-probabilities [frames, B, characters]."""
    learned = labels != IGNORE
    sizes = learned.sum(dim=-1)
    if isinstance(log_probabilities, FakeTensor):
        # A trace has no lengths. CTC keeps the probabilities of the paths at every frame for backward.
        num_frames, num_samples, _ = log_probabilities.shape
        paths = log_probabilities.new_empty(num_samples, num_frames, 2 * labels.shape[1] + 1)
        return (log_probabilities.sum(dim=-1).T[:, :, None] * paths).sum(dim=(1, 2))
    config = model.config
    with torch.backends.cudnn.flags(enabled=False):  # as in transformers
        losses: torch.Tensor = functional.ctc_loss(
            log_probabilities,
            labels[learned],
            frames,
            sizes,
            blank=config.pad_token_id,
            reduction="none",
            zero_infinity=config.ctc_zero_infinity,
        )
    return losses / sizes.clamp_min(1) if config.ctc_loss_reduction == "mean" else losses
