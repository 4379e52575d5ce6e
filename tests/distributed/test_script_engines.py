"""What `launcher run --script` leaves behind, whatever the engine: a model that loads, and a word where the
engine is not the plan's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from tests.distributed.test_script import ENGINES, ENVIRONMENT, SCRIPTS, SIZES, log, run_script

pytestmark = pytest.mark.slow

ZERO_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
DEEPSPEED = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    set_seed(3)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_key_value_heads=2, **SIZES)
    ).save_pretrained(folder)
    return folder


def saved(folder: Path, model: Path, engine: str, *more: str) -> Path:
    """Where the script was told to save its model, after two steps with a checkpoint after each."""
    out = folder / "out"
    arguments = [
        "--model",
        str(model),
        "--out",
        str(out),
        "--output_dir",
        str(folder / "trainer"),
        "--max_steps",
        "2",
        "--save_steps",
        "1",
    ]
    arguments += ["--learning_rate", "1e-2", "--report_to", "none", "--logging_steps", "1", *more]
    code, said = run_script(folder / "run", SCRIPTS / "saves.py", *arguments, options=ENGINES[engine])
    assert code == 0, said + log(folder / "run")
    return out


def check_loads(directory: Path, trained: dict[str, torch.Tensor]) -> None:
    """What `from_pretrained` makes of it is what was trained, to the bit, and nothing of it was made up."""
    loaded, said = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    weights = dict(loaded.named_parameters())
    assert weights.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(weights[name], value), name


VERY_SLOW = [pytest.mark.slow, pytest.mark.very_slow]


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        pytest.param("fsdp", (), marks=VERY_SLOW),
        pytest.param("zero3", ("its own configuration",), marks=VERY_SLOW),
        pytest.param("fsdp", ("--alone", "true"), marks=VERY_SLOW),
        pytest.param("zero3", ("--alone", "true"), marks=VERY_SLOW),
        pytest.param("zero3", (), marks=VERY_SLOW),
        pytest.param("fsdp", ("--save_only_model",), marks=VERY_SLOW),
    ],
)
def test_what_a_trainer_saves_loads(engine: str, more: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """Sharded state dicts, a ZeRO-3 that is told to gather nothing, rank 0 that saves alone: all directories
    hold the whole model."""
    if more == ("its own configuration",):
        (tmp_path / "ds.json").write_text(
            json.dumps({**DEEPSPEED, "zero_optimization": ZERO_3, "zero_allow_untested_optimizer": True})
        )
        more = ("--deepspeed", str(tmp_path / "ds.json"))
    out = saved(tmp_path, model, engine, *more)
    trained = torch.load(f"{out}.pt")
    before = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert not any(torch.equal(before[name], value) for name, value in trained.items())
    check_loads(out, trained)
    check_loads(tmp_path / "trainer" / "checkpoint-2", trained)
    if "--alone" in more:
        check_loads(tmp_path / "out-again", trained)
    assert not [
        record
        for record in read(RunDirectory(tmp_path / "run").events_file)
        if record["event"] == "other_engine"
    ]


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_trainer_goes_on_from_such_a_checkpoint(
    engine: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = saved(tmp_path / "through", model, engine)
    monkeypatch.setitem(ENVIRONMENT, "RESUME_FROM", str(tmp_path / "through" / "trainer" / "checkpoint-1"))
    resumed = saved(tmp_path / "resumed", model, engine)
    assert json.loads(Path(f"{resumed}.json").read_text()) == json.loads(Path(f"{through}.json").read_text())
    one, other = torch.load(f"{through}.pt"), torch.load(f"{resumed}.pt")
    assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in one.items())


@pytest.mark.parametrize(
    ("kind", "engine", "planned", "found"),
    [
        pytest.param("ddp", "fsdp", "FSDP2", "DDP (a whole copy on each rank)", marks=VERY_SLOW),
        pytest.param("accelerate-zero", "fsdp", "FSDP2", "DeepSpeed ZeRO-2", marks=VERY_SLOW),
        pytest.param("alone", "fsdp", "FSDP2", "no engine (each rank trains for itself)", marks=VERY_SLOW),
        pytest.param("fsdp", "zero2", "DeepSpeed ZeRO-2", "FSDP2", marks=VERY_SLOW),
        pytest.param("judge", "fsdp", "FSDP2", None, marks=VERY_SLOW),
    ],
)
def test_another_engine_than_the_plans_is_told_of_once(
    kind: str, engine: str, planned: str, found: str | None, tmp_path: Path
) -> None:
    code, said = run_script(tmp_path / "run", SCRIPTS / "engines.py", kind, options=ENGINES[engine])
    assert code == 0, said + log(tmp_path / "run")
    told = [
        record
        for record in read(RunDirectory(tmp_path / "run").events_file)
        if record["event"] == "other_engine"
    ]
    assert [(record["planned"], record["found"]) for record in told] == ([(planned, found)] if found else [])
    assert said.count(f"warning: the script trains on {found}, and the plan is {planned}") == len(told)
    assert said.count("warning") == len(told)


@pytest.mark.slow
@pytest.mark.very_slow
def test_arguments_of_the_trainer_that_leave_the_plan_are_told_of(model: Path, tmp_path: Path) -> None:
    saved(tmp_path, model, "fsdp", "--use_cpu")
    told = [
        record
        for record in read(RunDirectory(tmp_path / "run").events_file)
        if record["event"] == "other_engine"
    ]
    assert [(record["planned"], record["found"]) for record in told] == [
        ("FSDP2", "DDP (a whole copy on each rank)")
    ]
