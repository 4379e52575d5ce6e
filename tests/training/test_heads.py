"""Samples that share a pass give what the model's own class gives for each of them alone, in every layout and
by every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from launcher.training import heads
from launcher.training.model import attention
from tests.training.batches import batch_of_samples, loss_alone
from tests.training.tiny import FAMILIES, MIXTURES, model_of

LENGTHS = (11, 3, 1, 17)
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 5.0},
    **{family: {"output_router_logits": True, "router_aux_loss_coef": 0.1} for family in MIXTURES},
}


@pytest.fixture
def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 131, (length,), generator=generator) for length in LENGTHS]


def check(
    family: str,
    implementation: str,
    layout: str,
    head: str,
    samples: list[torch.Tensor],
    router: bool = False,
) -> None:
    """Loss and every gradient are the model's own."""
    changes = CHANGES.get(family, {})
    model = model_of(family, attn_implementation=attention.register(implementation), **changes).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    reference = model_of(family, attn_implementation="eager", **changes).eval()
    expected = loss_alone(reference, samples)
    expected.backward()
    output = heads.causal_lm(model, batch_of_samples(samples, layout), head)  # type: ignore[arg-type]
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=0)
    assert (output.router_loss_sum is not None and output.router_loss_sum > 0) == router
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            gradients[name],
            rtol=1e-3,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES | MIXTURES))
def test_packed_loss_equals_the_models_own(
    family: str, implementation: str, samples: list[torch.Tensor]
) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("transformers refuses sdpa for Gemma 2")
    check(family, implementation, "packed", "chunked", samples, family in MIXTURES)


@pytest.mark.parametrize("head", ["chunked", "model", "forward"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral"])
def test_every_head_in_every_layout(family: str, layout: str, head: str, samples: list[torch.Tensor]) -> None:
    check(family, "packed" if layout == "packed" else "eager", layout, head, samples, family in MIXTURES)


@pytest.mark.parametrize(
    ("family", "implementation", "layout", "head"),
    [
        ("gpt_oss", "packed", "packed", "chunked"),
        ("lfm2", "sdpa", "padded", "chunked"),
        ("falcon_h1", "sdpa", "padded", "model"),
        ("stablelm", "sdpa", "padded", "chunked"),
        ("gpt_neo", "eager", "padded", "chunked"),
        ("bloom", "eager", "padded", "chunked"),
    ],
)
def test_what_cannot_be_joined_or_chunked_plainly(
    family: str, implementation: str, layout: str, head: str, samples: list[torch.Tensor]
) -> None:
    check(family, implementation, layout, head, samples)


def test_state_between_tokens_leaks_where_samples_are_joined(samples: list[torch.Tensor]) -> None:
    """The comparison can fail."""
    with pytest.raises(AssertionError, match="not close"):
        check("lfm2", "packed", "packed", "chunked", samples)


def test_a_lost_multiplier_is_another_loss(samples: list[torch.Tensor]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check("falcon_h1", "sdpa", "padded", "chunked", samples)


class WithoutADecoder(PreTrainedModel):
    """As code that came with a model may be: no base_model_prefix, and parts that are plain modules."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.table, self.out = torch.nn.Embedding(131, 8), torch.nn.Linear(8, 131)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        logits = self.out(self.table(input_ids))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return CausalLMOutput(loss=loss, logits=logits)


def test_a_class_without_a_decoder_has_its_forward(samples: list[torch.Tensor]) -> None:
    model, batch = WithoutADecoder(LlamaConfig()), batch_of_samples(samples, "padded")
    torch.testing.assert_close(heads.causal_lm(model, batch, "forward").loss_sum, loss_alone(model, samples))
    with pytest.raises(
        NotImplementedError, match="WithoutADecoder does not say which of its parts is the decoder"
    ):
        heads.causal_lm(model, batch, "model")


def test_sinks_and_soft_caps_beside_a_window() -> None:
    """The scores that are written out see what the fused kernel sees."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads_, 20, 8, generator=generator) for heads_ in (4, 2, 2))
    bounds = torch.tensor([0, 13, 20])
    fused, _ = attention.packed_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, sliding_window=5
    )
    written, _ = attention.packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=bounds,
        sliding_window=5,
        s_aux=torch.full((4,), -1e9),
        softcap=1e4,
    )
    torch.testing.assert_close(written, fused, rtol=1e-4, atol=1e-5)
