"""Three ranks write what one process writes, whatever the engine, and however unlike their rows are in length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.generation import Generate, GenerationOptions
from launcher.tasks.task import Output
from launcher.training import generating
from launcher.training.engines import build
from launcher.training.heads import own_forward
from tests.training import pairs, tiny
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS = (3, 30, 7, 12, 25, 5)
"""Tokens of the prompts."""
ENDS = list(range(2, 30))
"""So many tokens end an answer that answers differ in length."""
PLAIN: dict[str, Any] = {
    "max_new_tokens": 24,
    "num_beams": 1,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": ENDS,
}
OPTIONS = {
    "greedy": GenerationOptions(PLAIN),
    "beams": GenerationOptions({**PLAIN, "num_beams": 3, "length_penalty": 2.0}),
    "own": GenerationOptions({key: value for key, value in PLAIN.items() if key != "num_beams"}),
    "drawn": GenerationOptions(PLAIN, Generate(do_sample=True, temperature=1.5, top_k=90, top_p=0.99)),
}


class Plain:
    """A task of which the engine asks the loss alone."""

    companions: ClassVar[dict[str, Any]] = {}

    def __init__(self, reads_pairs: bool) -> None:
        self.auto_class = AutoModelForSeq2SeqLM if reads_pairs else AutoModelForCausalLM

    def loss(self, model: Any, batch: Any) -> Output:
        return Output(
            own_forward(model, batch | {"labels": batch["input_ids"], "use_cache": False}).loss,
            torch.zeros(()),
        )


def prompts(rows: range, on_the_left: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(31, 120, (length,), generator=generator) for length in ROWS]
    mine = [texts[row] for row in rows]
    longest = max(map(len, mine))
    room = [(longest - len(text), 0) if on_the_left else (0, longest - len(text)) for text in mine]
    ids, mask = (
        torch.stack([torch.nn.functional.pad(one, by) for one, by in zip(many, room, strict=True)])
        for many in (mine, [torch.ones_like(text) for text in mine])
    )
    return {"input_ids": ids, "attention_mask": mask, "ids": list(rows), "windows": [0] * len(mine)}


def write(plan: Plan, reads_pairs: bool) -> dict[str, Any]:
    """What this rank writes to its rows in every way, between steps of training that it must not change."""
    config = AutoConfig.from_pretrained(plan.model.name, attn_implementation="sdpa")
    ds_config = deepspeed_config(plan) if plan.engine == "deepspeed" else {}
    engine = build(plan, Plain(reads_pairs), config, ds_config)  # type: ignore[arg-type]
    engine.model.generation_config.update(num_beams=3, length_penalty=2.0)
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    batch = prompts(range(rank * 6 // size, (rank + 1) * 6 // size), on_the_left=not reads_pairs)
    found: dict[str, Any] = {"losses": []}
    for share in (0.0, 0.5):
        generating.SHARE_FOR_PARAMETERS = share
        for name, options in OPTIONS.items():
            texts = engine.generate(batch, options).tolist()
            found[f"{name} {share}"] = [[token for token in text if token] for text in texts]
            train = {key: batch[key] for key in ("input_ids", "attention_mask")}
            found["losses"].append(float(engine.evaluate(train).loss_sum))
            engine.micro_step(train, 1.0, True)
            engine.optimizer_step(0.0, 1.0)
    # The first rank's texts end at once, behind a step of training and while the others write on: nobody waits.
    engine.generate(batch, OPTIONS["greedy"].also(max_new_tokens=24 if rank else 1))
    found["losses"].append(float(engine.evaluate(train).loss_sum))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny.model_of("llama", initializer_range=0.6).save_pretrained(folder / "llama")
    pairs.model_directory(folder / "t5", "t5", initializer_factor=3.0, dropout_rate=0.0)
    pairs.model_directory(folder / "bart", "bart", init_std=0.6, dropout=0.0)
    return {name: folder / name for name in ("llama", "t5", "bart")}


def batch_of(size: int) -> dict[str, int]:
    return {
        "global_batch_size": 6,
        "micro_batch_size": 6 // size,
        "accumulation_steps": 1,
        "data_parallel_size": size,
    }


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("t5", {}),
        ("llama", deepspeed(3)),
        pytest.param("bart", deepspeed(3), marks=pytest.mark.very_slow),
        pytest.param(
            "llama",
            {"precision": "fp32", "activation_checkpointing": "selective"},
            marks=pytest.mark.very_slow,
        ),
        pytest.param("t5", deepspeed(2), marks=pytest.mark.very_slow),
    ],
)
def test_three_ranks_write_what_one_writes(
    family: str, engine: dict[str, Any], models: dict[str, Path]
) -> None:
    reads_pairs = family != "llama"
    [alone] = on_ranks(1, write, plan_of(models[family], 1, batch=batch_of(1)), reads_pairs)
    shared = on_ranks(3, write, plan_of(models[family], 3, batch=batch_of(3), **engine), reads_pairs)
    lengths = {len(text) for name in OPTIONS for text in alone[f"{name} 0.5"]}
    assert len(lengths) >= 4, f"rows must end at different lengths to show anything, and end at {lengths}"
    for name in alone.keys() - {"losses"}:
        assert [text for rank in shared for text in rank[name]] == alone[name], name
    assert alone["own 0.5"] == alone["beams 0.5"] != alone["greedy 0.5"], (
        "what is left out is the model's own"
    )
    for rank in shared:
        assert len(set(rank["losses"])) == 1, "training goes on as if nothing had been written"
