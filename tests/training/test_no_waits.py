"""A micro-step asks no tensor for its value, and its layers compile into one graph each.

Under fake tensors, which have no values, `item()`, `tolist()`, `nonzero()` and `bool()` raise. On a GPU each of
them would have the processor wait for all that was launched.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.resolve.compiling import FAMILIES
from launcher.training import heads
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.model import attention
from launcher.training.model.loading import repeated_layers
from launcher.training.tracing.make_profile import example_batch, prepared_task
from tests.training.batches import batch_of_samples
from tests.training.plans import plan_of
from tests.training.varlen_on_cpu import a_gpus_way

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1,
}  # fmt: skip
LENGTHS = (9, 4, 17)
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "causal-lm": ("llama", {"text": "text"}, {}),
    "causal-lm, its own head": ("llama", {"text": "text"}, {"head": "model"}),
    "sequence-classification": ("bert", {"text": "text", "label": "label"}, {"layout": "padded"}),
    "token-classification": ("bert", {"words": "words", "tags": "tags"}, {"layout": "padded"}),
    "sequence-to-sequence": ("bart", {"source": "source", "target": "target"}, {"layout": "padded"}),
}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("kind", list(TASKS))
def test_a_micro_step_asks_for_no_value(kind: str, recompute: str, tmp_path: Path) -> None:
    family, columns, changes = TASKS[kind]
    name = kind.partition(",")[0]
    plan = plan_of(
        tmp_path, task=name, model__task=name,
        data={"train": {"path": "t"}, "max_length": 32, **columns}, **changes,
    )  # fmt: skip
    implementation = attention.register("packed" if name == "causal-lm" else "sdpa")
    config = AutoConfig.for_model(family, **SMALL, attn_implementation=implementation)
    task = prepared_task(plan, config)
    example, mode = example_batch(task, config, LENGTHS), FakeTensorMode(allow_non_fake_inputs=True)
    with mode, a_gpus_way():
        model = task.auto_class.from_config(config, attn_implementation=implementation).train()
        for layer in repeated_layers(model):
            checkpoint_activations(layer, recompute)
        batch = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in example.items()
        }
        task.loss(model, batch).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in repeated_layers(model)[0].parameters())


CHANGES: dict[str, dict[str, int]] = {
    "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": 5}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8},
}  # fmt: skip
ON_CPU = ("llama", "qwen3", "mistral")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "way"), [(family, "gpu") for family in FAMILIES] + [(family, "cpu") for family in ON_CPU]
)
def test_a_layer_is_one_graph(family: str, way: str) -> None:
    """With fullgraph a break raises; the count says the same. Loss and gradients are those of eager layers."""
    config = AutoConfig.for_model(
        family, **SMALL | CHANGES.get(family, {}), attn_implementation=attention.register("packed")
    )
    model = AutoModelForCausalLM.from_config(config).train()
    generator = torch.Generator().manual_seed(1)
    batch = batch_of_samples([torch.randint(3, 99, (length,), generator=generator) for length in LENGTHS])
    torch._dynamo.reset()
    counters.clear()
    results = []
    with a_gpus_way() if way == "gpu" else contextlib.nullcontext():
        for compiled in (False, True):
            if compiled:
                for layer in repeated_layers(model):
                    layer.compile(backend="aot_eager", fullgraph=True)
            loss = heads.causal_lm(model, batch).loss_sum
            results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(results[1], results[0])
