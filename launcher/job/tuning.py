"""What trains, from when on, and how fast: by the names of parameters, and by where they stand in a model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from launcher.errors import ConfigurationError, Problem
from launcher.values import Line, Section

_RANGE = re.compile(r"^(\d{1,6})(?:\s*-\s*(\d{1,6}))?$")
_BUT_LAST = re.compile(r"^all but last (\d{1,6})$")


@dataclass(frozen=True)
class Place:
    """Say where a parameter stands in a model of `num_layers` repeated layers."""

    name: str
    layer: int
    """Of the repeated layers, in the model's order, from 0; -1 before them, `num_layers` behind them."""
    num_layers: int
    in_base: bool = True
    """Of the base model, and not of the head that was put on it for a task."""


def parse_layers(value: object) -> object:
    """Return a choice of layers as text: `0-7`, `5`, `all`, `all but last 4`. Raises ValueError for another."""
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    match = _RANGE.match(text)
    backwards = match is not None and match[2] is not None and int(match[2]) < int(match[1])
    if text != "all" and not _BUT_LAST.match(text) and (match is None or backwards):
        raise ValueError("write layers by their numbers from 0, as 0-7 or 5, or all, or all but last 4")
    return text


def parse_share(value: object) -> object:
    """Return `10%` as 0.1, and anything else unchanged, for pydantic to judge."""
    if isinstance(value, str) and (match := re.match(r"^\s*(\d+(?:\.\d+)?)\s*%\s*$", value)):
        return float(match[1]) / 100
    return value


def check_moment(value: float) -> float:
    """Return a share below 1 or a whole number of steps as it is. Raises ValueError for any other."""
    if value >= 1 and value != int(value):
        raise ValueError("from 1 it is a number of steps, and steps are whole; below 1 it is a share of all")
    return value


Layers = Annotated[str, BeforeValidator(parse_layers)]
Moment = Annotated[float, BeforeValidator(parse_share), AfterValidator(check_moment), Field(gt=0, le=1e12)]


class Freeze(Section):
    """Freeze weights. A list of patterns instead of a section means `parameters`."""

    parameters: tuple[str, ...] = ()
    """Patterns of parameter names, as `model.embed_tokens.*`."""
    layers: Layers | None = None
    """Layers by their numbers, from 0 for the lowest: `0-7`, `5`, `all`, or `all but last 4`."""
    embeddings: bool = False
    """Everything before the first layer."""
    base: bool = False
    """Everything but the head that the task puts on the base model, such as a new classifier."""

    def __bool__(self) -> bool:
        """Return whether it may freeze anything."""
        return bool(self.parameters or self.by_depth)

    @property
    def by_depth(self) -> bool:
        """Return whether it goes by where a parameter stands."""
        return self.layers is not None or self.embeddings or self.base

    def names(self, place: Place) -> bool:
        """Return whether a pattern names the parameter."""
        return any(fnmatch.fnmatch(place.name, pattern) for pattern in self.parameters)

    def reaches(self, place: Place) -> bool:
        """Return whether the parameter is frozen for where it stands."""
        inside = 0 <= place.layer < place.num_layers and self.layers is not None
        return (
            (self.base and place.in_base)
            or (self.embeddings and place.layer < 0)
            or (inside and place.layer in self._chosen(place.num_layers))
        )

    def _chosen(self, num_layers: int) -> range:
        if self.layers is None:
            return range(0)
        if match := _RANGE.match(self.layers):
            return range(int(match[1]), int(match[2] or match[1]) + 1)
        kept = _BUT_LAST.match(self.layers)
        return range(num_layers - int(kept[1]) if kept else num_layers)

    def problems(self, places: Sequence[Place]) -> list[Problem]:
        """Return what of it a model has not: a pattern that matches nothing, a layer beyond the last."""
        names = [place.name for place in places]
        problems = [
            Problem("model.freeze", pattern, f"matches no parameter; they look like {names[0]}, {names[-1]}")
            for pattern in self.parameters
            if not fnmatch.filter(names, pattern)
        ]
        num_layers = places[0].num_layers
        kept = _BUT_LAST.match(self.layers or "")
        chosen = self._chosen(num_layers)
        if (chosen and chosen[-1] >= num_layers) or (kept and not chosen):
            reason = f"the model has {num_layers} repeated layers, 0-{num_layers - 1}"
            problems.append(Problem("model.freeze.layers", self.layers, reason))
        if self.embeddings and not any(place.layer < 0 for place in places):
            reason = "the model has no parameter before its first layer; leave it out"
            problems.append(Problem("model.freeze.embeddings", True, reason))
        return problems


def parse_freeze(value: Any) -> Any:
    """Return a list of patterns as the section that it stands for; anything else unchanged."""
    return {"parameters": value} if isinstance(value, (list, tuple)) else value


class Thaw(Section):
    """Unfreeze, from a step on, what `model.freeze` froze by depth: a layer and all above it. What its
    patterns name stays frozen."""

    at: Moment
    """When: below 1, or as `10%`, after this share of all steps; from 1 on, after so many steps."""
    from_: Annotated[int, Field(ge=-999_999, le=999_999)] | Literal["embeddings"] = Field(alias="from")
    """The lowest layer to unfreeze: its number from 0, or from the end as -2. `embeddings` means
    everything."""

    model_config = ConfigDict(populate_by_name=True)

    def lowest(self, num_layers: int) -> int:
        """Return the number of the lowest layer that it lets train; -1 with what comes before the layers."""
        if self.from_ == "embeddings":
            return -1
        return self.from_ + num_layers if self.from_ < 0 else self.from_


class ParameterGroup(Section):
    """Give parameters a learning rate or a weight decay of their own; of several that match the first counts."""

    parameters: Annotated[tuple[Line, ...], Field(min_length=1)]
    """Patterns of parameter names, as `classifier.*`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Their highest rate, in the place of `training.learning_rate` and without `layer_decay`; it moves as the
    schedule does."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Their weight decay, biases and norms among them."""

    def matches(self, name: str) -> bool:
        """Return whether one of its patterns is of the name."""
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.parameters)


class GroupKey(NamedTuple):
    """Name what the parameters of one group of an optimizer have in common."""

    weight_decay: float
    scale: float
    """Times the schedule's learning rate."""
    stage: int
    """Of `model.unfreeze`, from 1: the entry that lets it train; 0 trains from the start."""
    kind: str
    """The optimizer that steps it: that of the training, or with Muon `muon` or `adamw`."""


def stages(freeze: Freeze, unfreeze: Sequence[Thaw], places: Sequence[Place]) -> dict[str, int]:
    """Return from which stage on each parameter trains, by name; what never does is left out.

    Raises ConfigurationError, with every problem, where something matches nothing of the model, an entry opens
    nothing, or nothing is left to train.
    """
    if not freeze:
        return {place.name: 0 for place in places}
    problems, trained = freeze.problems(places), dict[str, int]()
    for place in places:
        if freeze.names(place):
            continue
        if not freeze.reaches(place):
            trained[place.name] = 0
            continue
        opened = (k for k, one in enumerate(unfreeze, 1) if place.layer >= one.lowest(place.num_layers))
        if (stage := next(opened, None)) is not None:
            trained[place.name] = stage
    problems += [
        Problem("model.unfreeze", str(one.from_), "opens nothing that is frozen by then; leave it out")
        for number, one in enumerate(unfreeze, 1)
        if number not in trained.values()
    ]
    if not problems and not trained:
        reason = "freezes every parameter, so that nothing is left to train"
        problems = [Problem("model.freeze", str(freeze.model_dump(exclude_defaults=True)), reason)]
    elif not problems and 0 not in trained.values():
        reason = (
            "freezes every parameter until the first entry of model.unfreeze: nothing trains at the start"
        )
        problems = [Problem("model.freeze", str(freeze.model_dump(exclude_defaults=True)), reason)]
    if problems:
        raise ConfigurationError(problems)
    return trained


def unmatched(groups: Sequence[ParameterGroup], names: Iterable[str]) -> list[Problem]:
    """Return a problem for each pattern of a group that matches none of the parameters that train."""
    names = list(names)
    return [
        Problem(
            "training.groups.parameters",
            pattern,
            f"matches no parameter that trains; they look like {names[0]}, {names[-1]}",
        )
        for group in groups
        for pattern in group.parameters
        if not fnmatch.filter(names, pattern)
    ]
