"""The plan of an evaluation, in a training run and by itself, against the allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from launcher.planner.evaluation import measured
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.plan import Plan
from launcher.tasks.generation import options_of, padded_prompts
from launcher.tasks.task import Sample
from launcher.training import cpu_half_matmul, generating
from launcher.training.precision import DTYPES
from launcher.training.tracing.make_profile import example_batch, make_profile
from tests.benchmarks.memory_pool import World
from tests.benchmarks.memory_ranks import PHASE, loaded, timeline
from tests.training.plans import deepspeed, plan_of
from tests.training.runs import batch_of, model_directory, tokenizer

pytestmark = pytest.mark.distributed
LENGTH, ROWS = 300, 2
SIZES = {"hidden_size": 256, "intermediate_size": 640, "vocab_size": 4000, "head_dim": 64}
BERT = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4}
CLASSES = {
    "task": "sequence-classification",
    "model__task": "sequence-classification",
    "data__label": "label",
}
CLASSES |= {"layout": "padded", "attention": "sdpa", "head": "forward"}
COLUMNS: dict[str, dict[str, Any]] = {
    "sequence-classification": {"data__label": "label"},
    "token-classification": {"data__text": None, "data__words": "words", "data__tags": "tags"},
    "question-answering": {"data__text": None},
    "sequence-to-sequence": {"data__text": None, "data__source": "source", "data__target": "target"},
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "llama": {"num_key_value_heads": 2},
}
SEQ2SEQ = {"d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "vocab_size": 4000}
SEQ2SEQ |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 640)
SEQ2SEQ |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)


def peaks(plan: Plan, share: float) -> dict[str, int]:
    """Return the peaks of a rank that loads a model, measures two passes and writes, in bytes. share: of the free
    memory, what parameters may take that are gathered whole to write."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        config, task, engine = loaded(plan, trains=False)
        rows = plan.batch.micro_batch_size
        lengths = (LENGTH,) * (rows - 1) + (LENGTH - (plan.layout == "padded"),)
        with record_function(f"{PHASE}evaluating"):
            for _ in range(2):
                engine.evaluate(example_batch(task, config, lengths))
        with record_function(f"{PHASE}generating"):
            if plan.evaluation is not None and plan.evaluation.generate is not None:
                generating.SHARE_FOR_PARAMETERS = share
                engine.model.generation_config.eos_token_id = None  # each text is as long as it may be
                ids = [np.full(length, 5) for length in lengths]
                samples = [Sample({}, number, length) for number, length in enumerate(lengths)]
                prompts = padded_prompts(ids, samples, 0, on_the_left=not config.is_encoder_decoder)
                engine.generate(prompts, options_of(plan.evaluation.generate, tokenizer()))
        with record_function(f"{PHASE}end"):
            pass
    result: dict[str, int] = timeline(profiler)["peaks"]
    return result


@pytest.fixture(scope="module", params=[1, 2])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    ranks = World(request.param)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    classes = "AutoModelForSequenceClassification"
    return {
        "causal-lm": model_directory(folder / "causal", num_hidden_layers=6, **SIZES),
        "classes": model_directory(folder / "classes", "bert", classes, vocab_size=4000, **BERT),
    }


def engines_of(num_ranks: int) -> list[dict[str, Any]]:
    return [{}, deepspeed(3)] if num_ranks > 1 else [{}]


def writes(num_beams: int) -> dict[str, Any]:
    return {"evaluation": {"generate": {"max_new_tokens": 32, "num_beams": num_beams}}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal-lm", "classes"])
def test_measuring_alone_is_predicted(kind: str, world: World, models: dict[str, Path]) -> None:
    """The peak of a model that is measured, and then writes: over by no more than 2% (on two ranks 5%, where messages
    may have arrived), and never under by more than 2%. In fp32 its parameters are gathered whole for beams, in bf16 a
    layer at a time."""
    num_ranks, told = len(world.pipes), []
    for engine in engines_of(num_ranks):
        for precision, num_beams, share in (("fp32", 4, 0.5), ("bf16", 1, 0.0)):
            changes = {"precision": precision, "data__max_length": LENGTH}
            changes |= CLASSES if kind == "classes" else writes(num_beams)
            plan = plan_of(models[kind], num_ranks, batch=batch_of(num_ranks, ROWS), **changes, **engine)
            program = Profiles(starts=True).find(plan)
            assert not isinstance(program, Unknown), program
            alone = plan.model_copy(update={"evaluation": None})
            planned = {"evaluating": measured(alone, program).phase("evaluating").total}
            planned["generating"] = measured(plan, program).phase("evaluating").total
            seen = world.call(peaks, plan, share)
            highest = {"evaluating": max(one["evaluating"] for one in seen)}
            highest["generating"] = max(highest["evaluating"], *(one["generating"] for one in seen))
            for name, number in planned.items():
                told.append((engine.get("engine"), precision, name, round(number / highest[name] - 1, 4)))
    print(*told, sep="\n")
    for *_, share in told:
        assert -0.02 <= share <= (0.02 if num_ranks == 1 else 0.05), told


def without_units(plan: Plan) -> tuple[int, int]:
    """Return the planned and the measured peak of an evaluation, on a processor that multiplies in fp32 alone."""
    with mock.patch.object(cpu_half_matmul, "has_units", return_value=False):
        profile_of = make_profile(plan)
        seen = peaks(plan, 0.0)["evaluating"]
    assert profile_of.untraceable is None and cpu_half_matmul.is_widened(DTYPES[plan.precision])
    return measured(plan, profile_of).phase("evaluating").total, seen


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A rank of its own: products by way of fp32 stay."""
    rank = World(1)
    yield rank
    rank.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "precision"),
    [
        ("bert", "sequence-classification", "bf16"),
        ("bert", "sequence-classification", "fp16"),
        ("roberta", "token-classification", "bf16"),
        ("electra", "question-answering", "bf16"),
        ("bart", "sequence-to-sequence", "bf16"),
        ("deberta-v2", "sequence-classification", "bf16"),
        ("llama", "sequence-classification", "bf16"),
    ],
)
def test_measuring_without_units_for_half_precision_is_predicted(
    family: str, task: str, precision: str, alone: World, tmp_path: Path
) -> None:
    """Within 1%, for encoders and decoders: products and attention by way of fp32, with the mask's copy; of
    DeBERTa what `gather` copies to fp32."""
    sizes = SEQ2SEQ if family == "bart" else BERT | {"vocab_size": 4000} | OF_FAMILY.get(family, {})
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    changes = {"task": task, "model__task": task, "model__weights": "random", "precision": precision}
    changes |= COLUMNS[task] | {"data__max_length": LENGTH, "layout": "padded", "head": "forward"}
    changes |= {"attention": "eager" if family == "deberta-v2" else "sdpa"}
    planned, seen = alone.call(without_units, plan_of(tmp_path, 1, batch=batch_of(1, ROWS), **changes))[0]
    assert planned == pytest.approx(seen, rel=0.01), planned / seen - 1
