"""What is written to a prompt is what the model's own `generate` writes to it alone, whatever shares its pass."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationMixin

from launcher.planner.model.model_support import SEES_PADDING, continues_alone, read_table
from launcher.tasks.generation import GenerationOptions, padded_prompts
from launcher.tasks.task import Sample
from launcher.training import evaluation, exchange, generating
from launcher.training.heads import own_forward
from tests.families import tiny

LENGTHS = (3, 9, 1, 6)
OPTIONS = GenerationOptions(
    {"max_new_tokens": 7, "num_beams": 1, "do_sample": False, "pad_token_id": tiny.PAD}
)
TYPES = [name for name, entry in read_table()[tiny.CAUSAL_LM].items() if "ways" in entry]
UNABLE = {"blt", "xlstm"}  # their own `generate` fails for a tiny model


class Plain:
    """A task with prompts alone."""

    traits, data, generation = SimpleNamespace(causal=True), SimpleNamespace(max_length=9), OPTIONS

    def prompts(self, samples: list[Sample]) -> dict[str, Any]:
        return padded_prompts([one["input_ids"] for one in samples], samples, tiny.PAD, on_the_left=True)


class Engine:
    """One process with a whole model; counts how often it is asked to write."""

    def __init__(self, model_type: str, **changes: Any) -> None:
        config = tiny.config_of(model_type, tiny.CAUSAL_LM, dropout=0.0)
        for name, value in changes.items():
            setattr(config, name, value)
        self.model, self.asked = tiny.model_of(model_type, tiny.CAUSAL_LM, config=config).eval(), 0

    @torch.no_grad()
    def generate(self, prompts: Any, options: GenerationOptions, each_token: Any) -> torch.Tensor:
        self.asked += 1
        forward = functools.partial(own_forward, self.model)
        self.model.forward = forward  # the task's loss, which a model of a run has in its place
        return generating.generate(self.model, prompts, options, each_token, synced=False)


def samples() -> list[Sample]:
    draws = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 40, (length,), generator=draws).numpy() for length in LENGTHS]
    return [Sample({"input_ids": ids}, number, len(ids)) for number, ids in enumerate(texts)]


def check(engine: Engine) -> None:
    given = evaluation.written(cast(Any, engine), cast(Any, Plain()), [samples()], "cpu")
    # transformers' own cannot write where a mixture's routers have a loss.
    plain = (
        {"output_router_logits": False} if getattr(engine.model.config, "output_router_logits", False) else {}
    )
    vars(engine.model).pop("forward")
    for row, sample in zip(given.tolist(), samples(), strict=True):
        ids = torch.from_numpy(sample["input_ids"])[None]
        own = GenerationMixin.generate(
            engine.model, input_ids=ids, attention_mask=torch.ones_like(ids), **plain, **OPTIONS.arguments
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert row == own + [tiny.PAD] * (len(row) - len(own))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "all_gather", lambda value: [value])


@pytest.mark.parametrize("model_type", [*sorted(SEES_PADDING), "llama", "gpt2", "mamba"])
def test_a_prompt_is_answered_as_it_is_alone(model_type: str) -> None:
    engine = Engine(model_type)
    check(engine)
    assert engine.asked == (len(LENGTHS) if model_type in SEES_PADDING else 1)


@pytest.mark.very_slow
@pytest.mark.parametrize("model_type", sorted({*TYPES} - SEES_PADDING - UNABLE))
def test_every_other_type_may_have_padding_before_a_prompt(model_type: str) -> None:
    check(Engine(model_type))


def test_routers_that_have_a_loss_do_not_stop_a_mixture_from_writing() -> None:
    check(Engine("qwen3_moe", output_router_logits=True))


def test_frequencies_that_follow_the_longest_text_are_those_of_each() -> None:
    rope = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 12,
    }
    engine = Engine("llama", rope_parameters=rope, max_position_embeddings=12)
    check(engine)
    assert engine.asked == len(LENGTHS)
    short = {"model_type": "llama", "rope_parameters": rope}
    assert (continues_alone(short, 12), continues_alone(short, 13)) == (False, True)


def test_ranks_write_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "all_gather", lambda value: [value, 6])
    engine = Engine("rwkv")
    check(engine)
    assert engine.asked == 6


def test_a_class_that_came_with_a_model_writes_to_one_at_a_time() -> None:
    model, task = Engine("llama").model, cast(Any, Plain())
    assert not evaluation.writes_alone(model, task)
    own = type("OwnForCausalLM", (type(model),), {"__module__": "modeling_own"})
    model.__class__ = own
    assert evaluation.writes_alone(model, task)
