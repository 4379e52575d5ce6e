"""ZeRO-3's checkpoints, ours against DeepSpeed's own, on the same state: saving, and going on with another
number of ranks.

    PYTHONPATH=. python tests/benchmarks/bench_zero_checkpoint.py [--write]

Saving, on 2 ranks in alternating rounds: our plain save (hashed while written, synced, verified by its
manifest) against `engine.save_checkpoint`, as it is (what it wrote may still be in memory) and with what it
wrote synced too; and what training loses to our asynchronous save, which is the default, and to theirs: steps
with a save among them, the last of it waited for, less the steps alone. Going on, on 3 ranks: our load (every
byte verified, read, put into the parameters) against DeepSpeed's offline conversion to a universal checkpoint
and its load of that. What both loaded is compared, bit by bit.

Prints JSON and, with --write, writes docs/benchmarks/zero_checkpoint.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _report import conditions, sentence, table, timed, write
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import Plan
from launcher.planner.resolve.zero_buckets import Buckets
from launcher.render.deepspeed import config as deepspeed_config
from launcher.runs.checkpoints import Progress
from launcher.runs.layout import RunDirectory
from launcher.training import heads
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.engines import build
from launcher.training.model import attention
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.tiny import config_of

SAVING, LOADING = 2, 3
_STEPS = 3
"""Around one save, where training is timed."""
_CONVERT = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]


class Causal:
    """As much of a task as an engine needs."""

    auto_class = AutoModelForCausalLM
    loss = staticmethod(heads.causal_lm)


def plan_for(model: Path, world_size: int) -> Plan:
    shape = ModelShape.read(plan_of(model).model)
    sizes, _ = Buckets.of(shape, offloads_to_files=False)
    batch = {
        "global_batch_size": 6,
        "micro_batch_size": 1,
        "accumulation_steps": 6 // world_size,
        "data_parallel_size": world_size,
    }
    return plan_of(model, world_size, batch=batch, **deepspeed(3, zero={"stage": 3, **asdict(sizes)}))


def engine_of(plan: Plan, universal: bool = False) -> Any:
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    more = {"checkpoint": {"load_universal": True}} if universal else {}
    return build(plan, Causal, config, deepspeed_config(plan) | more)  # type: ignore[arg-type]


def step(engine: Any) -> None:
    """One optimizer step, so that moments are not zero."""
    ids = torch.arange(3, 67).unsqueeze(0) + distributed.get_rank()
    batch = {"input_ids": ids, "position_ids": torch.arange(64).unsqueeze(0), "targets": ids[0].roll(-1)}
    batch |= {"cu_seq_lens": torch.tensor([0, 64], dtype=torch.int32), "max_length": 64}
    engine.micro_step(batch, 1 / 64, True)
    engine.squared_gradient_norm()
    engine.optimizer_step(1e-3, 1.0)


def digest(engine: Any) -> dict[str, str]:
    """A hash of this rank's part of each tensor: master, both moments."""
    shards = {name: tensor for name, tensor in engine.state_dict().items() if isinstance(tensor, FlatShard)}
    return {
        name: hashlib.sha256(shard.values().contiguous().numpy().tobytes()).hexdigest()
        for name, shard in shards.items()
    }


def seconds(action: Callable[[], Any]) -> float:
    """Wall seconds until all ranks have done it, with nothing left to write out from before."""
    if distributed.get_rank() == 0:
        os.sync()
    distributed.barrier()
    begin = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - begin


def synced(directory: Path) -> None:
    """Make durable what lies there: each rank its part of the files, then the directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in [*files[distributed.get_rank() :: distributed.get_world_size()], directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_rounds(plan: Plan, scratch: Path, num_rounds: int) -> dict[str, Any]:
    engine = engine_of(plan)
    step(engine)
    saver = Checkpointer(RunDirectory(scratch / "run"), plan, distributed.get_rank(), SAVING)
    found: dict[str, list[float]] = {"ours": [], "deepspeed": [], "deepspeed, synced": []}
    theirs = scratch / "deepspeed"

    def save_ours(number: int) -> None:
        assert saver.save(
            engine.state_dict(), Progress(step=number, samples=number, tokens=number), wait=True
        )

    def save_theirs(sync: bool) -> None:
        engine._engine.save_checkpoint(str(theirs), tag="step")
        if sync:
            synced(theirs)

    def cleared() -> None:
        distributed.barrier()
        if distributed.get_rank() == 0:
            shutil.rmtree(theirs, ignore_errors=True)

    for number in range(num_rounds + 1):  # the first is thrown away: it plans, imports and warms up
        sides: list[tuple[str, Callable[[], Any]]] = [
            ("ours", lambda number=number: save_ours(number + 1)),  # type: ignore[misc]
            ("deepspeed", lambda: save_theirs(False)),
            ("deepspeed, synced", lambda: save_theirs(True)),
        ]
        for name, save in sides[number % 3 :] + sides[: number % 3]:
            cleared()
            value = seconds(save)
            if number:
                found[name].append(value)
    lost: dict[str, list[float]] = {"ours": [], "deepspeed": [], "deepspeed, synced": []}

    def steps(save: Callable[[], Any]) -> None:
        for number in range(_STEPS):
            step(engine)
            if number == 0:
                save()
        saver.finish()

    for number in range(num_rounds + 1):
        progress = Progress(step=1000 + number, samples=1, tokens=1)
        alone = seconds(lambda: steps(lambda: None))
        sides = [
            ("ours", lambda progress=progress: saver.save(engine.state_dict(), progress)),  # type: ignore[misc]
            ("deepspeed", lambda: save_theirs(False)),
            ("deepspeed, synced", lambda: save_theirs(True)),
        ]
        for name, save in sides[number % 3 :] + sides[: number % 3]:
            cleared()
            value = seconds(lambda save=save: steps(save))  # type: ignore[misc]
            if number:
                lost[name].append(value - alone)
    # What is loaded later is the same state on both sides.
    assert saver.save(engine.state_dict(), Progress(step=2000, samples=1, tokens=1), wait=True)
    save_theirs(True)
    return {
        "seconds": found,
        "lost": lost,
        "num_parameters": sum(parameter.ds_numel for parameter in engine.model.parameters()),
    }


def load_ours(plan: Plan, scratch: Path) -> dict[str, Any]:
    engine = engine_of(plan)
    saver = Checkpointer(RunDirectory(scratch / "run"), plan, distributed.get_rank(), LOADING, read_only=True)

    def load() -> None:
        assert saver.load(engine.state_dict()) is not None
        engine.after_load()

    return {"seconds": seconds(load), "digest": digest(engine)}


def load_theirs(plan: Plan, scratch: Path) -> dict[str, Any]:
    engine = engine_of(plan, universal=True)
    taken = seconds(
        lambda: engine._engine.load_checkpoint(
            str(scratch / "universal"), tag="step", load_module_strict=False
        )
    )
    return {"seconds": taken, "digest": digest(engine)}


def resume_rounds(model: Path, scratch: Path, num_rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"ours": [], "start_up": [], "conversion": [], "deepspeed": []}
    plan, variables = plan_for(model, LOADING), {**os.environ, "DS_ACCELERATOR": "cpu"}
    for _ in range(num_rounds):
        ours = on_ranks(LOADING, load_ours, plan, scratch)
        shutil.rmtree(scratch / "universal", ignore_errors=True)
        # The tag's directory stands in the output, and the file that names the latest is the user's to write.
        command = [
            *_CONVERT,
            "--input_folder",
            str(scratch / "deepspeed" / "step"),
            "--output_folder",
            str(scratch / "universal" / "step"),
        ]
        found["start_up"].append(timed([*_CONVERT, "--help"], env=variables))
        found["conversion"].append(timed([*command, "--inject_missing_state"], env=variables))
        (scratch / "universal" / "latest_universal").write_text("step")
        theirs = on_ranks(LOADING, load_theirs, plan, scratch)
        found["ours"].append(max(rank["seconds"] for rank in ours))
        found["deepspeed"].append(max(rank["seconds"] for rank in theirs))
        different = [
            name
            for one, other in zip(ours, theirs, strict=True)
            for name in one["digest"]
            if one["digest"][name] != other["digest"][name]
        ]
    return {
        "seconds": found,
        "tensors_compared": sum(len(rank["digest"]) for rank in ours),
        "different": sorted(set(different)),
    }


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure(scratch: Path, num_layers: int, num_rounds: int) -> dict[str, Any]:
    model = scratch / "model"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    config = config_of("llama", num_hidden_layers=num_layers, initializer_range=0.02, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    (scratch / "run").mkdir()
    saving = on_ranks(SAVING, save_rounds, plan_for(model, SAVING), scratch, num_rounds)[0]
    newest = max((scratch / "run" / "checkpoints").iterdir())
    written = {"ours": size_of(newest), "deepspeed": size_of(scratch / "deepspeed")}
    resuming = resume_rounds(model, scratch, num_rounds)
    return {"saving": saving, "bytes": written, "resuming": resuming}


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def report(result: dict[str, Any], facts: dict[str, Any]) -> str:
    saves, loads = result["saving"]["seconds"], result["resuming"]["seconds"]
    whole = [sum(pair) for pair in zip(loads["conversion"], loads["deepspeed"], strict=True)]
    middle = {name: statistics.median(values) for name, values in saves.items()}
    without = [taken - start for taken, start in zip(whole, loads["start_up"], strict=True)]
    ratio, bare = (
        statistics.median(values) / statistics.median(loads["ours"]) for values in (whole, without)
    )
    saved = [
        (
            "ours: hashed, synced, committed",
            f"{result['bytes']['ours'] / 1e6:.0f} MB",
            summary(saves["ours"]),
            "1.00",
        ),
        (
            "DeepSpeed's `save_checkpoint`, not synced",
            f"{result['bytes']['deepspeed'] / 1e6:.0f} MB",
            summary(saves["deepspeed"]),
        ),
        (
            "the same, then synced",
            f"{result['bytes']['deepspeed'] / 1e6:.0f} MB",
            summary(saves["deepspeed, synced"]),
        ),
    ]
    rows = [
        row if len(row) == 4 else (*row, f"{middle[name] / middle['ours']:.2f}")
        for name, row in zip(saves, saved, strict=True)
    ]
    losses = result["saving"]["lost"]
    training = [(row[0], summary(losses[name])) for name, row in zip(saves, rows, strict=True)]
    training[0] = ("ours, asynchronous as by default", training[0][1])
    resumed = [
        ("ours: every byte verified, read, put into the parameters", summary(loads["ours"])),
        ("DeepSpeed: conversion to a universal checkpoint", summary(loads["conversion"])),
        ("DeepSpeed: load of that", summary(loads["deepspeed"])),
        ("DeepSpeed: both", summary(whole)),
    ]
    different = result["resuming"]["different"]
    equal = "equal to the bit" if not different else f"not all equal: {', '.join(different[:3])}"
    start_up = f"{statistics.median(loads['start_up']):.2f} s"
    return (
        f"{sentence(facts)} Llama of {result['saving']['num_parameters'] / 1e6:.0f} million parameters "
        "in fp32, AdamW, gloo, one thread "
        f"a rank; "
        f"{len(saves['ours'])} alternating rounds; medians, and the least and the most.\n\n"
        f"Saving on {SAVING} ranks, until every rank has "
        f"it:\n\n{table(('', 'written', 'wall time', 'of ours'), rows)}\n"
        f"What {_STEPS} steps with such a save take more than {_STEPS} steps alone, until the save is "
        "whole:\n\n"
        f"{table(('', 'lost'), training)}\n"
        f"Going on with {LOADING} ranks, files in the page cache:\n\n{table(('', 'wall time'), resumed)}\n"
        f"DeepSpeed's way takes {ratio:.1f} times as long, and {bare:.1f} times without the {start_up} "
        "in which the conversion starts "
        f"Python and imports. "
        f"What both loaded, masters and both moments in {result['resuming']['tensors_compared']} "
        f"parts: {equal}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=12, help="of 3.2 million parameters each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/zero_checkpoint.md")
    options = parser.parse_args()
    facts = conditions("torch", "deepspeed")
    scratch = Path(tempfile.mkdtemp())
    try:
        result = measure(scratch, options.layers, options.rounds)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result, indent=1))
    print(report(result, facts))
    if options.write:
        write(
            "zero_checkpoint",
            "Against DeepSpeed's own",
            report(result, facts),
            facts | result,
            "# ZeRO's checkpoints: ours and DeepSpeed's",
        )


if __name__ == "__main__":
    main()
