"""What the planner says that ranks send each other, held to the collectives that two of them call in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from launcher.planner.memory.formulas import formulas_of
from launcher.planner.model.model_config import read_config
from launcher.planner.plan import Plan
from launcher.planner.speed.collectives import traffic
from launcher.planner.speed.flops import Units
from launcher.render.deepspeed import config as deepspeed_config
from launcher.training import shared_messages
from launcher.training.engines import build
from launcher.training.model import attention
from tests.tiers import slow_but
from tests.training.batches import batch_of_samples as packed_batch
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.test_engine import Causal, _batch

pytestmark = pytest.mark.distributed
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
SMALL = 4096
"""Bytes of a message that is no parameter's and no gradient's: a norm, a flag."""


class Received(TorchDispatchMode):
    """Bytes that a rank receives of others, were every collective a ring: an all-reduce takes two turns of
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, namespace = func._schema.name.split("::")[1], func._schema.name.split("::")[0]
        if namespace == "c10d" and ("gather" in name or "reduce" in name):
            sizes = [
                tensor.nbytes
                for tensor in torch.utils._pytree.tree_leaves(args)
                if isinstance(tensor, torch.Tensor)
            ]
            # A gathering or a scattering has the whole and this rank's part of it; an all-reduce its tensors
            # alone.
            ranks, adds = distributed.get_world_size(), "allreduce" in name
            whole = sum(sizes) if adds else sum(sizes) * ranks / (ranks + 1)
            if whole > SMALL:
                self.num_bytes += (2 if adds else 1) * whole * (1 - 1 / ranks)
        return func(*args, **(kwargs or {}))


def received(plan: Plan) -> float:
    """Bytes of this rank's second step, all of whose messages go through gloo, where they are seen."""
    shared_messages.SHARED_MESSAGE_BYTES = 1 << 60
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = build(plan, Causal(), config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    samples = [torch.arange(3, 40) % 250 for _ in range(plan.batch.micro_batch_size)]
    for _ in range(2):
        counting = Received()
        with counting:
            for index in range(plan.batch.accumulation_steps):
                engine.micro_step(packed_batch(samples), 1.0, index == plan.batch.accumulation_steps - 1)
            engine.squared_gradient_norm()
            engine.optimizer_step(1e-3, 1.0)
    return counting.num_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    AutoConfig.for_model("llama", vocab_size=256, tie_word_embeddings=False, **SIZES).save_pretrained(
        directory
    )
    return directory


CUTS: dict[str, dict[str, Any]] = {
    "FSDP full": {},
    "FSDP gradients": {"sharding": "gradients", "mesh__reshard_after_forward": False},
    "ZeRO-1": deepspeed(1),
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3),
}
FROZEN = {"model__freeze": ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")}


@pytest.mark.parametrize("frozen", slow_but(["whole"], {"whole": False, "frozen": True}))
@pytest.mark.parametrize("passes", slow_but([3], [1, 3]))
@pytest.mark.parametrize("cut", slow_but(["FSDP full", "ZeRO-3"], list(CUTS)))
def test_ranks_send_what_is_foreseen(cut: str, passes: int, frozen: bool, model: Path) -> None:
    if "ZeRO" in cut:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    plan = plan_of(
        model,
        2,
        batch=_batch(2, 6 // passes),
        model__weights="random",
        **CUTS[cut],
        **(FROZEN if frozen else {}),
    )
    foreseen = traffic(plan, units_of(plan)).received
    counted, _ = on_ranks(2, received, plan)
    assert foreseen == pytest.approx(counted, rel=0.01)


def units_of(plan: Plan) -> Units:
    config = read_config(plan.model.name)
    made = config and formulas_of(plan, config)
    assert made
    return made.units()
