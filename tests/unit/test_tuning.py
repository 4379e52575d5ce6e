"""What trains by depth, from when on, and how fast: what a job file says of it, and what it comes to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.schema import Model, Training
from launcher.job.tuning import Place, stages, unmatched

NAMES = (
    "embed.weight",
    *(f"layers.{i}.{part}" for i in range(4) for part in ("weight", "bias")),
    "norm.weight",
)
PLACES = [
    Place(name, -1 if "embed" in name else 4 if "norm" in name else int(name.split(".")[1]), 4)
    for name in NAMES
] + [Place("head.weight", 4, 4, in_base=False)]


def trained(freeze: Any, *unfreeze: dict[str, Any]) -> dict[str, int]:
    own = Model(name="any", freeze=freeze, unfreeze=unfreeze)  # type: ignore[arg-type]
    return stages(own.freeze, own.unfreeze, PLACES)


@pytest.mark.parametrize(
    ("layers", "frozen"),
    [("0-2", {0, 1, 2}), (1, {1}), ("3", {3}), ("all", {0, 1, 2, 3}), ("all but last 1", {0, 1, 2})],
)
def test_layers_are_chosen_by_number(layers: object, frozen: set[int]) -> None:
    left = trained({"layers": layers})
    assert {place.layer for place in PLACES if place.name not in left} == frozen
    assert {*left.values()} == {0}


def test_embeddings_the_base_and_patterns_are_frozen_together() -> None:
    assert "embed.weight" not in (left := trained({"embeddings": True, "parameters": ["layers.1.*"]}))
    assert "layers.1.bias" not in left and "layers.0.bias" in left and "norm.weight" in left
    assert trained({"base": True}) == {"head.weight": 0}
    assert trained(["*.bias"]) == {name: 0 for name in (*NAMES, "head.weight") if not name.endswith("bias")}
    assert len(trained([])) == len(PLACES)


def test_what_is_frozen_by_depth_trains_from_its_entry_on_and_patterns_stay() -> None:
    freeze = {"base": True, "parameters": ["layers.3.bias"]}
    left = trained(
        freeze, {"at": "10%", "from": -1}, {"at": 0.5, "from": 1}, {"at": "75%", "from": "embeddings"}
    )
    assert left["head.weight"] == 0 and left["norm.weight"] == left["layers.3.weight"] == 1
    assert left["layers.2.bias"] == left["layers.1.weight"] == 2
    assert left["layers.0.weight"] == left["embed.weight"] == 3 and "layers.3.bias" not in left


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "key", "reason"),
    [
        (["no.such.*"], [], "model.freeze", "matches no parameter; they look like embed.weight"),
        ({"layers": "2-7"}, [], "model.freeze.layers", "the model has 4 repeated layers, 0-3"),
        ({"layers": "all but last 4"}, [], "model.freeze.layers", "the model has 4 repeated layers, 0-3"),
        (["*"], [], "model.freeze", "nothing is left to train"),
        ({"base": True, "parameters": ["head.*"]}, [(5, 3)], "model.freeze", "nothing trains at the start"),
        ({"layers": "0-1"}, [(5, 2)], "model.unfreeze", "opens nothing that is frozen by then"),
        ({"layers": "0-1"}, [(5, 0), (9, 1)], "model.unfreeze", "opens nothing that is frozen by then"),
    ],
)
def test_what_a_model_has_not_is_refused(freeze: Any, unfreeze: Any, key: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        trained(freeze, *({"at": at, "from": lowest} for at, lowest in unfreeze))
    [problem] = caught.value.problems
    assert problem.key == key and reason in problem.reason


def test_embeddings_that_are_not_there_are_refused() -> None:
    own = Model(name="any", freeze={"embeddings": True})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no parameter before its first layer"):
        stages(own.freeze, own.unfreeze, [place for place in PLACES if place.layer >= 0])


@pytest.mark.parametrize("layers", ["7-2", "last", "all but 3", "-1", True, 1.5])
def test_layers_that_say_nothing_are_refused(layers: object) -> None:
    with pytest.raises(ValidationError, match="write layers by their numbers from 0"):
        Model(name="any", freeze={"layers": layers})  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["ten", "-3%", 0, 2.5])
def test_a_moment_that_is_none_is_refused(at: object) -> None:
    with pytest.raises(ValidationError):
        Model(name="any", unfreeze=({"at": at, "from": 1},))  # type: ignore[arg-type]


def test_rates_fall_from_the_head_down_and_names_come_first() -> None:
    training = Training.model_validate(
        {
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "layer_decay": 0.5,
            "groups": [
                {"parameters": ["head.*"], "learning_rate": 1e-2},
                {"parameters": ["*.bias", "head.weight"], "weight_decay": 0.3},
            ],
        }
    )
    by_name = {
        place.name: training.group_of(place, 1 if place.name.endswith("bias") else 2) for place in PLACES
    }
    scales = [
        by_name[name].scale for name in ("embed.weight", "layers.0.weight", "layers.3.weight", "norm.weight")
    ]
    assert scales == [0.5**5, 0.5**4, 0.5, 1.0]
    assert by_name["head.weight"].scale == pytest.approx(10) and by_name["head.weight"].weight_decay == 0.1
    assert by_name["layers.2.bias"].weight_decay == 0.3 and by_name["layers.2.weight"].weight_decay == 0.1
    [problem] = unmatched(
        training.groups, [name for name in NAMES if "head" not in name] + ["head.weight"]
    ) or [None]
    assert problem is None
    assert {one.value for one in unmatched(training.groups, NAMES)} == {"head.*", "head.weight"}


@pytest.mark.parametrize(
    ("task", "reason"),
    [("sequence-to-sequence", "reads two, with one table"), ("image-classification", "reads images")],
)
def test_noise_is_for_models_of_one_sequence_of_tokens(task: str, reason: str, tmp_path: Any) -> None:
    columns = {
        "sequence-to-sequence": {"source": "a", "target": "b"},
        "image-classification": {"image": "a", "label": "b"},
    }[task]
    data = {"train": {"path": "rows.jsonl"}, **columns}
    (tmp_path / "rows.jsonl").write_text("{}\n")
    content = {"name": "a", "model": {"name": "org/model", "task": task}, "data": data}
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(content | {"training": {"neftune_noise_alpha": 5}}))
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    [problem] = caught.value.problems
    assert problem.key == "training.neftune_noise_alpha" and reason in problem.reason
