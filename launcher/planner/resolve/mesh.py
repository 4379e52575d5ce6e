"""Decide the number of ranks, their devices and their arrangement."""

from __future__ import annotations

from typing import Literal

from launcher.job.cluster import node_range
from launcher.planner.decider import Decider
from launcher.planner.plan import Mesh
from launcher.planner.resolve.batch import divisors, nearest
from launcher.planner.resolve.sharding import Layout, layout

BY_NPROC = "asked for with --nproc"
"""The reason for a number of ranks from the command line."""


def mesh(decider: Decider) -> tuple[Mesh, Layout]:
    """Return the ranks and devices, and the sharding over them."""
    cluster, parallel = decider.job.cluster, decider.job.parallel
    num_gpus = _num_gpus(decider)
    ranks = _ranks(decider, num_gpus)
    cores = cluster.cpus_per_node or decider.hardware.num_cores
    nodes = node_range(cluster.nodes)[1]
    if decider.local and nodes > 1:
        reason = "this command runs on one machine; write 1, or have `launcher submit` hand it to Slurm"
        decider.refuse("cluster.nodes", cluster.nodes, reason)
    if cluster.threads_per_rank == "auto":
        threads = max(1, cores // ranks)
        shared = "; the ranks share cores, and will be slow" if ranks > cores else ""
        over = f"{cores} core{'s' * (cores != 1)} over {ranks} rank{'s' * (ranks != 1)}"
        decider.decide("cluster.threads_per_rank", threads, over + shared)
    else:
        threads = cluster.threads_per_rank
    world = nodes * ranks
    replicate = parallel.replicate
    if world % replicate:
        working = nearest(replicate, divisors(world))
        decider.refuse(
            "parallel.replicate",
            replicate,
            f"{world} ranks cannot be cut into {replicate} equal copies; the nearest that work: {working}",
        )
        replicate = 1
    device: Literal["cpu", "cuda"] = "cuda" if num_gpus else "cpu"
    placed = layout(decider, world, device)
    if placed.sharding == "none" and replicate not in (1, world):
        reason = (
            f"shard: none is a whole copy on each of the {world} ranks; leave replicate out or write {world}"
        )
        decider.refuse("parallel.replicate", replicate, reason)
    replicate = world if placed.sharding == "none" else replicate
    arranged = Mesh(
        nodes=nodes,
        ranks_per_node=ranks,
        world_size=world,
        dp_replicate=replicate,
        dp_shard=world // replicate,
        reshard_after_forward=placed.sharding == "full",
        device=device,
        threads_per_rank=threads,
    )
    return arranged, placed


def _num_gpus(decider: Decider) -> int:
    requested, seen = decider.job.cluster.gpus_per_node, len(decider.hardware.gpus)
    if requested == "auto":
        note = (
            f"{seen} seen: {decider.hardware.gpus[0].name}"
            if seen
            else f"none seen: {decider.hardware.gpu_note or 'CPU'}"
        )
        return decider.decide("cluster.gpus_per_node", seen, note)
    if decider.local and requested > seen:
        why = f" ({decider.hardware.gpu_note})" if decider.hardware.gpu_note else ""
        here = f"write {seen}{'' if seen else ' to train on the CPU'}"
        elsewhere = (
            "to plan for GPUs that are not here, name them: `launcher plan --gpu NAME`, or cluster.gpu"
        )
        decider.refuse(
            "cluster.gpus_per_node", requested, f"{seen} seen on this machine{why}; {here}; {elsewhere}"
        )
    return requested


def _ranks(decider: Decider, num_gpus: int) -> int:
    requested, nproc = decider.job.cluster.ranks_per_node, decider.nproc
    if nproc is not None and nproc < 1:
        decider.refuse("--nproc", nproc, "at least one rank has to work")
        return 1
    if nproc is not None:
        if num_gpus and nproc > num_gpus:
            decider.refuse("--nproc", nproc, f"each rank needs a GPU of its own, and there are {num_gpus}")
        return decider.decide("cluster.ranks_per_node", nproc, BY_NPROC)
    if requested != "auto":
        if num_gpus and requested != num_gpus:
            decider.refuse(
                "cluster.ranks_per_node",
                requested,
                f"each GPU has one rank, and there are {num_gpus}; leave it out",
            )
        return requested
    if num_gpus:
        return decider.decide("cluster.ranks_per_node", num_gpus, "one for each GPU")
    return decider.decide(
        "cluster.ranks_per_node",
        1,
        "on a CPU one rank already uses every core; more only add communication (--nproc N to have them)",
    )
