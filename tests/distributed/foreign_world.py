"""Checkpoints that DeepSpeed and Accelerate write, with what they say is in them. Run on gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

LEARNING_RATE = 1e-2


def input_ids(step: int, rank: int) -> torch.Tensor:
    """What a rank sees at a step; shape (2, 12)."""
    return torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(1000 * step + rank))


def deepspeed_writes(
    model_path: Path, out: Path, stage: int, dtype: str = "fp32", frozen: str = "", **zero_options: Any
) -> tuple[dict[str, torch.Tensor], float]:
    """Three steps, `engine.save_checkpoint`, and what DeepSpeed's own functions give; the loss of the fourth step, summed over ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in name))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 100}
        | ({"sub_group_size": 20_000} if stage == 3 else {})
        | zero_options,
        "zero_allow_untested_optimizer": True,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.0},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for step in range(3):
        ids = input_ids(step, rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    if stage < 3:  # DeepSpeed links the moments after the first group's step, when those of the second are not there yet
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    said: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                said[f"model.{name}"] = parameter.detach().float().clone()
            continue
        said[f"model.{name}"] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            said[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    engine.save_checkpoint(str(out))
    ids = input_ids(3, rank)
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=ids).loss.detach().clone()
    torch.distributed.all_reduce(loss)
    return said, loss.item() / torch.distributed.get_world_size()
