"""Reading of checkpoints from DeepSpeed's `save_checkpoint`, ZeRO stages 1 to 3.

Written for the files of deepspeed 0.19.8, after its own `zero_to_fp32.py`. DeepSpeed itself is not needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import CheckpointError, one_line
from launcher.training.checkpoint.foreign.common import (
    Foreign,
    ForeignTensor,
    add_states,
    plain_name,
    read_file,
    whole_tensor,
)

_OPTIMIZER_FILE = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_PARTITIONS = {3: "fp32_flat_groups"}
_PARTITIONS_BELOW_3 = "single_partition_of_fp32_groups"
_MASTER = "param"


def found(source: Path) -> bool:
    """Return whether the directory looks like such a checkpoint: the directory given to `save_checkpoint`, or
    one of a tag in it."""
    return (source / "latest").is_file() or any(_OPTIMIZER_FILE.match(path.name) for path in source.iterdir())


def read(source: Path) -> Foreign:
    """Return the checkpoint, with tensors not read yet. Raises CheckpointError if a file is missing,
    truncated, or from another save than the rest."""
    directory = _tag(source)
    optimizer_files, model_files = _files(directory)
    try:
        ranks = [_Rank.of(path, read_file(path)) for path in optimizer_files]
        _check_ranks(directory, ranks)
        models = [read_file(path) for path in model_files]
        _check_models(directory, models, ranks)
        return _assemble(ranks, models)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} is not what DeepSpeed writes: {one_line(error)}") from None


def _tag(source: Path) -> Path:
    latest = source / "latest"
    if not latest.is_file():
        return source
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"{latest} names {tag!r}, which is no directory beside it")
    if not (source / tag).is_dir():
        raise CheckpointError(
            f"{latest} names {tag}, which is missing; name another one of {source} by its path"
        )
    return source / tag


def _files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the optimizer's files in rank order, and the model's."""
    names = sorted(path.name for path in directory.iterdir())
    experts = [name for name in names if "expert" in name or "expp_rank" in name]
    if experts or any(name.startswith("layer_") for name in names):
        raise CheckpointError(
            f"{directory} was written with expert or pipeline parallelism, which cannot be taken in"
        )
    optimizers = {int(match[1]): match for name in names if (match := _OPTIMIZER_FILE.match(name))}
    models = {int(match[1] or 0): match for name in names if (match := _MODEL_FILE.match(name))}
    if any(int(match[2]) for match in (*optimizers.values(), *models.values())):
        raise CheckpointError(f"{directory} was written with tensor parallelism, which cannot be taken in")
    if not optimizers:
        raise CheckpointError(
            f"{directory} holds no *_optim_states.pt: only a checkpoint of ZeRO stages 1 to 3 has the "
            "fp32 parameters"
        )
    for kind, files in (("optim", optimizers), ("model", models)):
        missing = sorted(set(range(max(files, default=0) + 1)) - files.keys())
        if missing:
            raise CheckpointError(
                f"{directory}: the *_{kind}_states.pt of rank {', '.join(map(str, missing))} is missing"
            )
    return [directory / optimizers[rank].string for rank in sorted(optimizers)], [
        directory / models[rank].string for rank in sorted(models)
    ]


@dataclass(frozen=True)
class _Rank:
    """One rank's part of the optimizer."""

    path: Path
    stage: int
    world_size: int
    masters: list[torch.Tensor]
    """The fp32 master weights, flat, for each group (stages 1 and 2) or sub-group (stage 3)."""
    states: list[dict[str, Any]]
    """The optimizer's state of each group or sub-group."""
    content: dict[str, Any]

    @classmethod
    def of(cls, path: Path, content: dict[str, Any]) -> _Rank:
        zero = content.get("optimizer_state_dict")
        if not isinstance(zero, dict) or "partition_count" not in zero:
            raise CheckpointError(f"{path} holds no state of a ZeRO optimizer")
        stage, count = int(zero.get("zero_stage", 1)), zero["partition_count"]
        masters = list(zero[_PARTITIONS.get(stage, _PARTITIONS_BELOW_3)])
        inner = zero["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        states = (
            inner
            if isinstance(inner, list)
            else [inner["state"].get(index, {}) for index in range(len(masters))]
        )
        return cls(path, stage, max(count) if isinstance(count, list) else int(count), masters, states, zero)

    def flat(self, index: int, key: str) -> torch.Tensor:
        """Return one group's master weights or moments, without padding at the end."""
        master = self.masters[index]
        values: torch.Tensor = master if key == _MASTER else self.states[index][key]
        if values.numel() < master.numel():
            raise CheckpointError(
                f"{self.path} holds {values.numel():,} of {master.numel():,} elements of {key}: "
                "offloaded to NVMe?"
            )
        return values.detach().reshape(-1)[: master.numel()]

    @property
    def keys(self) -> list[str]:
        """Return the keys of the optimizer's tensors that every group has."""
        key_sets = [
            {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
            for state in self.states
        ]
        return sorted(set.intersection(*key_sets)) if key_sets else []

    def steps(self) -> set[float]:
        groups = self.settings
        counts = [holder["step"] for holder in (*self.states, *groups) if "step" in holder]
        return {float(step) for step in counts}

    @property
    def settings(self) -> list[dict[str, Any]]:
        inner = self.content["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return [] if isinstance(inner, list) else list(inner["param_groups"])


def _check_ranks(directory: Path, ranks: list[_Rank]) -> None:
    """Raise CheckpointError unless all ranks' files come from one save."""
    first = ranks[0]
    for rank in ranks:
        if rank.world_size != len(ranks):
            reason = f"was written on {rank.world_size} ranks, and the files of {len(ranks)} are here"
            raise CheckpointError(
                f"{directory}: {rank.path.name} {reason}: files of several saves, or not all of one"
            )
        if (rank.stage, len(rank.masters), rank.steps()) != (first.stage, len(first.masters), first.steps()):
            raise CheckpointError(
                f"{directory}: {rank.path.name} and {first.path.name} are not of one save: stage, "
                "groups or steps differ"
            )


def _check_models(directory: Path, models: list[dict[str, Any]], ranks: list[_Rank]) -> None:
    needed = len(ranks) if ranks[0].stage == 3 else 1
    if len(models) != needed:
        raise CheckpointError(
            f"{directory} holds {len(models)} *_model_states.pt, and ZeRO-{ranks[0].stage} on "
            f"{len(ranks)} ranks has {needed}"
        )
    for model in models:
        if model["dp_world_size"] != len(ranks) or model["global_steps"] != models[0]["global_steps"]:
            raise CheckpointError(
                f"{directory}: its model and optimizer files are not of one save: ranks or steps differ"
            )
        if model.get("mp_world_size", 1) != 1:
            raise CheckpointError(
                f"{directory} was written with tensor parallelism, which cannot be taken in"
            )


def _assemble(ranks: list[_Rank], models: list[dict[str, Any]]) -> Foreign:
    first, model = ranks[0], models[0]
    origin = f"DeepSpeed {model.get('ds_version', '')}, ZeRO-{first.stage}, {len(ranks)} ranks".replace(
        " ,", ","
    )
    foreign = Foreign(
        origin, step=int(model["global_steps"]), samples=int(model["global_samples"]), settings=first.settings
    )
    foreign.optimizer_steps |= first.steps()
    placed = (
        _stage_three(ranks, model["param_shapes"])
        if first.stage == 3
        else _below_stage_three(ranks, model["param_shapes"])
    )
    keys = first.keys
    for name, shape, pieces in placed:
        plain = plain_name(name)
        tensors = {
            key: ForeignTensor(shape, torch.float32, functools.partial(pieces, key))
            for key in (_MASTER, *keys)
        }
        foreign.parameters[plain] = tensors.pop(_MASTER)
        add_states(foreign, plain, tensors.items())
    for name, tensor in _frozen(first.stage, models):
        foreign.parameters.setdefault(plain_name(name), tensor)
    for name in model["buffer_names"]:
        foreign.buffers[plain_name(name)] = whole_tensor(model["module"][name])
    scaler = vars(first.content.get("loss_scaler")) if first.content.get("dynamic_loss_scale") else {}
    foreign.loss_scale = scaler.get("cur_scale")
    return foreign


Placed = Iterator[tuple[str, torch.Size, Any]]


def _below_stage_three(ranks: list[_Rank], groups: list[dict[str, torch.Size]]) -> Placed:
    """Yield the parameters of stages 1 and 2: a group's are concatenated, then split evenly over ranks."""
    paddings = ranks[0].content.get("param_alignment_paddings")
    if len(groups) != len(ranks[0].masters):
        raise ValueError(f"{len(ranks[0].masters)} partitions for {len(groups)} groups of parameters")
    for index, shapes in enumerate(groups):
        lengths = [rank.masters[index].numel() for rank in ranks]
        position = 0
        for number, (name, shape) in enumerate(shapes.items()):
            _within(name, position + shape.numel(), sum(lengths))
            flat = functools.partial(_across_ranks, ranks, index, position, shape.numel())
            yield name, torch.Size(shape), flat
            position += shape.numel() + (paddings[index][number] if paddings else 0)


def _across_ranks(ranks: list[_Rank], index: int, start: int, count: int, key: str) -> torch.Tensor:
    return _stretch([rank.flat(index, key) for rank in ranks], start, count)


def _stage_three(ranks: list[_Rank], groups: list[dict[str, torch.Size]]) -> Placed:
    """Yield the parameters of stage 3. Each is split into equal parts, padded at the end; a rank's parts are
    concatenated across its sub-groups."""
    position, length = 0, sum(master.numel() for master in ranks[0].masters)
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        part = -(-shape.numel() // len(ranks))
        _within(name, position + part, length)
        yield name, torch.Size(shape), functools.partial(_parts, ranks, position, part, shape.numel())
        position += part
    if position != length:
        raise ValueError(f"{length - position} elements of each partition belong to no parameter")


def _parts(ranks: list[_Rank], start: int, part: int, count: int, key: str) -> torch.Tensor:
    parts = (
        _stretch([rank.flat(index, key) for index in range(len(rank.masters))], start, part) for rank in ranks
    )
    return torch.cat(list(parts))[:count]


def _stretch(pieces: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Return elements [start, start + count) of the concatenated pieces."""
    taken = []
    for piece in pieces:
        begin, end = max(0, start), min(piece.numel(), start + count)
        if begin < end:
            taken.append(piece[begin:end])
        start -= piece.numel()
    return taken[0] if len(taken) == 1 else torch.cat(taken)


def _within(name: str, end: int, length: int) -> None:
    if end > length:
        raise ValueError(f"{name} ends {end - length} elements behind the partitions")


def _frozen(stage: int, models: list[dict[str, Any]]) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the parameters without optimizer state, in the compute dtype. Below stage 3 they are only among the
    model's other tensors."""
    if stage < 3:
        known = {*models[0]["buffer_names"], *(models[0].get("shared_params") or {})}
        known.update(*models[0]["param_shapes"])
        values = models[0]["module"].items()
        yield from ((name, whole_tensor(value)) for name, value in values if name not in known)
        return
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        flat = functools.partial(_joined, fragments, shape.numel())
        yield name, ForeignTensor(torch.Size(shape), fragments[0].dtype, flat)


def _joined(fragments: list[torch.Tensor], count: int) -> torch.Tensor:
    return torch.cat([fragment.reshape(-1) for fragment in fragments])[:count]
