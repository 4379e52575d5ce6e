"""Prefix tuning: peft's own loss on each sample alone, however samples share a pass, and peft's own answers."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from launcher.errors import ConfigurationError
from launcher.job.adapter import PREFIX, Adapter
from launcher.planner.model import model_support
from launcher.tasks.encoding import Tokens
from launcher.tasks.generation import GenerationOptions
from launcher.tasks.task import virtual_ids
from launcher.training import generating
from launcher.training.engines.companions import bind_loss
from launcher.training.engines.recompute import checkpoint_activations
from launcher.training.model import adapters, attention, prefixes, pretrained
from launcher.training.model.loading import repeated_layers
from launcher.training.operations import flops_per_token
from tests.families import tiny
from tests.tiers import slow_but
from tests.training.plans import plan_of
from tests.training.runs import tokenizer
from tests.training.test_prompt_tuning import by_peft, equal, samples_of, task_of

ADAPTER = Adapter(method="prefix-tuning", virtual_tokens=5)
KINDS = ("llama", "gpt2", "gemma3_text", "mistral", "opt", "qwen2", "qwen3", "gemma2", "gpt_neox", "phi3")
KINDS += ("cohere2", "gpt_bigcode", "olmo2", "stablelm", "gpt_oss", "modernbert-decoder")
FAST = ("llama", "gpt2", "gemma3_text")


def config_of(kind: str) -> Any:
    config = tiny.config_of(kind, "causal-lm")
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = 0  # the tokenizer's
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False
    return config


def pair(kind: str, name: str = "causal-lm") -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Our model behind a prefix and peft's with its own sizes, and the prefix by parameter name."""
    experts = "eager" if kind == "gpt_oss" else None  # the other has no kernel for float64
    build = functools.partial(tiny.model_of, kind, name, experts=experts)
    own, theirs = (build(config=copy.deepcopy(config_of(kind))).eval() for _ in range(2))
    adapters.inject(own, ADAPTER, repeated_layers)
    starts = {place: start.to(own.dtype) for place, start in adapters.beginning(own, ADAPTER, 17, tokenizer)}
    for place, start in starts.items():
        path, _, key = place.rpartition(".")
        setattr(own.get_submodule(path), key, torch.nn.Parameter(start.clone()))
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    beside = get_peft_model(theirs, settings).eval()
    beside.prompt_encoder["default"].embedding.weight.data.copy_(torch.cat([*starts.values()], dim=1))
    ours = prefixes.settings(ADAPTER, own)
    for size in ("token_dim", "num_layers", "num_attention_heads"):
        assert getattr(ours, size) == getattr(settings, size)
    return own, beside, starts


def both(kind: str, together: bool, layout: model_support.Way, checkpointing: str = "none") -> Any:
    """Our loss of three samples and peft's, and the gradients of all keys and values."""
    own, beside, starts = pair(kind)
    own.double(), beside.double()
    task = task_of("causal-lm", own.config, layout)
    task.virtual_prefix = True
    own.set_attn_implementation(attention.register(layout.attention))
    for layer in repeated_layers(own):
        checkpoint_activations(layer, checkpointing)
    samples = samples_of(task)
    groups = [samples] if together else [[sample] for sample in samples]
    ours = sum(task.loss(own, task.collate([[one] for one in group])).loss_sum for group in groups)
    expected = torch.stack([by_peft(beside, task, sample) for sample in samples]).sum()
    ours.backward(), expected.backward()
    learned = torch.cat([own.get_parameter(place).grad for place in starts], dim=1)
    return ours, expected, [learned], [beside.prompt_encoder["default"].embedding.weight.grad]


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize("kind", slow_but(FAST, KINDS))
def test_the_loss_and_its_gradient_are_those_of_peft_alone(kind: str, together: bool) -> None:
    """Also in windows, which are shorter than a sample here."""
    way = model_support.support("causal-lm", config_of(kind).to_dict()).ways[0]
    equal(*both(kind, together, way))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize(
    "way",
    [model_support.Way("padded", "sdpa"), model_support.Way("padded", "eager"),
     model_support.Way("packed", "packed"), model_support.Way("padded", "sdpa", "forward")],
    ids="-".join,
)  # fmt: skip
def test_every_layout_and_attention_reads_them_and_layers_may_be_recomputed(
    way: model_support.Way, checkpointing: str
) -> None:
    equal(*both("llama", True, way, checkpointing))


def outputs(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a text behind a prefix, and peft's."""
    own, beside, _ = pair(kind)
    ids = torch.randint(5, 120, (1, 11), generator=torch.Generator().manual_seed(0))
    more = {"use_cache": False} if "use_cache" in inspect.signature(type(own).forward).parameters else {}
    whole = torch.cat([torch.from_numpy(virtual_ids(5)).long()[None], ids], dim=1)
    ours = own(input_ids=whole, attention_mask=torch.ones_like(whole), **more).logits[:, 5:]
    return ours.detach(), beside(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach()


@pytest.mark.slow
def test_every_family_of_the_table_has_the_outputs_of_peft_and_no_other_has() -> None:
    """But for two that read images or sounds too."""
    same = set()
    for kind, entry in model_support.read_table()["causal-lm"].items():
        if "ways" not in entry:
            continue
        try:
            ours, expected = outputs(kind)
        except Exception:  # the classes of fifty families raise whatever they like
            continue
        if float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max()):
            same.add(kind)
    assert same - {"mllama", "moshi"} == model_support.WITH_PREFIX


@pytest.mark.parametrize("num_beams", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", slow_but(FAST, KINDS))
def test_answers_to_prompts_of_a_batch_are_those_of_peft_to_each_alone(kind: str, num_beams: int) -> None:
    """Beyond a window, which drops the prefix from the cache."""
    own, beside, _ = pair(kind)
    way = model_support.support("causal-lm", own.config.to_dict()).ways[0]
    task = task_of("causal-lm", own.config, way)
    task.virtual_prefix = True
    own.set_attn_implementation(attention.register(way.attention))
    bind_loss(own, task, [])
    samples = samples_of(task)
    options = GenerationOptions(
        {
            "max_new_tokens": 9,
            "num_beams": num_beams,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": [2, 3],
        }
    )
    longest = max(len(one["input_ids"]) for one in samples)
    ids, mask = (torch.zeros(len(samples), longest, dtype=torch.long) for _ in range(2))
    for row, one in enumerate(samples):
        ids[row, longest - len(one["input_ids"]) :] = torch.from_numpy(one["input_ids"]).long()
        mask[row, longest - len(one["input_ids"]) :] = 1
    with torch.no_grad():
        batch = {"input_ids": ids, "attention_mask": mask}
        ours = generating.generate(own, batch, options, lambda: False, synced=False)
        for row, one in enumerate(samples):
            words = torch.from_numpy(one["input_ids"]).long()[None, 5:]
            written = beside.generate(input_ids=words, attention_mask=torch.ones_like(words),
                                      max_new_tokens=9, num_beams=num_beams, do_sample=False, pad_token_id=0,
                                      eos_token_id=[2, 3])  # fmt: skip
            new = written[0, words.shape[1] :]
            assert ours[row, : len(new)].tolist() == new.tolist()


def test_no_word_is_learned_from_keys_and_values() -> None:
    """A text without a token that begins it learns its second word first, as in peft."""
    task = task_of("causal-lm", config_of("llama"), model_support.Way("padded", "sdpa"))
    tokens = Tokens(np.array([7, 8, 9], dtype=np.int32), np.array([True, True, True]))
    learned = {}
    for task.virtual_prefix in (False, True):
        sample = task._sample(tokens)  # type: ignore[attr-defined]
        learned[task.virtual_prefix] = sample.arrays["targets"].tolist()
    assert learned[False] == [-100, -100, -100, -100, 7, 8, 9, -100]
    assert learned[True] == [-100, -100, -100, -100, -100, 8, 9, -100]


def test_a_model_with_layers_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"JambaForCausalLM has not one attention in each layer"):
        adapters.inject(tiny.model_of("jamba", "causal-lm"), ADAPTER, repeated_layers)


def test_a_model_that_is_first_seen_on_a_rank_is_refused_there(tmp_path: Path) -> None:
    tiny.config_of("bloom", "causal-lm").save_pretrained(tmp_path)
    plan = plan_of(tmp_path, model__adapter={"method": "prefix-tuning"})
    with pytest.raises(
        ConfigurationError, match=r"a bloom model is not known to read learned keys and values"
    ):
        pretrained.settled(plan)


def test_the_start_is_normal_by_the_seed_alone() -> None:
    _, _, first = pair("llama")
    _, _, again = pair("llama")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(name.endswith(PREFIX) for name in first)
    assert float(torch.cat([*first.values()]).std()) == pytest.approx(1, abs=0.1)


def test_tokens_of_a_text_are_multiplied_with_nothing_of_a_prefix_or_an_encoder() -> None:
    """In the operations of a report as with a frozen model."""
    counts = []
    for adapter in (ADAPTER, Adapter(method="p-tuning", encoder="lstm"), Adapter(method="prompt-tuning")):
        model = tiny.model_of("llama", "causal-lm")
        adapters.inject(model, adapter, repeated_layers)
        adapters.trained(model, adapter, ())
        counts.append(flops_per_token(model, model.config, 100))
    assert len(set(counts)) == 1
