"""Padded rows, the model's own head and routers' losses give one process's numbers on any number of ranks, on
both engines."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.training import heads
from launcher.training.engines import build
from launcher.training.model import attention, pretrained
from tests.tiers import slow_but
from tests.training.batches import batch_of_samples, loss_alone
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import batch_of
from tests.training.tiny import config_of, model_of

pytestmark = pytest.mark.distributed
LENGTHS = (9, 30, 4, 17, 25, 6, 12, 20)
FULL = {"activation_checkpointing": "full"}
CASES: list[tuple[str, dict[str, Any], tuple[str, str, str]]] = [
    ("lfm2", {}, ("padded", "sdpa", "chunked")),
    ("falcon_h1", {}, ("padded", "sdpa", "model")),
    ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1}, ("packed", "packed", "model")),
    ("gemma2", {"final_logit_softcapping": 5.0}, ("padded", "eager", "forward")),
]
ENGINES: dict[str, dict[str, Any]] = {
    "FSDP": {}, "FSDP, recomputed": FULL, "ZeRO-3, recomputed": deepspeed(3, **FULL), "ZeRO-2": deepspeed(2)
}  # fmt: skip


def samples_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(3, 131, (length,), generator=generator) for length in LENGTHS]


def steps(plan: Plan) -> list[list[float]]:
    """Loss and gradient norm of two steps, the samples dealt evenly, two a pass."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )

    class Task:
        auto_class = AutoModelForCausalLM
        companions: ClassVar[dict[str, Any]] = {}
        loss = staticmethod(functools.partial(heads.causal_lm, head=plan.head))

    engine = build(plan, Task(), config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})  # type: ignore[arg-type]
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    curve = []
    for step in range(2):
        mine, supervised = samples_of(step)[rank::size], sum(LENGTHS) - len(LENGTHS)
        loss = torch.zeros((), dtype=torch.float64)
        for begin in range(0, len(mine), 2):
            batch = batch_of_samples(mine[begin : begin + 2], plan.layout)
            loss += engine.micro_step(batch, 1 / supervised, begin + 2 >= len(mine)).loss_sum.detach()
        sums = torch.stack([loss / supervised, engine.squared_gradient_norm()])
        torch.distributed.all_reduce(sums)
        curve.append([float(sums[0]), float(sums[1].sqrt())])
        engine.optimizer_step(1e-3, 1.0)
    return curve


def plain(directory: Path) -> list[list[float]]:
    """The same two steps by transformers alone: every sample in a pass of its own, AdamW over all."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    curve = []
    for step in range(2):
        loss = loss_alone(model, samples_of(step)) / (sum(LENGTHS) - len(LENGTHS))
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
        curve.append([float(loss), float(norm)])
        optimizer.step()
        optimizer.zero_grad()
    return curve


VERY_SLOW = [pytest.mark.slow, pytest.mark.very_slow]
PICKED = [name if name == "ZeRO-3, recomputed" else pytest.param(name, marks=VERY_SLOW) for name in ENGINES]


@pytest.mark.parametrize("engine", PICKED)
@pytest.mark.parametrize(("family", "changes", "way"), slow_but(["lfm2"], {case[0]: case for case in CASES}))
def test_two_ranks_equal_transformers_alone(
    family: str, changes: dict[str, Any], way: tuple[str, str, str], engine: str, tmp_path: Path
) -> None:
    model_of(family, **changes).save_pretrained(tmp_path / "model")
    layout, implementation, head = way
    options = ENGINES[engine] | {
        "layout": layout,
        "attention": implementation,
        "head": head,
        "batch": batch_of(2, 2, 2),
    }
    plan = plan_of(tmp_path / "model", 2, training__clip_norm=0, **options)
    expected = torch.tensor(plain(tmp_path / "model"))
    for curve in on_ranks(2, steps, plan):
        torch.testing.assert_close(torch.tensor(curve), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("bert", {"attention": "flash_attention_2"}, r"model\.name.*is an encoder"),
        ("lfm2", {"data__packing": True}, r"data\.packing = True: samples of a lfm2 model .* write false"),
    ],
)
def test_a_plan_made_without_the_config_is_refused_once_it_is_there(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for each in (family, "llama"):
        config_of(each).save_pretrained(tmp_path / each)
    with pytest.raises(ConfigurationError, match=said):
        pretrained.settled(plan_of(tmp_path / family, **changes))
    assert pretrained.settled(plan_of(tmp_path / "llama", **changes)).layout == "packed"
