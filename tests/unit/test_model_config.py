"""A model's config.json: in the job file, never taken for one whose weights are loaded; in the hub's cache;
with sizes that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.reference import json_schema
from launcher.job.schema import Model
from launcher.planner.forecast import forecast_of
from launcher.planner.memory.decoders import LLAMAS
from launcher.planner.memory.formulas import KNOWN, program_of
from launcher.planner.memory.profiles import Unknown
from launcher.planner.model.model_config import config_of, locate
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.model.model_sizes import FAMILIES, wrong_sizes
from launcher.planner.preflight import preflight
from launcher.planner.preview import preview_job
from launcher.planner.target import Target

SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": 3,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 64, "n_inner": None},
    **{kind: SIZES | {"head_dim": None} for kind in LLAMAS},
}
"""A config of each architecture that the formulas know, of nothing but the sizes that it needs."""


def written(folder: Path, name: str = "some-org/not-here", config: Any = SIZES, **model: Any) -> Path:
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    content = {
        "name": "a",
        "model": {"name": name, "weights": "random"}
        | ({"config": config} if config is not None else {})
        | model,
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 128},
        "batch": {"global_batch_size": 4},
        "training": {"max_steps": 5},
        "cluster": {"ranks_per_node": 1, "gpus_per_node": 0},
        "precision": "fp32",
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_sizes_in_the_job_plan_as_a_directory_with_them(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SIZES))
    here = preview_job(load(written(tmp_path, str(model), None)))
    elsewhere = preview_job(load(written(tmp_path)))
    assert here.forecast is not None and elsewhere.forecast is not None
    assert (
        elsewhere.forecast.footprint == here.forecast.footprint and config_of(elsewhere.plan.model) == SIZES
    )
    assert elsewhere.plan.activation_checkpointing == here.plan.activation_checkpointing
    assert ModelShape.read(elsewhere.plan.model) == ModelShape.read(here.plan.model)


def test_a_size_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    job = load(written(tmp_path), ["model.config.num_hidden_layers=6"])
    assert job.model.config == SIZES | {"num_hidden_layers": 6}


def test_the_job_goes_before_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    plan = preview_job(load(written(tmp_path, str(tmp_path), SIZES | {"vocab_size": 1000}))).plan
    assert (config_of(plan.model) or {})["vocab_size"] == 1000


def test_numbers_of_tokens_are_no_secrets_and_texts_may_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="looks like a secret"):
        load(written(tmp_path, config=SIZES | {"auth_token": "abc"}))
    assert load(written(tmp_path)).model.config == SIZES


def test_a_size_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, config={key: value for key, value in SIZES.items() if key != "hidden_size"})
    with pytest.raises(SystemExit) as left:
        main(["plan", str(path)])
    assert left.value.code == 2
    assert (
        "model.config = 'llama': it has no hidden_size, which a llama model needs" in capsys.readouterr().err
    )


def test_sizes_that_are_no_section_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(written(tmp_path, config=[1, 2]))
    (problem,) = refused.value.problems
    assert problem.key == "model.config" and "config.json" in problem.reason


def test_weights_that_are_loaded_bring_their_own_sizes(tmp_path: Path) -> None:
    job = load(written(tmp_path, weights="pretrained"))
    seen = preview_job(job)
    assert seen.forecast is not None, "a plan is for before the model is fetched"
    with pytest.raises(ConfigurationError, match=r"model\.weights: random"):
        preflight(job, seen.plan, tmp_path, local=True)
    made = load(written(tmp_path))
    assert preflight(made, preview_job(made).plan, tmp_path, local=True) is not None


def test_no_config_anywhere_says_what_to_do(tmp_path: Path) -> None:
    seen = preview_job(load(written(tmp_path, config=None)))
    assert seen.forecast is None and "write model.config" in str(seen.no_forecast)
    assert isinstance(forecast_of(seen.plan, Target()), Unknown)


def test_editors_are_told_that_it_is_an_object() -> None:
    described = json_schema()["$defs"]["Model"]["properties"]["config"]
    assert {"type": "object", "additionalProperties": True} in described[
        "anyOf"
    ] and "config.json" in described["description"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "4096", "; the nearest is 4096"), ("hidden_size", 0, "; the nearest is 1"),
        ("hidden_size", float("inf"), ""),
        ("num_attention_heads", 0, "; the nearest is 1"), ("num_hidden_layers", 0, "; the nearest is 1"),
        ("num_hidden_layers", True, ""),
        ("num_hidden_layers", -3, "; the nearest is 1"), ("vocab_size", 1.5, "; the nearest is 2"),
        ("head_dim", "abc", ", or null"),
        ("num_key_value_heads", [2], ", or null"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused(key: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        preview_job(load(written(tmp_path, config=SIZES | {key: value})))
    assert str(refused.value) == f"model.config.{key} = {value!r}: write a positive whole number{said}"


def test_all_sizes_that_cannot_be_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        preview_job(
            load(
                written(
                    tmp_path,
                    config=SIZES | {"hidden_size": 66, "vocab_size": None, "intermediate_size": None},
                )
            )
        )
    assert [str(problem) for problem in refused.value.problems] == [
        "model.config.vocab_size: is null; write a positive whole number",
        "model.config.intermediate_size: is null; write a positive whole number",
        "model.config.hidden_size = 66: num_attention_heads = 4 does not divide it; the nearest is 64 or 68",
    ]


def test_sizes_of_a_models_own_file_are_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"hidden_size": "64", "vocab_size": 0}))
    with pytest.raises(ConfigurationError) as refused:
        preview_job(load(written(tmp_path, str(tmp_path), None)))
    first, second = refused.value.problems
    assert (first.key, first.value, second.key) == (
        "model.name",
        str(tmp_path),
        "model.name",
    ) and "vocab_size = 0" in second.reason
    assert (
        first.reason
        == f"in {tmp_path}/config.json, hidden_size = '64': write a positive whole number; the nearest is 64"
    )
    (tmp_path / "config.json").write_text("[]")
    assert (
        config_of(Model(name=str(tmp_path))) is None
        and config_of(Model(name=str(tmp_path / "nothing"))) is None
    )


@pytest.mark.parametrize("kind", KNOWN)
def test_no_architecture_is_planned_with_nonsense(kind: str) -> None:
    """What each program reads is known of it: it goes through with these sizes, and each of them is looked
    at."""
    config = OTHERS[kind] | {"model_type": kind}
    program = program_of(config)
    assert program.units()[1] and wrong_sizes(config) == []
    for name in {*FAMILIES[kind].needed, *FAMILIES[kind].optional}:
        for value in ("4096", 0, -3, 1.5, float("nan"), [4], {}):
            assert [problem.key for problem in wrong_sizes(config | {name: value})] == [name]
        nothing = [problem.key for problem in wrong_sizes(config | {name: None})]
        assert nothing == ([name] if name in FAMILIES[kind].needed else [])
    for width, heads in FAMILIES[kind].divided if config.get("head_dim") is None else ():
        assert width in [problem.key for problem in wrong_sizes(config | {heads: 5})]


def test_sizes_that_are_left_out_or_null() -> None:
    assert wrong_sizes(SIZES | {"hidden_size": 66, "head_dim": 16}) == [], "no head is cut out of it"
    assert wrong_sizes(SIZES | {"num_key_value_heads": None, "head_dim": None}) == []
    assert wrong_sizes({"model_type": "gpt2", "hidden_size": "x"})[0].key == "hidden_size"
    assert (
        wrong_sizes({"model_type": "mamba", "hidden_size": "x"})
        == wrong_sizes({"model_type": [1]})
        == wrong_sizes({})
        == []
    )


def test_an_unknown_architecture_with_odd_sizes_is_only_unknown(tmp_path: Path) -> None:
    odd = {
        "model_type": "novel",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": [4, 8],
        "num_key_value_heads": "two",
    }
    shape = ModelShape.read(Model(name=str(tmp_path), config={**odd, "id2label": {0: "a", "b": "c"}}))
    assert shape is not None and shape.layer_parameters > 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetched(hub: Path, name: str, commit: str, age: int = 0, **refs: str) -> str:
    """A snapshot as huggingface_hub keeps it, and what branches and tags stand for."""
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 1000 + age}))
    os.utime(snapshot / "config.json", (10_000 - age, 10_000 - age))
    (folder / "refs").mkdir(exist_ok=True)
    for ref, target in refs.items():
        (folder / "refs" / ref).write_text(target)
    return str(snapshot)


def test_the_hubs_cache_is_where_its_variables_say(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = [
        fetched(tmp_path / place, "org/name", "a1")
        for place in ("cache", "older", "home/hub", "xdg/huggingface/hub")
    ]
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "older"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for snapshot, name in zip(
        snapshots, ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"), strict=True
    ):
        assert locate("org/name") == snapshot
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert locate("org/name") == "org/name"
    assert (
        locate("org/name")
        != fetched(tmp_path / "user/.cache/huggingface/hub", "org/name", "b2")
        == locate("org/name")
    )
    monkeypatch.setenv("HF_HUB_CACHE", "~/own")
    assert locate("org/name") != fetched(tmp_path / "user/own", "org/name", "c3") == locate("org/name")


def test_a_revision_is_the_one_that_is_named_or_none(hub: Path) -> None:
    main = fetched(hub, "org/name", "a1", age=2, main="a1")
    tagged = fetched(hub, "org/name", "b2", age=1, v2="b2", gone="d4")
    newest = fetched(hub, "org/name", "c3")
    assert locate("org/name") == locate("org/name", "main") == main, (
        "the main branch, whatever was fetched since"
    )
    assert (
        locate("org/name", "v2") == locate("org/name", "b2") == tagged and locate("org/name", "c3") == newest
    )
    assert locate("org/name", "v3") == locate("org/name", "gone") == locate("org/name", "..") == "org/name"
    assert locate("org/name", str(hub)) == "org/name", "no path"
    assert (config_of(Model(name="org/name", revision="v2")) or {})["vocab_size"] == 1001
    assert config_of(Model(name="org/name", revision="v3")) is None
    assert locate(main, "v2") == main, "a directory has no revisions"


def test_a_name_without_a_slash_and_without_a_main_branch(hub: Path) -> None:
    fetched(hub, "gpt2", "b2", age=1)
    newest = fetched(hub, "gpt2", "a1", main="not-whole")
    assert locate("gpt2") == newest and locate("gpt2", "main") == "gpt2" and locate("gpt3") == "gpt3"


@pytest.mark.parametrize("config", [None, SIZES])
def test_the_hub_is_asked_once_and_only_where_a_config_is_lacking(
    tmp_path: Path, config: dict[str, Any] | None
) -> None:
    job = written(tmp_path, config=config, name="org/name")
    command = [sys.executable, "-m", "launcher.cli.main", "plan", str(job), "--fetch"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub")}
    nowhere |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=300)
    reason = "its config.json is not on this machine, and the hub cannot be reached: "
    assert (reason in done.stderr) == (config is None), done.stderr
    assert done.stderr.count("\n") <= 3 and "Retry" not in done.stderr and done.returncode == 2 * (not config)
