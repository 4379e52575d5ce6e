"""Samples packed into one row give what the model itself gives for each of them alone, for every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from launcher.errors import ConfigurationError
from launcher.training import attention, heads
from tests.training.tiny import FAMILIES, MIXTURES, model_of

LENGTHS = (11, 3, 1, 17)


def packed_batch(samples: list[torch.Tensor]) -> dict[str, Any]:
    bounds = torch.tensor([0, *torch.tensor([len(sample) for sample in samples]).cumsum(0).tolist()], dtype=torch.int32)
    targets = [torch.cat([sample[1:], torch.tensor([-100])]) for sample in samples]
    return {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples])[None],
        "targets": torch.cat(targets),
        "cu_seq_lens": bounds,
        "max_length": max(len(sample) for sample in samples),
    }


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 131, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES | MIXTURES))
def test_packed_loss_equals_the_models_own(family: str, implementation: str, samples: list[torch.Tensor]) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("transformers refuses sdpa for Gemma 2")
    model = model_of(family, attn_implementation=attention.register(implementation)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    reference = model_of(family, attn_implementation="eager").eval()
    expected = torch.zeros(())
    for sample in samples:
        logits = reference(input_ids=sample[None], use_cache=False).logits[0]
        if len(sample) > 1:
            expected = expected + functional.cross_entropy(logits[:-1], sample[1:], reduction="sum")
    expected.backward()

    output = heads.causal_lm(model, packed_batch(samples))
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_soft_capped_attention_is_refused(samples: list[torch.Tensor]) -> None:
    model = model_of("gemma2", attn_logit_softcapping=50.0, attn_implementation=attention.register("packed"))
    with pytest.raises(ConfigurationError, match="attention: eager"):
        heads.causal_lm(model, packed_batch(samples))
