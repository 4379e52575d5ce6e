"""Checkpoints that DeepSpeed and Accelerate write, with what they say is in them. Run on gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.engines import build
from launcher.training.model import attention, libraries
from tests.training.batches import batch_of_samples as packed_batch
from tests.training.test_engine import Causal

LEARNING_RATE = 1e-2


def input_ids(step: int, rank: int) -> torch.Tensor:
    """What a rank sees at a step; shape (2, 12)."""
    return torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(1000 * step + rank))


def deepspeed_writes(
    model_path: Path, out: Path, stage: int, frozen: str = "", **config: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three steps, `engine.save_checkpoint`, and what DeepSpeed's own functions give; the losses of two more
    steps, over all ranks.

    Parameters whose name contains `frozen` do not train.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # any processor can, slowly
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in name))
    zero = {"stage": stage, "reduce_bucket_size": 5000, **config.pop("zero", {})}
    common = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2]},
        {"params": [p for p in trained if p.dim() < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={**common, "zero_optimization": zero, **config},
        dist_init_required=False,
    )
    losses = []
    for step in range(5):
        if step == 3:
            engine.save_checkpoint(str(out))
            said = _deepspeed_says(engine, stage)
        ids = input_ids(step, rank)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / torch.distributed.get_world_size())
    return said, losses[3:]


def _deepspeed_says(engine: Any, stage: int) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage < 3 and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the moments after the first group's step, when those of the second are not there
        # yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    said: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                said[f"model.{name}"] = parameter.detach().float().clone()
            continue
        said[f"model.{name}"] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            said[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return said


def accelerate_writes(
    model_path: Path, out: Path, kind: str = "SHARDED_STATE_DICT", version: int = 2
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three steps under FSDP, `save_state`, and what the parameters and the optimizer's state are; two more
    losses."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    import accelerate.state

    libraries._choose_gloo(accelerate.state)
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=kind,
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
        use_orig_params=None if version == 2 else True,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    rank = accelerator.process_index
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(5):
        if step == 3:
            accelerator.save_state(str(out))
            said = _whole_state(model, optimizer.optimizer)
        ids = input_ids(step, rank)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), reduction="mean")))
    return said, losses[3:]


def _whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    said: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        said[f"model.{name}"] = parameter.detach().full_tensor().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            said[f"optimizer.{name}.{key}"] = optimizer.state[parameter][key].full_tensor().clone()
    return said


def goes_on(run: RunDirectory, plan: Plan) -> list[float]:
    """The losses of the same two steps here, over all ranks, after loading what was imported."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = build(plan, Causal, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})  # type: ignore[arg-type]
    rank = torch.distributed.get_rank()
    progress = Checkpointer(run, plan, rank, plan.mesh.world_size).load(engine.state_dict())
    assert progress is not None
    engine.after_load()
    losses = []
    for step in (progress.step, progress.step + 1):
        rows = list(input_ids(step, rank))
        supervised = plan.mesh.world_size * sum(len(row) - 1 for row in rows)
        loss = engine.micro_step(packed_batch(rows), 1 / supervised, True).loss_sum.detach() / supervised
        sums = torch.stack([loss.double(), engine.squared_gradient_norm().double()])
        torch.distributed.all_reduce(sums)
        engine.optimizer_step(LEARNING_RATE, min(1.0, 1.0 / (float(sums[1].sqrt()) + 1e-6)))
        losses.append(float(sums[0]))
    return losses
