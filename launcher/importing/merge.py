"""The merging of several readings into one set of values, and its conversion into a job."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from launcher.errors import Problem
from launcher.importing import mixture
from launcher.importing.defaults import differs
from launcher.importing.foreign_files import WINNERS
from launcher.importing.reading import Fact, Kind, Reading, Remark

JOB_KEYS = {
    "engine": "parallel.engine",
    "sharding": "parallel.shard",
    "mesh.dp_replicate": "parallel.replicate",
    "zero.secondary_shard": "parallel.secondary_shard",
    "zero.quantized_weights": "parallel.quantized_weights",
    "zero.quantized_gradients": "parallel.quantized_gradients",
    "activation_checkpointing": "memory.activation_checkpointing",
    "offload": "memory.offload",
    "offload_to": "memory.offload_to",
    "evaluate_every": "training.evaluate_every",
}
"""Keys of the plan that have another name in a job; the others have the same name, or none (`zero.`,
`mesh.`)."""
_PARTS = (
    "name", "model", "data", "evaluation", "batch", "training", "precision", "memory", "parallel",
    "checkpoint", "cluster", "trackers", "tracking",
)  # fmt: skip
MODEL, TRAIN = "./FILL-IN-model", "FILL-IN.jsonl"
_BATCH = ("batch.global_batch_size", "batch.micro_batch_size", "batch.accumulation_steps", "mesh.world_size")


@dataclass
class Merged:
    """The merged facts, remarks and problems of all files."""

    facts: dict[str, Fact] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def remark(self, kind: Kind, fact: Fact, text: str) -> None:
        self.remarks.append(Remark(kind, fact.source, fact.said, fact.value, text))

    def refuse(self, fact: Fact, reason: str) -> None:
        self.problems.append(Problem(f"{fact.source}: {fact.said}", fact.value, reason))

    def value(self, key: str) -> Any:
        return self.facts[key].value if key in self.facts else None

    def values(self) -> dict[str, Any]:
        """Return the values that files set explicitly, by plan key."""
        return {key: fact.value for key, fact in self.facts.items() if not fact.is_default}


def merge(readings: list[Reading]) -> Merged:
    """Choose one value per key; if files differ, remark why one won. Batch and ranks are made consistent."""
    merged = Merged()
    by_rank, ranks = list(WINNERS.values()), {reading.source: reading.rank for reading in readings}
    ordered = sorted(readings, key=lambda reading: reading.rank)
    engine = next((fact.value for reading in ordered for fact in reading.facts if fact.key == "engine"), None)
    defaults: list[tuple[Reading, Fact]] = []
    for reading in ordered:
        merged.remarks += reading.all_remarks()
        merged.problems += reading.problems
        for fact in _of_engine(reading, engine, merged):
            if fact.is_default:
                defaults.append((reading, fact))
                continue
            first = merged.facts.setdefault(fact.key, fact)
            if not _same(first.value, fact.value):
                winner = ranks[first.source]
                reason = by_rank[winner] if winner != reading.rank else "it comes first"
                text = f"{first.said} in {first.source} says {first.value}, which won: {reason}"
                merged.remark("conflict", fact, text)
    # DeepSpeed's schedule sets when the rate has fallen, not when the run ends.
    fall = merged.facts.get("training.max_steps")
    if fall is not None and fall.said.startswith("scheduler.") and "training.epochs" in merged.facts:
        del merged.facts["training.max_steps"]
        text = "launcher's schedule ends with the run, whose epochs are said; taken: the epochs"
        merged.remark("cannot be said", fall, text)
    moments = merged.facts.get("training.moments")
    if moments is not None and (engine == "deepspeed" or merged.value("offload") not in (None, "none")):
        del merged.facts["training.moments"]
        text = "launcher has moments in 8 bits under FSDP alone, without offloading; taken: in fp32"
        merged.remark("cannot be said", moments, text)
    is_open = any(reading.lacks_engine for reading in readings)
    _take_defaults(
        [pair for pair in defaults if not is_open or pair[1].key not in ("precision", "training.clip_norm")],
        merged,
    )
    _agree(merged, set().union(*(reading.unknown for reading in readings)))
    return merged


def _take_defaults(defaults: list[tuple[Reading, Fact]], merged: Merged) -> None:
    """Fill in keys that no file sets with the tools' defaults: those of the Trainer and similar tools before the
    engines'.

    With DeepSpeed its own clipping counts: neither Accelerate nor the Trainer clips then (transformers 5.23,
    accelerate 1.15).
    """
    keys = set(merged.facts)
    for _, fact in sorted(defaults, key=lambda pair: _ENGINES_LAST[pair[0].rank]):
        if fact.key == "training.clip_norm" and fact.said == "gradient_clipping":
            first = merged.facts.get(fact.key)
            if first is not None and not _same(first.value, fact.value):
                text = (
                    f"{fact.source} leaves gradient_clipping out: DeepSpeed then clips at {fact.value}, "
                    "whatever is said here"
                )
                merged.remark("conflict", first, text)
            merged.facts[fact.key] = fact
        elif _OTHERWISE.get(fact.key) not in keys:
            merged.facts.setdefault(fact.key, fact)
    tools = {reading.source: reading.tool for reading, _ in defaults}
    for source, tool in tools.items():
        left_out = (fact for fact in merged.facts.values() if fact.is_default and fact.source == source)
        if own := [fact for fact in left_out if differs(fact)]:
            names, values = ", ".join(fact.said for fact in own), ", ".join(str(fact.value) for fact in own)
            text = (
                f"left out there: what {tool} then takes, written out since launcher's own defaults are "
                "others"
            )
            merged.remarks.append(Remark("default", source, names, values, text))


_OTHERWISE = {
    "batch.micro_batch_size": "batch.global_batch_size",
    "batch.accumulation_steps": "batch.global_batch_size",
    "training.epochs": "training.max_steps",
}
"""Keys whose default is ignored if the second key is set."""
_ENGINES_LAST = {0: 0, 1: 2, 2: 1, 3: 3}
"""The precedence of defaults: a command line and the Trainer's arguments before DeepSpeed's and Accelerate's
files."""


def _of_engine(reading: Reading, engine: str | None, merged: Merged) -> list[Fact]:
    """Return the facts that still apply: sharding and offloading of an engine that was not chosen do not."""
    own = {fact.value for fact in reading.facts if fact.key == "engine"}
    if not own or engine in own:
        return reading.facts
    lost = [fact for fact in reading.facts if fact.key in _LAYOUT or fact.key.startswith("zero.")]
    if lost:
        keys, values = ", ".join(fact.said for fact in lost), ", ".join(str(fact.value) for fact in lost)
        text = f"belongs to {', '.join(sorted(own))}, and the engine is {engine}"
        merged.remarks.append(Remark("conflict", reading.source, keys, values, text))
    return [fact for fact in reading.facts if fact not in lost]


_LAYOUT = ("sharding", "mesh.dp_replicate", "offload", "offload_to")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)


def _agree(merged: Merged, unknown: set[str]) -> None:
    """Make global = micro x accumulation x ranks hold: missing values are filled in, contradictions reported.

    Numbers that only the shell knows are `unknown`, and nothing is derived from them.
    """
    _count_ranks(merged)
    # If only the shell knows one of these numbers, the batch cannot be derived from a micro-batch.
    needed = ["gradient_accumulation_steps", "per_device_train_batch_size"]
    needed += [] if "mesh.nodes" in merged.facts else ["num_machines", "nnodes", "num_nodes"]
    of_shell = [name for name in needed if name in unknown]
    total, micro, steps, ranks = (merged.value(key) for key in _BATCH)
    if total and micro and not ranks:
        passes = micro * (steps or 1)
        if total % passes:
            fact = merged.facts[_BATCH[0]]
            reason = (
                f"is no multiple of micro-batch x accumulation = {micro} x {steps or 1}; the nearest that "
                f"is: {_near(total, passes)}"
            )
            merged.refuse(fact, reason)
        elif steps:
            _fill(merged, "mesh.world_size", total // passes, f"{total} / ({micro} x {steps})")
    elif micro and not total and of_shell:
        text = "the shell's: batch.global_batch_size stays open, write it. It is micro-batch x accumulation "
        text += "x ranks"
        source = merged.facts[_BATCH[1]].source
        merged.remarks.append(Remark("fill in", source, _BATCH[0], ", ".join(of_shell), text))
    elif micro and ranks and not total:
        how = f"{micro} x {steps or 1} x {ranks} (micro-batch x accumulation x ranks)"
        _fill(merged, _BATCH[0], micro * (steps or 1) * ranks, how)
    elif total and micro and ranks and steps and micro * steps * ranks != total:
        fact = merged.facts[_BATCH[0]]
        product = f"{micro} x {steps} x {ranks} = {micro * steps * ranks}"
        text = f"micro-batch x accumulation x ranks = {product}; {total} won: it decides what is learned"
        merged.remark("conflict", fact, text)
        if total % (micro * ranks):
            merged.facts.pop("batch.micro_batch_size")
            merged.facts.pop("batch.accumulation_steps")
    elif micro and not total:
        how = f"{micro} x {steps or 1} of one rank: multiply it by the number of ranks"
        _fill(merged, _BATCH[0], micro * (steps or 1), how, "fill in")
    elif steps and not total:
        text = "stays open: neither batch nor ranks are said; write batch.global_batch_size"
        merged.remarks.append(
            Remark("fill in", merged.facts[_BATCH[2]].source, "gradient_accumulation_steps", steps, text)
        )
    nodes, ranks = merged.value("mesh.nodes") or 1, merged.value("mesh.world_size")
    if ranks and ranks % nodes:
        fact = merged.facts["mesh.world_size"]
        reason = f"does not divide over {nodes} nodes; the nearest that does: {_near(ranks, nodes)}"
        merged.refuse(fact, reason)


def _count_ranks(merged: Merged) -> None:
    """Record the number of ranks on all nodes, if a file gives those of one."""
    each = merged.facts.get("mesh.ranks_per_node")
    if each is None:
        return
    nodes = merged.value("mesh.nodes") or 1
    total = merged.facts.setdefault(
        "mesh.world_size", Fact("mesh.world_size", each.value * nodes, each.source, each.said)
    )
    if total.value != each.value * nodes:
        text = (
            f"{total.said} in {total.source} says {total.value} ranks, which won; {each.value} on each of "
            f"{nodes} nodes would be others"
        )
        merged.remark("conflict", each, text)


def _near(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _fill(merged: Merged, key: str, value: int, how: str, kind: Any = "changes meaning") -> None:
    first = merged.facts["batch.micro_batch_size"]
    merged.facts[key] = Fact(key, value, first.source, how)
    merged.remarks.append(
        Remark(kind, first.source, first.said, first.value, f"{JOB_KEYS.get(key, key)} = {value}: {how}")
    )


def job_content(merged: Merged, sources: list[str]) -> dict[str, Any]:
    """Return the job file's content, with placeholders for required keys that no file sets."""
    content: dict[str, Any] = {part: {} for part in _PARTS}
    facts = dict(merged.facts)
    for key in ("batch.accumulation_steps", *(key for key in merged.facts if key in _MESH)):
        facts.pop(key, None)
    if merged.value("offload") in (None, "none"):
        facts.pop("offload_to", None)
    for key, fact in facts.items():
        path = JOB_KEYS.get(key, key)
        if path.startswith(("zero.", "mesh.")) or fact.value == _NOTHING.get(path):
            continue
        if fact.is_default and not differs(fact) and not path.startswith("model.adapter."):
            continue
        *parents, last = path.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = list(fact.value) if isinstance(fact.value, tuple) else fact.value
    content["cluster"] = {**_cluster(merged), **content["cluster"]}
    name = str(content["name"] or PurePath(sources[0]).stem if sources else "imported")
    content["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "imported"
    content["model"] = {"name": MODEL, **content["model"]}
    train = content["data"].setdefault("train", {})
    if not train.keys() & {"path", "name", "sources"}:
        train["path"] = TRAIN
    merged.remarks += mixture.as_lists(content["data"], merged.facts)
    return {part: content[part] for part in _PARTS if content[part]}


_MESH = ("mesh.nodes", "mesh.world_size", "mesh.ranks_per_node", "mesh.device")
_NOTHING = {
    "parallel.replicate": 1,
    "parallel.secondary_shard": 1,
    "parallel.quantized_weights": False,
    "parallel.quantized_gradients": False,
}
"""Values that a job expresses by leaving the key out."""


def _cluster(merged: Merged) -> dict[str, Any]:
    nodes, ranks = merged.value("mesh.nodes") or 1, merged.value("mesh.world_size")
    device = merged.value("mesh.device")
    cluster: dict[str, Any] = {"nodes": nodes} if nodes > 1 else {}
    if device == "cpu":
        cluster["gpus_per_node"] = 0
    if device == "cuda" and not ranks:
        fact = merged.facts["mesh.device"]
        text = "no file says how many GPUs; write cluster.gpus_per_node, or it is what this machine has"
        merged.remark("fill in", fact, text)
    if ranks:
        cluster["ranks_per_node" if device == "cpu" else "gpus_per_node"] = max(1, ranks // nodes)
        if device is None and nodes == 1:
            fact = merged.facts["mesh.world_size"]
            text = "taken as GPUs of one node; write cluster.nodes for more, and gpus_per_node: 0 for CPUs"
            merged.remark("chosen", fact, text)
    return cluster
