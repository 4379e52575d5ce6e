"""A training script that chooses its engine itself, whatever the environment says; it knows nothing of
launcher."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn


def main(kind: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    if kind == "accelerate-zero":
        accelerated(model)
        return
    dist.init_process_group("gloo")
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind != "alone":
        model = fully_sharded(model)
    if kind == "judge":  # another model that judges this one is whole on each rank, and is not trained
        from torch.distributed.fsdp import FullyShardedDataParallel

        FullyShardedDataParallel(nn.Linear(8, 8).requires_grad_(False), device_id=torch.device("cpu"))
    train(model)
    dist.barrier()


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def accelerated(model: nn.Module) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
    }
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(4, 8)).sum())
    optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
