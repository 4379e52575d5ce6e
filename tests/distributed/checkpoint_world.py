"""Small worlds of gloo ranks for the checkpoint tests: each rank a process forked from one that has torch
loaded already."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from launcher.data.section import Source
from launcher.job.schema import Checkpoint, Model, Training
from launcher.planner.plan import BatchPlan, Length, Mesh, Plan
from launcher.runs.checkpoints import Progress
from launcher.runs.layout import RunDirectory
from launcher.tasks.causal_lm import CausalColumns
from launcher.training.checkpoint.checkpointer import Checkpointer
from tests.ports import free_port
from tests.training.ranks import CONTEXT

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed.weight": (13, 6),
    "model.wide.weight": (3, 7),
    "model.norm.weight": (5,),
    "model.tiny.bias": (2,),
    "model.cube": (4, 3, 2),
}


def make_plan(world_size: int, **checkpoint: Any) -> Plan:
    """A plan whose checkpoint section is the given one."""
    return Plan(
        name="test",
        task="causal-lm",
        engine="fsdp",
        sharding="full",
        precision="fp32",
        activation_checkpointing="none",
        attention="sdpa",
        num_data_workers=1,
        trackers=(),
        grace_seconds=30.0,
        length=Length(value=10, unit="steps"),
        batch=BatchPlan(
            global_batch_size=8, micro_batch_size=1, accumulation_steps=1, data_parallel_size=world_size
        ),
        mesh=Mesh(
            nodes=1,
            ranks_per_node=world_size,
            world_size=world_size,
            dp_replicate=1,
            dp_shard=world_size,
            reshard_after_forward=True,
            device="cpu",
            threads_per_rank=1,
        ),
        model=Model(name="tiny"),
        data=CausalColumns(train=Source(path="train.jsonl"), text="text"),
        training=Training(),
        checkpoint=Checkpoint(**checkpoint),
    )


def progress(step: int) -> Progress:
    return Progress(
        step=step, samples=step * 8, tokens=step * 100, extra={"loss_scale": 1024.0, "patience": [step, None]}
    )


def full_tensors(seed: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of this seed holds, whole: the same on every rank and for any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        parameter = name.removeprefix("model.")
        tensors[name] = torch.randn(shape, generator=generator)
        tensors[f"optimizer.{parameter}.exp_avg"] = torch.randn(shape, generator=generator)
        tensors[f"optimizer.{parameter}.step"] = torch.tensor(float(seed))
    tensors["model.replicated"] = torch.randn(6, 5, generator=generator)
    tensors["model.half"] = torch.randn(9, generator=generator).bfloat16()
    tensors["model.count"] = torch.tensor([seed, 2, 3])
    return tensors


def shard_tensors(tensors: dict[str, torch.Tensor], world_size: int) -> dict[str, torch.Tensor]:
    """Cut along the first dimension as FSDP2 does; scalars and counts stay plain, one tensor is a replicated
    DTensor."""
    if world_size == 1:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    mesh = init_device_mesh("cpu", (world_size,))
    sharded: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or name == "model.count":
            sharded[name] = tensor.clone()
        else:
            placement = Replicate() if name == "model.replicated" else Shard(0)
            sharded[name] = distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None)
    return sharded


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, plain."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_holds(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        found = whole(tensor).detach()
        assert found.dtype == expected[name].dtype, name
        assert torch.equal(found, expected[name]), name


def sharded_llama(world_size: int, seed: int) -> dict[str, torch.Tensor]:
    """A tiny Llama under fully_shard after one AdamW step: parameters and optimizer state under their names
    in a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(20).view(1, 20)).logits.square().mean().backward()
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def checkpointer(run: Path, rank: int, world_size: int, **checkpoint: Any) -> Checkpointer:
    return Checkpointer(RunDirectory(run), make_plan(world_size, **checkpoint), rank, world_size).open()


def _rank_main(
    work: Callable[..., Any], rank: int, world_size: int, port: int, arguments: tuple[Any, ...], queue: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = work(rank, world_size, *arguments)
        dist.barrier()
        queue.put((rank, None, result))
        queue.close()
        queue.join_thread()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        queue.close()
        queue.join_thread()
        os._exit(1)
    dist.destroy_process_group()


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any, killed: bool = False) -> list[Any]:
    """`work(rank, world_size, *arguments)` on each rank; what they returned. With `killed` they end
    themselves and return nothing."""
    queue, port = CONTEXT.Queue(), free_port()
    ranks = [
        CONTEXT.Process(target=_rank_main, args=(work, rank, world_size, port, arguments, queue))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(0 if killed else world_size):
            rank, problem, result = queue.get(timeout=600)
            assert problem is None, f"rank {rank}:\n{problem}"
            results[rank] = result
    finally:
        for process in ranks:
            process.join(timeout=60 if killed or len(results) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in sorted(results)]
