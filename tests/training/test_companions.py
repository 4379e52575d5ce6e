"""A frozen model beside the one that trains: the numbers of plain PyTorch on either engine, and nothing of it in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.companion import Companion
from launcher.tasks.task import Output
from launcher.training import heads
from launcher.training.engines import build
from launcher.training.model import attention
from launcher.training.model.loading import local_part
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.tiny import config_of, model_of
from tests.training.wholes import whole

pytestmark = pytest.mark.distributed
NUM_STEPS, NUM_SAMPLES, LENGTH = 3, 8, 12


class Distilled:
    """Learn the distribution of a teacher's next token at every position."""

    auto_class = AutoModelForCausalLM

    def __init__(self, teacher: Path) -> None:
        self.companions = {"teacher": Companion(str(teacher), "data.teacher", "AutoModelForCausalLM")}

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor], others: Mapping[str, nn.Module]) -> Output:
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        wanted, own = others["teacher"](**inputs).logits, heads.own_forward(model, inputs).logits
        return Output(divergence(wanted, own), torch.zeros(()))


def divergence(wanted: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the summed Kullback-Leibler divergence of logits [samples, length, vocabulary] from those that are wanted."""
    return functional.kl_div(own.float().log_softmax(-1), wanted.float().softmax(-1), reduction="sum")


def tokens(step: int) -> torch.Tensor:
    """Return int64 [NUM_SAMPLES, LENGTH]."""
    return torch.randint(3, 131, (NUM_SAMPLES, LENGTH), generator=torch.Generator().manual_seed(step))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model_of("llama", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model of another family, with dropout, which must not be seen."""
    folder = tmp_path_factory.mktemp("teacher")
    model_of("gpt2", seed=1, n_embd=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(student: Path, teacher: Path) -> dict[str, Any]:
    """Return losses and weights of a loop in plain PyTorch."""
    model, frozen = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, teacher))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    curve = []
    for step in range(NUM_STEPS):
        with torch.no_grad():
            wanted = frozen(input_ids=tokens(step)).logits
        loss = divergence(wanted, model(input_ids=tokens(step)).logits) / NUM_SAMPLES
        loss.backward()
        curve.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return {"curve": curve, "weights": {name: value.detach() for name, value in model.named_parameters()}}


def distil(plan: Plan, teacher: Path) -> dict[str, Any]:
    """Train on this rank's share of the samples; return what came of it, and what this rank holds of the teacher."""
    task: Any = Distilled(teacher)
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine: Any = build(plan, task, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    curve = []
    for step in range(NUM_STEPS):
        batch = {"input_ids": tokens(step)[rank::size]}
        loss = engine.micro_step(batch, 1 / NUM_SAMPLES, True).loss_sum.detach() / NUM_SAMPLES
        torch.distributed.all_reduce(loss)
        curve.append(float(loss))
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-3, 1.0)
    state = engine.state_dict()
    frozen = engine.companions["teacher"]
    held = sum(local_part(parameter).numel() for parameter in frozen.parameters())
    return {
        "curve": curve,
        "weights": {name: whole(state[f"model.{name}"]) for name, _ in engine.model.named_parameters()},
        "names": list(state),
        "held": held,
        "dtypes": {parameter.dtype for parameter in frozen.parameters()},
        "teacher": {name: whole(parameter.detach()) for name, parameter in frozen.named_parameters()},
        "trains": any(parameter.requires_grad for parameter in frozen.parameters()),
    }


def plan(student: Path, num_ranks: int, **changes: Any) -> Plan:
    sizes = {
        "global_batch_size": NUM_SAMPLES,
        "micro_batch_size": NUM_SAMPLES // num_ranks,
        "accumulation_steps": 1,
    }
    batch = sizes | {"data_parallel_size": num_ranks}
    return plan_of(student, num_ranks, attention="eager", batch=batch, **changes)


CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "FSDP": (2, {}),
    "ZeRO-1": (2, deepspeed(1)),
    "ZeRO-3": (2, deepspeed(3)),
}


@pytest.mark.parametrize(
    "name", ["one rank", "FSDP", pytest.param("ZeRO-1", marks=pytest.mark.slow), "ZeRO-3"]
)
def test_a_teacher_gives_the_numbers_of_plain_pytorch(
    name: str, student: Path, teacher: Path, plain: dict[str, Any]
) -> None:
    if "ZeRO" in name:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    num_ranks, changes = CUTS[name]
    results = on_ranks(num_ranks, distil, plan(student, num_ranks, **changes), teacher)
    whole_teacher = dict(AutoModelForCausalLM.from_pretrained(teacher).named_parameters())
    size = sum(parameter.numel() for parameter in whole_teacher.values())
    for result in results:
        torch.testing.assert_close(result["curve"], plain["curve"], rtol=1e-5, atol=0)
        for key, value in plain["weights"].items():
            torch.testing.assert_close(result["weights"][key], value, rtol=0, atol=2e-5)
        assert not result["trains"]
        assert all(torch.equal(result["teacher"][key], value) for key, value in whole_teacher.items()), (
            "it stays as it is"
        )
        assert not [key for key in result["names"] if "transformer." in key or "teacher" in key], (
            "a checkpoint holds nothing of it"
        )
        assert result["held"] <= size / num_ranks * 1.1, "each rank holds its share"


def test_a_teacher_without_weights_for_its_head_is_refused(student: Path, tmp_path: Path) -> None:
    model_of("gpt2").transformer.save_pretrained(tmp_path)
    config_of("gpt2", tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match=r"ConfigurationError.*data\.teacher.*hold no lm_head"):
        on_ranks(1, distil, plan(student, 1), tmp_path)
