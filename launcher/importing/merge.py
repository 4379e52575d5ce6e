"""Several readings as one set of values, and that as a job."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from launcher.errors import Problem
from launcher.importing.files import WINNERS
from launcher.importing.reading import Fact, Reading, Remark

JOB_KEYS = {
    "engine": "parallel.engine",
    "sharding": "parallel.shard",
    "mesh.replicate": "parallel.replicate",
    "zero.secondary_shard": "parallel.secondary_shard",
    "zero.quantized_weights": "parallel.quantized_weights",
    "zero.quantized_gradients": "parallel.quantized_gradients",
    "activation_checkpointing": "memory.activation_checkpointing",
    "offload": "memory.offload",
    "offload_to": "memory.offload_to",
    "evaluate_every": "training.evaluate_every",
}
"""Keys of the plan that stand elsewhere in a job; the others stand where they are, or nowhere (`zero.`, `mesh.`)."""
_PARTS = ("name", "model", "data", "batch", "training", "precision", "memory", "parallel", "checkpoint", "cluster", "trackers")
MODEL, TRAIN = "./FILL-IN-model", "FILL-IN.jsonl"
_BATCH = ("batch.global_batch_size", "batch.micro_batch_size", "batch.accumulation_steps", "mesh.world_size")


@dataclass
class Merged:
    """What all files together say."""

    facts: dict[str, Fact] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def value(self, key: str) -> Any:
        return self.facts[key].value if key in self.facts else None

    def values(self) -> dict[str, Any]:
        """Plan key -> value."""
        return {key: fact.value for key, fact in self.facts.items()}


def merge(readings: list[Reading]) -> Merged:
    """One value for each key; where files differ, the reason why one won. Batch and ranks are made to agree."""
    merged = Merged()
    by_rank = list(WINNERS.values())
    ordered = sorted(readings, key=lambda reading: reading.rank)
    engine = next((fact.value for reading in ordered for fact in reading.facts if fact.key == "engine"), None)
    for reading in ordered:
        merged.remarks += reading.all_remarks()
        merged.problems += reading.problems
        for fact in _of_engine(reading, engine, merged):
            first = merged.facts.setdefault(fact.key, fact)
            if not _same(first.value, fact.value):
                winner = next(other.rank for other in readings if other.source == first.source)
                reason = by_rank[winner] if first.source != fact.source else "it comes first"
                text = f"{first.said} in {first.source} says {first.value}, which won: {reason}"
                merged.remarks.append(Remark("conflict", fact.source, fact.said, fact.value, text))
    _agree(merged)
    return merged


def _of_engine(reading: Reading, engine: str | None, merged: Merged) -> list[Fact]:
    """The facts that still hold: how another engine than the one that won cuts and offloads is of no use."""
    own = {fact.value for fact in reading.facts if fact.key == "engine"}
    if not own or engine in own:
        return reading.facts
    lost = [fact for fact in reading.facts if fact.key in _LAYOUT or fact.key.startswith("zero.")]
    if lost:
        keys, values = ", ".join(fact.said for fact in lost), ", ".join(str(fact.value) for fact in lost)
        text = f"belongs to {', '.join(sorted(own))}, and the engine is {engine}"
        merged.remarks.append(Remark("conflict", reading.source, keys, values, text))
    return [fact for fact in reading.facts if fact not in lost]


_LAYOUT = ("sharding", "mesh.replicate", "offload", "offload_to")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)


def _agree(merged: Merged) -> None:
    """global = micro x accumulation x ranks: what is missing is filled in, what does not fit is said."""
    total, micro, steps, ranks = (merged.value(key) for key in _BATCH)
    if total and micro and not ranks:
        passes = micro * (steps or 1)
        if total % passes:
            fact = merged.facts[_BATCH[0]]
            reason = f"is no multiple of micro-batch x accumulation = {micro} x {steps or 1}; the nearest that is: {_near(total, passes)}"
            merged.problems.append(Problem(f"{fact.source}: {fact.said}", total, reason))
        elif steps:
            _fill(merged, "mesh.world_size", total // passes, f"{total} / ({micro} x {steps})")
    elif micro and ranks and not total:
        _fill(merged, _BATCH[0], micro * (steps or 1) * ranks, f"{micro} x {steps or 1} x {ranks} (micro-batch x accumulation x ranks)")
    elif total and micro and ranks and steps and micro * steps * ranks != total:
        fact = merged.facts[_BATCH[0]]
        product = f"{micro} x {steps} x {ranks} = {micro * steps * ranks}"
        text = f"micro-batch x accumulation x ranks = {product}; {total} won: it decides what is learned"
        merged.remarks.append(Remark("conflict", fact.source, fact.said, total, text))
        if total % (micro * ranks):
            merged.facts.pop("batch.micro_batch_size")
            merged.facts.pop("batch.accumulation_steps")
    elif micro and not total:
        _fill(merged, _BATCH[0], micro * (steps or 1), f"{micro} x {steps or 1} of one rank: multiply it by the number of ranks", "fill in")
    elif steps and not total:
        text = "stays open: neither batch nor ranks are said; write batch.global_batch_size"
        merged.remarks.append(Remark("fill in", merged.facts[_BATCH[2]].source, "gradient_accumulation_steps", steps, text))
    nodes, ranks = merged.value("mesh.nodes") or 1, merged.value("mesh.world_size")
    if ranks and ranks % nodes:
        fact = merged.facts["mesh.world_size"]
        reason = f"does not divide over {nodes} nodes; the nearest that does: {_near(ranks, nodes)}"
        merged.problems.append(Problem(f"{fact.source}: {fact.said}", ranks, reason))


def _near(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _fill(merged: Merged, key: str, value: int, how: str, kind: Any = "changes meaning") -> None:
    said = merged.facts["batch.micro_batch_size"]
    merged.facts[key] = Fact(key, value, said.source, how)
    merged.remarks.append(Remark(kind, said.source, said.said, said.value, f"{JOB_KEYS.get(key, key)} = {value}: {how}"))


def job_content(merged: Merged, sources: list[str]) -> dict[str, Any]:
    """The job file's content; what no file says and every job needs is a placeholder."""
    content: dict[str, Any] = {part: {} for part in _PARTS}
    facts = dict(merged.facts)
    for key in ("batch.accumulation_steps", "mesh.nodes", "mesh.world_size", "mesh.device"):
        facts.pop(key, None)
    if merged.value("offload") in (None, "none"):
        facts.pop("offload_to", None)
    for key, fact in facts.items():
        path = JOB_KEYS.get(key, key)
        if path.startswith(("zero.", "mesh.")) or fact.value == _NOTHING.get(path):
            continue
        *parents, last = path.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = list(fact.value) if isinstance(fact.value, tuple) else fact.value
    content["cluster"] = _cluster(merged)
    name = str(content["name"] or PurePath(sources[0]).stem if sources else "imported")
    content["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "imported"
    content["model"] = {"name": MODEL, **content["model"]}
    content["data"].setdefault("train", {"path": TRAIN})
    return {part: content[part] for part in _PARTS if content[part]}


_NOTHING = {
    "parallel.replicate": 1,
    "parallel.secondary_shard": 1,
    "parallel.quantized_weights": False,
    "parallel.quantized_gradients": False,
}
"""Values that a job says by leaving the key out."""


def _cluster(merged: Merged) -> dict[str, Any]:
    nodes, ranks, device = merged.value("mesh.nodes") or 1, merged.value("mesh.world_size"), merged.value("mesh.device")
    made: dict[str, Any] = {"nodes": nodes} if nodes > 1 else {}
    if device == "cpu":
        made["gpus_per_node"] = 0
    if device == "cuda" and not ranks:
        fact = merged.facts["mesh.device"]
        text = "no file says how many GPUs; write cluster.gpus_per_node, or it is what this machine has"
        merged.remarks.append(Remark("fill in", fact.source, fact.said, fact.value, text))
    if ranks:
        made["ranks_per_node" if device == "cpu" else "gpus_per_node"] = max(1, ranks // nodes)
        if device is None and nodes == 1:
            fact = merged.facts["mesh.world_size"]
            merged.remarks.append(
                Remark(
                    "chosen",
                    fact.source,
                    fact.said,
                    ranks,
                    "taken as GPUs of one node; write cluster.nodes for more, and gpus_per_node: 0 for CPUs",
                )
            )
    return made
